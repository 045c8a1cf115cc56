"""What stands between `value train`, `value score` and the valuation room."""

from __future__ import annotations

import hashlib
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.errors import UsageError, printable
from ..runtime.progress import Progress
from ..runtime.ranks import one_process
from ..shards.operands import expand_braces, open_source, refuse_shared
from ..shards.sample import Sample
from .streams import SHARE, Listing, Tallies, report, run_filter, run_reduction

if TYPE_CHECKING:
    from ..shards.quarantine import Quarantine
    from ..valuation.score import Scorer
    from ..valuation.todv import ValueConfig

COLUMNS = ("utility", "loss", "predicted", "probability", "margin", "nearest", "disagreement")


def _row(sample: Sample) -> list[object]:
    facts = sample.parsed("utility.json")
    name = sample.facts.get("class_name", sample.label)
    return [sample.key, name, *(facts[column] for column in COLUMNS)]


LISTING = Listing(("key", "class", *COLUMNS), _row)


def smoke_config(config: ValueConfig) -> ValueConfig:
    """A trial of the works: a few steps of two classifiers."""
    from dataclasses import replace

    return replace(config, steps=min(config.steps, 20), batch_size=16, folds=min(config.folds, 2),
                   snapshots=1, refresh=10)  # fmt: skip


def train_into(
    output: Path, config: ValueConfig, inputs: dict[str, list[str]], size: int | None, seed: int,
    device: Any, overwrite: bool, progress: Progress, aside: Quarantine,
) -> dict[str, Any]:  # fmt: skip
    """Train in the output directory, unless that is done; what value.json says."""
    from ..classification.clip import tower_files
    from ..runtime.output import OutputDirectory
    from ..valuation.bilevel import META_GRADIENTS
    from ..valuation.inputs import load_value_data
    from ..valuation.training import train_values
    from ..valuation.value_model import VALUE_JSON, read_facts

    if config.meta_gradient not in META_GRADIENTS:
        known = " or ".join(META_GRADIENTS)
        raise UsageError(f"--meta-gradient {config.meta_gradient}", "unknown", f"Use {known}.")
    for names in inputs.values():
        for name in names:
            _refuse_pipe(name)
    read = {
        kind: [Path(one) for name in names for one in expand_braces(name)]
        for kind, names in inputs.items()
    }
    if inputs["val"]:
        advice = "Leave --val out: --real is validated on, fold by fold, all the same."
        real, val = (open_source(inputs[kind]) for kind in ("real", "val"))
        refuse_shared(("--val", val), ("--real", real), advice)
    settings = {**config.facts(), **read, "seed": seed, "size": size,
                "arch files": tower_files(config.arch), **aside.settings()}  # fmt: skip
    with OutputDirectory(output, "value train", settings, overwrite) as out:
        if out.is_done(VALUE_JSON):
            return read_facts(out.path)
        data = load_value_data(
            inputs["real"], inputs["synthetic"], inputs["val"], config.arch, size, progress, aside
        )
        model = train_values(data, config, out.path, seed=seed, device=device, progress=progress)
        return model.facts


def _refuse_pipe(name: str) -> None:
    if name == "-":
        raise UsageError("-", "value train reads its images by name", "Name shards.")


def train_lines(facts: dict[str, Any]) -> list[str]:
    """What a person should know about the value model."""
    from ..valuation.canary import REFUSE, WARN

    found = facts["canary"]["auroc"]
    lines = [f"{facts['arch']} on images of {facts['transform']['size']} pixels a side"]
    if found is None:
        return [*lines, "no canaries could be planted: one class only"]
    judged = facts["canary"].get("judged", facts["canary"]["planted"])
    lines += [f"canary: real images under {judged:,} wrong labels, AUROC {found:.3f}"]
    if found < REFUSE:
        lines.append("warning: wrong labels rank above right ones; `value score` will refuse this")
    elif found < WARN:
        lines.append(f"warning: below {WARN}: utilities are weak evidence; add real images")
    return lines


@dataclass(frozen=True)
class ScoreRequest:
    """The options of one `value score`."""

    output: str
    method: str
    select: int | None
    lookahead: bool
    real: list[str]
    val: list[str]
    overwrite: bool
    part: str | None
    aside: Quarantine

    def check(self) -> None:
        """UsageError for options that do not go together, before any work."""
        from ..valuation.baselines import check_method

        if self.part is None:
            one_process(SHARE)
        check_method(self.method)
        if self.lookahead and not (self.real and self.val):
            raise UsageError("--lookahead", "needs real images to train and validate on",
                             "Add --real and --val.")  # fmt: skip
        if not self.lookahead and (self.real or self.val):
            raise UsageError("--real, --val", "serve --lookahead only", "Add --lookahead.")
        if self.select and self.part:
            raise UsageError("--select", "looks at all samples, --part at some", "Use one of them.")


