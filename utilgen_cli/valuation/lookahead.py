"""What a *set* is worth: the drop in validation loss when a classifier is trained with it.

A function of single losses cannot see redundancy: a hundred copies of one good image look like a
hundred good images. Training on real + set sees it. The classifiers start anew: a short fine-tune
of the value model's own, which have converged on the real images, ranked sets worse (Spearman .64
and .63 against .82 and .90 on two draws of 25 pools, at the same cost).
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from ..classification.data import LabelledImages
from ..classification.models import Classifier, build_classifier
from ..classification.train import TrainConfig, predict, train_classifier
from ..runtime.progress import Progress, silent
from ..runtime.seeds import derive_seed
from .todv import ValueConfig
from .value_model import ValueModel

STEPS, REPEATS = 100, 3


@dataclass(frozen=True)
class Outcome:
    """Of a trained classifier on the validation images: loss, and share of right predictions."""

    loss: float
    accuracy: float


@dataclass(frozen=True)
class Lookahead:
    """Means over the classifiers trained on real images alone and with the set."""

    without: Outcome
    with_set: Outcome
    standard_error: float  # of the gain, over classifiers

    @property
    def gain(self) -> float:
        """Drop in validation loss that the set brings; positive is good."""
        return self.without.loss - self.with_set.loss

    @property
    def accuracy_gain(self) -> float:
        """What it adds to the share of right predictions."""
        return self.with_set.accuracy - self.without.accuracy


def lookahead(
    value: ValueModel,
    real: LabelledImages,
    candidates: LabelledImages,
    validation: LabelledImages,
    *,
    steps: int = STEPS,
    repeats: int = REPEATS,
    seed: int = 0,
    progress: Progress = silent,
) -> Lookahead:
    """Value a set by `repeats` pairs of classifiers of the value model's architecture.

    The two of a pair start alike and see the same real images in one half of every batch, so that
    noise cancels in the gain; the other half is the set, or more real images.
    """
    return lookaheads(
        value, real, [candidates], validation, steps=steps, repeats=repeats, seed=seed,
        progress=progress,
    )[0]  # fmt: skip


def lookaheads(
    value: ValueModel,
    real: LabelledImages,
    sets: Sequence[LabelledImages],
    validation: LabelledImages,
    *,
    steps: int = STEPS,
    repeats: int = REPEATS,
    seed: int = 0,
    progress: Progress = silent,
) -> list[Lookahead]:
    """Value several sets: the classifiers of real images alone are trained once and serve all."""
    mixes = [real, *sets]
    rows = []  # of every repeat: first without a set, then with each
    with progress("lookahead", repeats * len(mixes)) as task:
        for number in range(repeats):
            own = derive_seed("lookahead", seed, number)
            start, config = _start(value, own, steps)
            row: list[Outcome] = []
            for mix in mixes:
                model = copy.deepcopy(start)
                train_classifier(model, real, config, seed=own, mix=mix)
                row.append(_tested(model, validation))
                task.advance(gain=row[0].loss - row[-1].loss)
            rows.append(row)
    return [_summary([(row[0], row[1 + i]) for row in rows]) for i in range(len(sets))]


def _start(value: ValueModel, seed: int, steps: int) -> tuple[Classifier, TrainConfig]:
    """A classifier as `value train` begins with, and how it is trained."""
    config = ValueConfig(**value.facts["config"])
    model = build_classifier(
        config.arch, len(value.classes), value.size, config.pretrained, seed, value.classifiers[0]
    )
    return model.to(value.device), replace(config.inner(), steps=steps)


def _tested(model: Classifier, data: LabelledImages) -> Outcome:
    logits = predict(model, data.images)
    loss = float(nn.functional.cross_entropy(logits, data.labels))
    return Outcome(loss, float((logits.argmax(1) == data.labels).float().mean()))


def _summary(pairs: list[tuple[Outcome, Outcome]]) -> Lookahead:
    gains = [before.loss - after.loss for before, after in pairs]
    error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
    without, with_set = (_mean(side) for side in zip(*pairs, strict=True))
    return Lookahead(without, with_set, error)


def _mean(outcomes: Sequence[Outcome]) -> Outcome:
    losses, shares = zip(*((o.loss, o.accuracy) for o in outcomes), strict=True)
    return Outcome(statistics.fmean(losses), statistics.fmean(shares))
