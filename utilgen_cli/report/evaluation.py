"""The page of `utilgen eval --report`: result, why, images, cost, protocol."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.errors import UsageError, printable
from ..runtime.files import write_atomic, write_json
from ..shards.sample import Sample
from ..shards.scores import UTILITY, utility_of
from . import figures as fig
from . import plots
from .html import Markup, join, page, section, table, tag
from .sheets import ClassSheet, collect, high_low_sheet, pair_list, same_keys

if TYPE_CHECKING:
    from ..classification.comparison import Comparison
    from ..shards.operands import Source

IMAGES_A_CLASS = 8
PAIRS_A_CLASS = 2
Row = dict[str, Any]


@dataclass
class Extras:
    """What the page shows beside the summary; whatever is empty is left out."""

    value: Row | None = None  # value.json of `utilgen value train`
    sheets: dict[str, list[ClassSheet]] = field(default_factory=dict)
    pairs: list[tuple[Sample, Sample]] = field(default_factory=list)
    pair_names: tuple[str, str] = ("", "")
    scatter: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)


def gather(
    scored: Mapping[str, Iterable[Sample]],
    pairs: tuple[Iterable[Sample], Iterable[Sample]] | None,
    pair_names: tuple[str, str],
    influence: Mapping[str, Mapping[str, float]],
    value: Row | None,
) -> Extras:
    """Read each scored set once for sheets and scatter; `pairs` for the images of equal keys."""
    extras = Extras(value=value, pair_names=pair_names)
    for name, samples in scored.items():
        utility: dict[str, float] = {}
        sheets = collect(_noting(samples, utility), IMAGES_A_CLASS)
        if utility:
            extras.sheets[name] = sheets
        keys = [key for key in utility if key in influence.get(name, {})]
        if keys:
            extras.scatter[name] = ([utility[k] for k in keys], [influence[name][k] for k in keys])
    if pairs is not None:
        extras.pairs = same_keys(*pairs, PAIRS_A_CLASS)
    return extras


def _noting(samples: Iterable[Sample], utility: dict[str, float]) -> Iterable[Sample]:
    for sample in samples:
        if UTILITY in sample.members:
            utility[sample.key] = utility_of(sample)
        yield sample


def evaluation_page(summary: Row, extras: Extras) -> str:
    """The whole page as HTML."""
    colours = {name: 1 + i % 7 for i, name in enumerate(summary["synthetic"])}
    return page(
        "utilgen: evaluation",
        _head(summary),
        _result(summary, colours),
        _per_class(summary, colours),
        _volume(summary, colours),
        _why(summary, extras, colours),
        _value(extras.value),
        *(_sheet(name, sheets) for name, sheets in extras.sheets.items()),
        _pairs(extras),
        _cost(summary),
        _leaks(summary),
        _protocol(summary),
        tag("footer", f"utilgen {summary['utilgen']}, torch {summary['torch']}. "
            "The figures of this page are those of utilgen eval --json."),
    )  # fmt: skip


def _by_arch(summary: Row) -> dict[str, list[Row]]:
    return {a: [r for r in summary["arms"] if r["arch"] == a] for a in summary["protocol"]["archs"]}


def _arm_colours(arms: Sequence[Row], colours: Mapping[str, int]) -> list[int]:
    return [colours.get(arm["synthetic"], 0) for arm in arms]


def _head(summary: Row) -> Markup:
    arms = next(iter(_by_arch(summary).values()))
    last = arms[-1]  # not the best one: that would be a choice made on the test set
    cards = [(fig.percent(arms[0]["accuracy"]["mean"]) + " %", "real only")]
    if last is not arms[0]:
        cards.append((fig.percent(last["accuracy"]["mean"]) + " %", printable(last["name"])))
    if last.get("difference"):
        against = f"points against {last['difference']['baseline']}, p {_p(last)}"
        cards.append((fig.signed(last["difference"]["mean"]), against))
    cards.append((f"{len(summary['classes'])}", f"classes, {arms[0]['n_real']:,} real images"))
    return join(
        tag("h1", "What the synthetic images do for the classifier"),
        tag("p", fig.protocol_line(summary) + ".", class_="lead"),
        tag("div", *(tag("div", tag("b", b), tag("span", s), class_="card") for b, s in cards),
            class_="cards"),
    )  # fmt: skip


def _p(arm: Row) -> str:
    p = fig.p_value(arm)
    return p if p.startswith("<") else f"= {p}" if p != "–" else "unknown"


def _result(summary: Row, colours: Mapping[str, int]) -> Markup:
    baseline = summary["protocol"]["baseline"]
    head = ["arm", "images", "accuracy", f"against {baseline}", "p", "worst class", "ECE"]
    parts: list[Markup] = []
    for arch, arms in _by_arch(summary).items():
        rows = [
            [_swatch(arm["name"], c), fig.images(arm), fig.mean_std(arm["accuracy"]),
             fig.difference(arm), fig.p_value(arm), fig.mean_std(arm["worst_class"]),
             fig.percent(arm["ece"]["mean"])]
            for arm, c in zip(arms, _arm_colours(arms, colours), strict=True)
        ]  # fmt: skip
        parts += [table(head, rows, arch), plots.accuracy_plot(arms, _arm_colours(arms, colours))]
    note = (
        "Test accuracy in per cent, mean and standard deviation over seeds. Differences are paired "
        "by seed, with Student's 95 % interval: they cover the randomness of training, not the "
        "draw of the images."
    )
    if line := fig.comparisons_line(summary):
        note = f"{note} {line}."
    return section("Result", *parts, note=note)


def _swatch(name: str, colour: int) -> Markup:
    dot = tag("span", class_="swatch", style=f"background: var(--c{colour})")
    return join(dot, printable(name))


def _per_class(summary: Row, colours: Mapping[str, int]) -> Markup:
    largest = max(summary["protocol"]["times"], default=None)
    arms = [a for a in next(iter(_by_arch(summary).values())) if a["times"] in (None, largest)]
    plot = plots.per_class_plot(arms, _arm_colours(arms, colours))
    note = "Square: real only. Diamond: synthetic alone. Full circle: joined with real."
    return section("Classes", plot, note=note)


def _volume(summary: Row, colours: dict[str, int]) -> Markup | None:
    if len(summary["protocol"]["times"]) < 2:
        return None
    arms = next(iter(_by_arch(summary).values()))
    return section("Accuracy against volume", plots.volume_plot(arms, colours))


def _why(summary: Row, extras: Extras, colours: dict[str, int]) -> Markup | None:
    judged = {n: s for n, s in summary["synthetic"].items() if "distribution" in s}
    if not judged:
        return None
    some = next(iter(judged.values()))["distribution"]
    influence = [
        [_swatch(n, colours[n]), fig.share(s["influence"]), fig.null_share(s["influence"]),
         fig.percent(s["agreement"])]
        for n, s in judged.items()
    ]  # fmt: skip
    distribution = [
        [_swatch(n, colours[n])]
        + [f"{s['distribution'][k]:.2f}" for k in ("precision", "recall", "density", "coverage")]
        + [_number(s["distribution"]["diversity"]), f"{s['distribution']['kid']['mean']:.3f}",
           f"{s['distribution']['fid']:.1f}"]
        for n, s in judged.items()
    ]  # fmt: skip
    note = (
        f"As seen by {some['extractor']}, beside {some['n_real']} validation images (precision to "
        f"FID: {some['n_synthetic']} images of each set). Positive "
        "influence: share of the images that would lower the validation loss, with a bootstrap "
        "interval; labels shuffled among the images give the null. Agreement: the classifiers "
        "trained on real images see the label. Diversity: spread within a class over that of real "
        f"images. FID and KID are in these features, {some['n_real']} real images: compare sets, "
        "not papers."
    )
    return section(
        "Why",
        table(["set", "positive influence, %", "shuffled labels, %", "agreement, %"], influence),
        table(["set", "precision", "recall", "density", "coverage", "diversity", "KID", "FID"],
              distribution),
        plots.scatter_plot(extras.scatter, colours) if extras.scatter else None,
        note=note,
    )  # fmt: skip


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _value(value: Row | None) -> Markup | None:
    if value is None:
        return None
    auroc, curve = value["canary"]["auroc"], value.get("weight_curve")
    told = None
    if auroc is not None:
        told = tag(
            "p", "Canary: real images score lower under a false label than under their own with "
            f"AUROC {auroc:.3f}.", class_="warn" if auroc < 0.9 else None,
        )  # fmt: skip
    plot = None
    if curve:
        plot = plots.curve_plot(curve["loss"], curve["weight"], "loss of a sample",
                                "learned weight", "Learned weight")  # fmt: skip
    if told is None and plot is None:
        return None
    return section("The learned weight function", told, plot,
                   note="Weight that the value model gives a sample, over its loss.")  # fmt: skip


def _sheet(name: str, sheets: list[ClassSheet]) -> Markup:
    count = sum(s.count for s in sheets)
    note = f"{IMAGES_A_CLASS} images a class of {count:,}; point at one for its key and utility."
    return section(f"Utility in {printable(name)}", high_low_sheet(sheets), note=note)


def _pairs(extras: Extras) -> Markup | None:
    if not extras.pairs:
        return None
    first, last = map(printable, extras.pair_names)
    return section("Before and after", pair_list(extras.pairs, extras.pair_names),
                   note=f"The same key in {first} and {last}.")  # fmt: skip


def _cost(summary: Row) -> Markup:
    price = summary["protocol"]["price_per_hour"]
    rows: list[list[object]] = []
    for name, s in summary["synthetic"].items():
        for stage in s["cost"]["stages"]:
            money = [] if price is None else [f"{stage['seconds'] / 3600 * price:.4f}"]
            rows.append([_stage(name, stage["command"]), fig.duration(stage["seconds"]),
                         f"{stage['images']:,}", *money])  # fmt: skip
    for arm in summary["arms"]:
        seconds = arm["train_seconds"]["mean"]
        money = [] if price is None else [f"{seconds / 3600 * price:.4f}"]
        rows.append([_stage("training", f"{arm['name']}, {arm['arch']}"), fig.duration(seconds),
                     "–", *money])  # fmt: skip
    head = ["stage", "time", "images", *([] if price is None else ["price"])]
    note = "Stages that wrote the synthetic shards, from their statistics; training per seed."
    return section("Cost", table(head, rows), note=note)


def _stage(name: str, what: str) -> Markup:
    return join(printable(name), ": ", tag("span", printable(what), class_="muted"))


def _leaks(summary: Row) -> Markup:
    rows = [
        [printable(name), leak["n"], leak["same_key"], leak["same_pixels"], leak["near"],
         f"{leak['closest']:.3f}"]
        for name, leak in summary["leaks"].items()
    ]  # fmt: skip
    head = ["set", "images", "same key", "same pixels", "nearly the same", "closest"]
    note = (
        "Test images found in other sets: by key, by pixels, and by the distance of grey "
        "thumbnails (mirrored ones included). None of it was used for training or selection."
    )
    return section("Leak check", table(head, rows), note=note)


def _protocol(summary: Row) -> Markup:
    facts = {k: v for k, v in summary["protocol"].items() if k != "train"}
    facts |= summary["protocol"]["train"]
    facts["test set, SHA-256"] = summary["data"]["test"]["sha256"]
    items = [
        join(tag("dt", name.replace("_", " ")), tag("dd", printable(_plain(value))))
        for name, value in facts.items()
    ]
    return section("Protocol", tag("dl", *items))


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def prepare_report(path: Path) -> None:
    """Make the report's directory before the work. UsageError: a file stands in its place."""
    page = _is_page(path)
    if path.suffix and not page and not path.is_dir():
        raise UsageError(f"--report {path}", "is no page", "Name PAGE.html or a directory.")
    directory = path.parent if page else path
    if path.is_dir() if page else path.is_file():
        why = "is a directory" if page else "is a file, and no page (.html)"
        raise UsageError(f"--report {path}", why, "Name PAGE.html or a directory.")
    directory.mkdir(parents=True, exist_ok=True)
    if not os.access(directory, os.W_OK):
        raise UsageError(f"--report {path}", "cannot be written", "Name a place you can write.")


def _is_page(path: Path) -> bool:
    return path.suffix in (".html", ".htm")


def write_report(
    path: Path, found: Comparison, shown: Mapping[str, Source], value: Row | None = None
) -> Path:
    """Write the page to `path` (PAGE.html), or report.html and eval.json into the directory `path`.

    `shown`: where the images of each synthetic set are read from, in the order of the sets.
    """
    names = list(shown)
    ends = (names[0], names[-1]) if len(names) > 1 else ("", "")
    pairs = (shown[ends[0]].samples(), shown[ends[1]].samples()) if len(names) > 1 else None
    scored = {name: source.samples() for name, source in shown.items()}
    extras = gather(scored, pairs, ends, found.influence, value)
    target = path if _is_page(path) else path / "report.html"
    write_atomic(target, evaluation_page(found.summary, extras).encode())
    if target is not path:
        write_json(path / "eval.json", found.summary)
    return target