def run_scoring(
    shards: Sequence[str] | None,
    value: Path,
    scorer: Scorer,
    request: ScoreRequest,
    listing: Listing,
) -> dict[str, Any]:
    """Score, and pick if asked to; the summary."""
    from ..valuation.subset import Aside, select_samples

    source = open_source(list(shards) if shards else None, request.aside)
    aside = Aside(scorer.value.classes, scorer.value.size)
    settings = {
        "value": fingerprint(value), "method": request.method, "select": request.select,
        "passes": scorer.passes, "agreed": scorer.agreed,
        "input": list(source.paths), **request.aside.settings(),
    }  # fmt: skip
    tallies: Tallies = {"scores": scorer, "quarantine": request.aside}
    once = request.lookahead and source.is_stdin  # a pipe cannot be read again
    if request.select:
        samples = aside.watch(source.samples()) if once else source.samples()
        run_reduction(select_samples(samples, scorer, request.select), request.output,
                      "value score", settings, request.overwrite, listing,
                      source.is_stdin, tallies)  # fmt: skip
    else:
        run_filter(source, lambda s: scorer(aside.watch(s) if once else s),
                   request.output, "value score", settings, request.overwrite, listing,
                   request.part, tallies)  # fmt: skip
    summary = scorer.summary() | request.aside.summary()
    if request.select:
        summary["passed"] = min(summary["passed"], request.select)
    if request.lookahead and not once:  # all of the set, also where a rerun scored only the rest
        deque(aside.watch(source.part(request.part).samples()), maxlen=0)
    if aside.heap:
        summary["lookahead"] = value_of_set(scorer, aside, request)
    return summary


def _figure(value: object) -> str:
    return "-" if value is None else str(value)


def value_of_set(scorer: Scorer, aside: Any, request: ScoreRequest) -> dict[str, Any]:
    """The set-level value of what was kept aside."""
    from ..classification.data import concatenate, load_images
    from ..valuation.lookahead import lookahead

    size = scorer.value.size
    real, val = (
        concatenate(
            [load_images(open_source([n], request.aside), size, scorer.value) for n in names]
        )
        for names in (request.real, request.val)
    )
    found = lookahead(scorer.value, real, aside.images(), val, progress=scorer.progress)
    return {
        "gain": round(found.gain, 5), "standard_error": round(found.standard_error, 5),
        "accuracy_gain": round(found.accuracy_gain, 5),
        "loss_without": round(found.without.loss, 5), "loss_with": round(found.with_set.loss, 5),
        "samples": len(aside.heap),
    }  # fmt: skip


def fingerprint(value: Path) -> str:
    """Which value model: its name, and a digest of value.json."""
    data = (value / "value.json").read_bytes()
    return f"{value}#{hashlib.blake2b(data, digest_size=6).hexdigest()}"


def warn(line: str | None, quiet: bool) -> None:
    """A warning on stderr."""
    if line and not quiet:
        report({}, False, f"value score: warning: {line}")


def score_lines(summary: dict[str, Any], as_json: bool, quiet: bool) -> None:
    """The summary per class on stderr, or as JSON in one line there."""
    if as_json:
        report(summary, True, "")
        return
    if quiet or not summary["all"]["samples"]:
        return
    rows = [(printable(name, 40), row) for name, row in summary["classes"].items()]
    rows.append(("all", summary["all"]))
    columns = ("samples", "utility", "loss", "agreement", "duplicates", "disagreement")
    width = max(5, *(len(name) for name, _ in rows))
    print("  ".join([f"{'class':<{width}}", *(f"{c:>12}" for c in columns)]), file=sys.stderr)
    for name, row in rows:
        print(
            "  ".join([f"{name:<{width}}", *(f"{_figure(row[c]):>12}" for c in columns)]),
            file=sys.stderr,
        )
    if summary["passed"] < summary["all"]["samples"]:
        print(f"{summary['passed']} of {summary['all']['samples']} passed on", file=sys.stderr)
    if "lookahead" in summary:
        found = summary["lookahead"]
        losses = f"{found['loss_without']:.4f} -> {found['loss_with']:.4f}"
        gain = f"{found['gain']:+.4f} +- {found['standard_error']:.4f}"
        accuracy = f"{100 * found['accuracy_gain']:+.1f} points of accuracy"
        print(f"set value: validation loss {losses}, gain {gain}; {accuracy}", file=sys.stderr)
