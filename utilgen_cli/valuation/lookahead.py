"""What a *set* is worth: the drop in validation loss after a short fine-tune with it.

A function of single losses cannot see redundancy: a hundred copies of one good image look like a
hundred good images. Fine-tuning the current classifier on real + set sees it.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..classification.data import LabelledImages
from ..classification.models import Classifier
from ..classification.train import TrainConfig, predict, train_classifier
from ..runtime.progress import Progress, silent
from .value_model import ValueModel


@dataclass(frozen=True)
class Lookahead:
    """Validation losses after fine-tuning on real images alone and with the set."""

    without: float
    with_set: float
    standard_error: float  # of the gain, over classifiers

    @property
    def gain(self) -> float:
        """Drop in validation loss that the set brings; positive is good."""
        return self.without - self.with_set


def trainable_copy(model: Classifier) -> Classifier:
    """A copy that takes gradients, but for a tower that was frozen when the model was trained."""
    copied = copy.deepcopy(model)
    frozen = model.frozen
    for name, p in copied.named_parameters():
        p.requires_grad_(not frozen or name.startswith("head.") or "lora_" in name)
    return copied


def fine_tuned_loss(
    model: Classifier, real: LabelledImages, extra: LabelledImages | None,
    validation: LabelledImages, *, steps: int, lr: float, seed: int,
) -> float:  # fmt: skip
    """Validation loss of a copy of `model` after `steps` steps on real (and extra) images."""
    config = TrainConfig(steps=steps, lr=lr, warmup=0.0)
    tuned = trainable_copy(model).train()
    train_classifier(tuned, real, config, seed=seed, mix=real if extra is None else extra)
    logits = predict(tuned, validation.images)
    return float(nn.functional.cross_entropy(logits, validation.labels))


def lookahead(
    value: ValueModel,
    real: LabelledImages,
    candidates: LabelledImages,
    validation: LabelledImages,
    *,
    steps: int = 60,
    lr: float = 5e-4,
    seed: int = 0,
    progress: Progress = silent,
) -> Lookahead:
    """Value a set by every classifier of `value`, each on real images held out from it.

    One half of every batch is the same real images in both runs of a classifier, so that noise
    cancels in the gain; the other half is the set, or more real images.
    """
    return lookaheads(
        value, real, [candidates], validation, steps=steps, lr=lr, seed=seed, progress=progress
    )[0]


def lookaheads(
    value: ValueModel,
    real: LabelledImages,
    sets: Sequence[LabelledImages],
    validation: LabelledImages,
    *,
    steps: int = 60,
    lr: float = 5e-4,
    seed: int = 0,
    progress: Progress = silent,
) -> list[Lookahead]:
    """Value several sets: the runs on real images alone are made once and serve them all."""
    extras: list[LabelledImages | None] = [None, *sets]
    losses = []  # of every classifier: first without a set, then with each
    with progress("lookahead", len(value.classifiers) * len(extras)) as task:
        for k, classifier in enumerate(value.classifiers):
            train, held = held_out(value, k, real, validation)
            row = []
            for extra in extras:
                row.append(
                    fine_tuned_loss(classifier, train, extra, held, steps=steps, lr=lr, seed=seed)
                )
                task.advance(gain=row[0] - row[-1])
            losses.append(row)
    return [_summary([(row[0], row[1 + i]) for row in losses]) for i in range(len(sets))]


def _summary(pairs: list[tuple[float, float]]) -> Lookahead:
    gains = [before - after for before, after in pairs]
    error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
    without, with_set = (statistics.fmean(column) for column in zip(*pairs, strict=True))
    return Lookahead(without, with_set, error)


def held_out(
    value: ValueModel, fold: int, real: LabelledImages, validation: LabelledImages
) -> tuple[LabelledImages, LabelledImages]:
    """(training, validation) images for classifier `fold`: it is never judged on what it knows."""
    seen = [value.held_out_folds(data.images) for data in (real, validation)]
    if value.folds == 1:
        return real, validation
    at = torch.nonzero((seen[1] == fold) | (seen[1] < 0))[:, 0]
    kept: Tensor = torch.nonzero(seen[0] != fold)[:, 0]
    return real.subset(kept), validation.subset(at if len(at) else range(len(validation)))
