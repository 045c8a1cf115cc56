"""Train every arm, then test each classifier once.

The order is the protection: `train_runs` gets arms and validation, never a test set; only when no
run is left to train is the test set opened, and `judge_runs` sees finished classifiers only.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..runtime import signals
from ..runtime.checkpoint import remove_checkpoint
from ..runtime.errors import UtilgenError
from ..runtime.files import write_json
from ..runtime.progress import Progress, silent
from .arms import Arm, digest_images
from .clip import has_named_weights, known_as
from .data import LabelledImages
from .metrics import score
from .models import Classifier, has_common_tower, save_classifier
from .team import Team
from .towers import Towers
from .train import TrainConfig, train_classifier


@dataclass(frozen=True)
class Run:
    """One classifier of the comparison. `name` is also the stem of its files: content-addressed."""

    arm: Arm
    arch: str
    seed: int
    name: str


def plan_runs(
    arms: Sequence[Arm],
    archs: Sequence[str],
    seeds: Sequence[int],
    config: TrainConfig,
    context: dict[str, Any],
) -> list[Run]:
    """All runs, seed by seed, so that a stopped evaluation has whole comparisons.

    A run's name holds a digest of all that decides its weights (data, architecture, seed,
    configuration, `context`): a finished one is found again, and a changed one never is.
    """  # fmt: skip
    digests = {arm.name: _arm_digest(arm) for arm in arms}
    # what was trained before heads were drawn from their seed alone has another name
    known = {arch: known_as(arch) + " head 2" * has_common_tower(arch) for arch in archs}
    runs = []
    for seed in seeds:
        for arch in archs:
            for arm in arms:
                facts = [digests[arm.name], known[arch], seed, config.facts(), context]
                code = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
                runs.append(Run(arm, arch, seed, f"{_plain(arm.name)}-{seed}-{code[:16]}"))
    return runs


def _arm_digest(arm: Arm) -> list[str]:
    return [digest_images(part) for part in (arm.data, arm.mix) if part is not None]


def _plain(name: str) -> str:
    return "".join(c if c.isascii() and c.isalnum() else "_" for c in name)


@dataclass
class Trainer:
    """Everything that the runs of one evaluation share."""

    config: TrainConfig
    image_size: int
    towers: Towers
    pretrained: bool = False
    validation: LabelledImages | None = None  # for selection only
    workers: int = 0
    team: Team = field(default_factory=Team)
    together: bool = False  # the team trains every run, and does not share the runs out

    def train(
        self, run: Run, checkpoint: Path | None = None, progress: Progress = silent
    ) -> tuple[Classifier, dict[str, Any]]:
        """A trained classifier and the facts of its training."""
        model = self.towers.build(
            run.arch, len(run.arm.data.classes), self.image_size, self.pretrained, run.seed
        )
        result = train_classifier(
            model, run.arm.data, self.config, seed=run.seed, mix=run.arm.mix,
            validation=self.validation, checkpoint=checkpoint, workers=self.workers,
            together=self.together, see=self.towers.features, progress=progress,
        )  # fmt: skip
        if not math.isfinite(result.loss):
            raise UtilgenError(
                f"arm {run.arm.name}, {run.arch}, seed {run.seed}", "its loss is not finite",
                "Lower --lr.",
            )  # fmt: skip
        facts = {"seconds": round(result.seconds, 3), "steps": result.steps,
                 "selected_step": result.selected_step, "train_loss": result.loss}  # fmt: skip
        return model, facts


def train_runs(
    runs: Sequence[Run], trainer: Trainer, directory: Path, keep: frozenset[str] = frozenset(),
    progress: Progress = silent,
) -> None:  # fmt: skip
    """Train what has neither a result nor a saved classifier yet; stop where a signal asks to.

    What is in `keep` is trained unless its classifier is there: it is looked into, not only tested.
    """
    unique = list({run.name: run for run in runs}.values())  # a probe is often the real arm itself
    mine = unique if trainer.together else trainer.team.share(unique)
    writes = not trainer.together or trainer.team.rank == 0
    missing = [
        run
        for run in mine
        if not is_trained(directory, run)
        or (run.name in keep and not weights_path(directory, run).exists())
    ]
    left = {run.name for run in missing}
    for run in mine if writes else ():
        if run.name not in left:  # a kill may have come before this was done
            remove_checkpoint(checkpoint_path(directory, run))
    with progress("train arms", len(missing)) as task:
        for run in missing:
            signals.check()
            checkpoint = checkpoint_path(directory, run)
            model, facts = trainer.train(run, checkpoint)
            if writes:
                whole = run.name in keep or not has_named_weights(run.arch)
                save_classifier(weights_path(directory, run), model, whole)
                write_json(facts_path(directory, run), facts)
                remove_checkpoint(checkpoint)
            task.advance(1, arm=run.arm.name, seed=str(run.seed))
    signals.check()


def is_trained(directory: Path, run: Run) -> bool:
    """True if the run's classifier, or the result of testing it, is there."""
    return result_path(directory, run).exists() or facts_path(directory, run).exists()


def judge_runs(
    runs: Sequence[Run],
    test: LabelledImages,
    directory: Path,
    towers: Towers,
    keep: frozenset[str] = frozenset(),
    progress: Progress = silent,
) -> None:
    """Test each trained classifier once and write its result; only weights in `keep` stay."""
    missing = [run for run in runs if not result_path(directory, run).exists()]
    with progress("test arms", len(missing)) as task:
        for run in missing:
            path, size = weights_path(directory, run), test.images.shape[-1]
            model = towers.load(path, run.arch, len(test.classes), size)
            found = score(towers.predict(model, test.images), test.labels, len(test.classes))
            facts = json.loads(facts_path(directory, run).read_text())
            write_json(result_path(directory, run), {**facts, **found, "n_test": len(test)})
            task.advance()
            _tidy(directory, run, keep)
    for run in runs:
        _tidy(directory, run, keep)  # where an earlier call was ended before it could


def _tidy(directory: Path, run: Run, keep: frozenset[str]) -> None:
    """Remove what a tested run needs no more; its facts last, so that what is left is seen."""
    if facts_path(directory, run).exists():
        if run.name not in keep:
            weights_path(directory, run).unlink(missing_ok=True)
        facts_path(directory, run).unlink()


def results(runs: Sequence[Run], directory: Path) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Each run with its result."""
    for run in runs:
        yield run, json.loads(result_path(directory, run).read_text())


def result_path(directory: Path, run: Run) -> Path:
    """Where the figures of a tested run lie."""
    return directory / f"{run.name}.json"


def facts_path(directory: Path, run: Run) -> Path:
    """Where the facts of a trained run lie until it is tested; written after the weights."""
    return directory / f"{run.name}.trained.json"


def checkpoint_path(directory: Path, run: Run) -> Path:
    """Where the state of a run's training lies until it is trained."""
    return directory / f"{run.name}.checkpoint.safetensors"


def weights_path(directory: Path, run: Run) -> Path:
    """Where the classifier of a run lies."""
    return directory / f"{run.name}.safetensors"
