"""`compare_arms`: from shards to the versioned result of `utilgen eval`."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from .. import __version__
from ..runtime.errors import UsageError
from ..runtime.output import OutputDirectory
from ..runtime.progress import Progress, silent
from ..shards.operands import refuse_shared
from .analysis import Analyst
from .arms import REAL, Arm, build_arms, digest_images, digest_shards
from .batches import stored_side
from .cost import generation_cost
from .data import LabelledImages, agree, check_labels, load_images
from .evaluation import Run, Trainer, judge_runs, plan_runs, results, train_runs
from .leaks import Prints, find_leaks, pixel_digests
from .summary import summarise
from .team import Team
from .towers import Towers
from .train import TrainConfig

if TYPE_CHECKING:
    from ..shards.operands import Source

SCHEMA = "utilgen.eval/1"
APART = "Divide the images, e.g. by `utilgen pack --without`."


@dataclass
class Inputs:
    """Where the images lie."""

    real: Source
    synthetic: Mapping[str, Source]
    test: Source
    validation: Source | None = None


@dataclass
class Protocol:
    """How the arms are compared."""

    config: TrainConfig
    archs: Sequence[str] = ("small-cnn",)
    seeds: int = 5
    first_seed: int = 0
    image_size: int = 32
    times: Sequence[float] = ()
    baseline: str = "real"
    validation_as_train: bool = False
    pretrained: bool = False
    price_per_hour: float | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    workers: int = 0
    data_parallel: bool = False

    def __post_init__(self) -> None:
        self.archs = list(dict.fromkeys(self.archs))  # one that is named twice is compared once
        self.times = list(dict.fromkeys(self.times))


@dataclass
class Comparison:
    """`summary` is what `--json` prints; `influence` has the value of each key of each set."""

    summary: dict[str, Any]
    influence: dict[str, dict[str, float]]


def compare_arms(
    inputs: Inputs,
    protocol: Protocol,
    directory: Path | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Comparison | None:
    """Train all arms, look at the synthetic sets, and only then test each classifier once.

    With `directory` every finished run is kept, and a stopped evaluation goes on there. The
    directory is bound to the test set by its hash: it never mixes the results of two. Under
    torchrun the processes share the runs out, or with `data_parallel` every batch; all but the
    first return None.
    """
    _refuse_shared(inputs, protocol)
    team = Team.join(directory)
    with ExitStack() as stack:
        test_hash = digest_shards(inputs.test.shards())
        if directory is None:
            directory = Path(stack.enter_context(TemporaryDirectory(prefix="utilgen-eval-")))
        elif team.rank == 0:
            stack.enter_context(OutputDirectory(directory, "eval", {"test": test_hash}, overwrite))
        return _compare(inputs, protocol, directory, test_hash, team, progress)


def _compare(
    inputs: Inputs, protocol: Protocol, directory: Path, test_hash: str, team: Team,
    progress: Progress,
) -> Comparison | None:  # fmt: skip
    size = protocol.image_size
    side = stored_side(protocol.config.augmentation, size)
    real = load_images(inputs.real, side, progress=progress)
    load = partial(load_images, size=side, like=real, progress=progress)
    validation = load(inputs.validation) if inputs.validation else None
    synthetic = {name: load(source) for name, source in inputs.synthetic.items()}
    loaded = [data for data in (real, validation, *synthetic.values()) if data is not None]
    agree(loaded)
    agree(loaded, check_labels(inputs.test, real))
    _check_protocol(protocol, validation, team)
    if synthetic:
        _check_share(protocol.config)
    if validation is not None:
        _check_sizes({"--val": validation, **synthetic})
    as_train = validation if protocol.validation_as_train else None
    arms = build_arms(real, synthetic, as_train, protocol.times)
    _check_baseline(protocol.baseline, arms)
    together = team.size if protocol.data_parallel else 1
    runs, probes = _plan(protocol, arms, real, validation, together)
    towers = Towers(protocol.device)
    trainer = Trainer(
        protocol.config, size, towers, protocol.pretrained, validation, protocol.workers, team,
        together > 1,
    )  # fmt: skip
    team.wait()  # the first process holds the directory now
    keep = frozenset(run.name for run in probes)
    train_runs([*runs, *probes], trainer, directory, keep, progress)
    team.part()
    if team.rank:
        return None
    analyses = {}
    if validation is not None:
        analyst = Analyst(probes, directory, real, validation, towers)
        count = min(map(len, synthetic.values()), default=None)  # distances depend on how many
        analyses = {name: analyst.analyse(data, count) for name, data in synthetic.items()}
    # Nothing below trains or chooses: the test set is opened here, once.
    test = load(inputs.test)
    judge_runs(runs, test, directory, towers, keep, progress)
    prints = Prints.of(test)
    sets = {"real": real, "validation": validation, **synthetic}
    leaks = {name: find_leaks(data, prints) for name, data in sets.items() if data is not None}
    influence = {
        name: dict(zip(synthetic[name].keys, a["influence"].pop("values"), strict=True))
        for name, a in analyses.items()
    }
    summary = {
        "schema": SCHEMA,
        "utilgen": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "protocol": _protocol_facts(protocol) | {"processes_a_run": together},
        "data": _data_facts(inputs, {**sets, "test": test}, test_hash),
        "leaks": leaks,
        **summarise(list(results(runs, directory)), real.classes, protocol.baseline),
        "synthetic": _synthetic_facts(inputs, synthetic, analyses, protocol.price_per_hour),
    }
    return Comparison(json.loads(json.dumps(summary)), influence)


def _plan(
    protocol: Protocol,
    arms: list[Arm],
    real: LabelledImages,
    validation: LabelledImages | None,
    together: int,
) -> tuple[list[Run], list[Run]]:
    """The runs of the table, and the probes: real-trained classifiers of the first architecture."""
    context = {"size": protocol.image_size, "pretrained": protocol.pretrained,
               "device": protocol.device.type}  # fmt: skip
    if together > 1:
        context["processes"] = together  # batch norm sees the parts
    if validation is not None and protocol.config.validate_every:
        context["selected on"] = digest_images(validation)
    seeds = range(protocol.first_seed, protocol.first_seed + protocol.seeds)
    runs = plan_runs(arms, protocol.archs, seeds, protocol.config, context)
    probe = Arm("real", REAL, real)
    probes = plan_runs([probe], protocol.archs[:1], seeds, protocol.config, context)
    return runs, probes


def _check_protocol(protocol: Protocol, validation: LabelledImages | None, team: Team) -> None:
    if protocol.data_parallel and protocol.config.batch_size < 2 * team.size:
        raise UsageError(
            f"--batch-size {protocol.config.batch_size}", f"too few for {team.size} processes",
            f"Use at least {2 * team.size}, or leave out --data-parallel.",
        )  # fmt: skip
    if protocol.config.validate_every > protocol.config.steps:
        raise UsageError(
            f"--validate-every {protocol.config.validate_every}",
            f"never comes in {protocol.config.steps} steps", "Use a smaller one.",
        )  # fmt: skip
    if protocol.config.validate_every and validation is None:
        raise UsageError("--validate-every", "needs --val", "Name the validation shards.")
    if protocol.config.validate_every and protocol.validation_as_train:
        raise UsageError(
            "--validate-every", "cannot select on validation images that are trained on",
            "Leave out one of --validate-every and --val-as-train.",
        )  # fmt: skip
    if protocol.validation_as_train and validation is None:
        raise UsageError("--val-as-train", "needs --val", "Name the validation shards.")


def _refuse_shared(inputs: Inputs, protocol: Protocol) -> None:
    """Nothing is tested or validated on images that it is trained on, or tested on those that it is
    selected by."""
    real, test = ("--real", inputs.real), ("--test", inputs.test)
    trained = [
        real,
        *((f"--synthetic {name}", source) for name, source in inputs.synthetic.items()),
    ]
    if inputs.validation is not None:
        validation = ("--val", inputs.validation)
        refuse_shared(validation, real, APART)
        if protocol.validation_as_train or protocol.config.validate_every:
            trained.append(validation)
    for each in trained:
        refuse_shared(test, each, APART)


def _check_share(config: TrainConfig) -> None:
    share, size = config.real_share, config.batch_size
    if 0 < share < 1 and round(share * size) in (0, size):
        raise UsageError(
            f"--real-share {share:g}", f"leaves one side out of batches of {size}",
            "Use larger batches, or another share.",
        )  # fmt: skip


def _check_sizes(sets: Mapping[str, LabelledImages]) -> None:
    """Before any training: between single images there are no distances to compare."""
    for name, data in sets.items():
        if len(data) < 2:
            raise UsageError(name, "has a single image, and sets are compared with --val",
                             "Add images, or leave out --val.")  # fmt: skip


def _check_baseline(baseline: str, arms: Sequence[Arm]) -> None:
    names = [arm.name for arm in arms]
    if baseline not in names:
        raise UsageError(f"--baseline {baseline}", "no such arm", f"Arms: {', '.join(names)}.")


def _protocol_facts(protocol: Protocol) -> dict[str, Any]:
    selected = f"best of every {protocol.config.validate_every} steps on validation"
    return {
        "archs": list(protocol.archs),
        "seeds": protocol.seeds,
        "first_seed": protocol.first_seed,
        "image_size": protocol.image_size,
        "times": list(protocol.times),
        "baseline": protocol.baseline,
        "validation_as_train": protocol.validation_as_train,
        "pretrained": protocol.pretrained,
        "selection": selected if protocol.config.validate_every else "last step",
        "price_per_hour": protocol.price_per_hour,
        "device": str(protocol.device),
        "train": protocol.config.facts(),
    }


def _data_facts(
    inputs: Inputs, sets: Mapping[str, LabelledImages | None], test_hash: str
) -> dict[str, Any]:
    sources = {"real": inputs.real, "validation": inputs.validation, **inputs.synthetic}
    hashes = {name: digest_shards(s.shards()) for name, s in sources.items() if s is not None}
    facts: dict[str, Any] = {
        name: {
            "images": len(data),
            "per_class": torch.bincount(data.labels, minlength=len(data.classes)).tolist(),
            "sha256": test_hash if name == "test" else hashes[name],
        }
        for name, data in sets.items()
        if data is not None
    }
    real, validation = sets["real"], sets["validation"]
    if real is not None and validation is not None:
        known = set(pixel_digests(real.images))
        twice = sum(digest in known for digest in pixel_digests(validation.images))
        facts["validation"]["also_real"] = twice
    return facts


def _synthetic_facts(
    inputs: Inputs,
    synthetic: Mapping[str, LabelledImages],
    analyses: Mapping[str, dict[str, Any]],
    price: float | None,
) -> dict[str, Any]:
    cost = {n: generation_cost(inputs.synthetic[n].shards(), price) for n in synthetic}
    return {name: {**analyses.get(name, {}), "cost": cost[name]} for name in synthetic}
