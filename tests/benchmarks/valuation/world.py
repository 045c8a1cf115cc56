"""Fashion-MNIST for the benchmarks: 16 x 16 pixels, few clean shots, a large pool, a test set."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor

from utilgen_cli.classification.data import LabelledImages
from utilgen_cli.classification.models import build_classifier
from utilgen_cli.classification.train import TrainConfig, predict, train_classifier
from utilgen_cli.valuation.training import ValueData

sys.path.append(str(Path(__file__).parents[3] / "examples" / "tiny"))
SIZE, SHOTS, POOL, TEST = 16, 16, 2000, 5000
PAIRS = {0: 6, 6: 0, 2: 4, 4: 2, 5: 7, 7: 5, 3: 1, 1: 3, 8: 9, 9: 8}  # what looks alike


@dataclass
class World:
    """16 + 16 clean shots a class, POOL other images, and images that are only tested on."""

    real: LabelledImages
    validation: LabelledImages
    pool: LabelledImages
    test: LabelledImages

    @property
    def clean(self) -> LabelledImages:
        """All clean shots: what every side of a comparison may use."""
        return join(self.real, self.validation)


@cache
def shrunk(part: str, size: int = SIZE) -> LabelledImages:
    """One part of Fashion-MNIST at `size` pixels."""
    from fashion import CLASSES, load

    images, labels = load(part)
    small = F.avg_pool2d(images[:, None].float(), 32 // size).round().to(torch.uint8)
    keys = [f"{part}-{i}" for i in range(len(labels))]
    return LabelledImages(small.expand(-1, 3, -1, -1), labels, keys, list(CLASSES))


def make_world(seed: int, pool: int = POOL) -> World:
    """The sets of one seed; they do not overlap."""
    data, test = shrunk("train"), shrunk("t10k").subset(range(TEST))
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    y = data.labels[order]
    at = torch.stack([order[y == c][: 2 * SHOTS] for c in range(10)])
    rest = order[~torch.isin(order, at)][:pool]
    real, validation = (data.subset(at[:, i : i + SHOTS].flatten()) for i in (0, SHOTS))
    return World(real, validation, data.subset(rest), test)


def join(*sets: LabelledImages) -> LabelledImages:
    """The sets one after the other."""
    from utilgen_cli.classification.data import concatenate

    return concatenate(sets)


def corrupt(data: LabelledImages, kind: str, seed: int) -> tuple[LabelledImages, Tensor]:
    """The set with some labels wrong, and which are: `uniform 20 %`, `pairs 20 %`..."""
    name, share = kind.split()[0], float(kind.split()[1]) / 100
    generator = torch.Generator().manual_seed(1000 + seed)
    wrong = torch.zeros(len(data), dtype=torch.bool)
    wrong[torch.randperm(len(data), generator=generator)[: round(share * len(data))]] = True
    shift = torch.randint(1, 10, (len(data),), generator=generator)
    partner = torch.tensor([PAIRS[c] for c in range(10)])[data.labels]
    other = partner if name == "pairs" else (data.labels + shift) % 10
    return replace(data, labels=torch.where(wrong, other, data.labels)), wrong


def value_data(world: World, pool: LabelledImages) -> ValueData:
    """The pool as what `value train` calls synthetic, beside the clean shots."""
    return ValueData(world.real, pool, world.validation)


def retrained(
    data: LabelledImages, seed: int, steps: int, mix: LabelledImages | None = None,
    augmentation: str = "pad",
) -> torch.nn.Module:  # fmt: skip
    """A small CNN trained from scratch."""
    model = build_classifier("small-cnn", len(data.classes), data.images.shape[-1], seed=seed)
    train_classifier(
        model, data, TrainConfig(steps=steps, augmentation=augmentation), seed=seed, mix=mix
    )
    return model


def accuracy(model: torch.nn.Module, data: LabelledImages) -> float:
    """Share of right predictions."""
    return float((predict(model, data.images).argmax(1) == data.labels).float().mean())


def pixels(data: LabelledImages) -> Tensor:
    """Grey levels in [0, 1], [N, S * S]."""
    return data.images[:, 0].flatten(1).float() / 255


def ceiling(first: np.ndarray, second: np.ndarray) -> float:
    """What a perfect value reaches against the mean of two noisy truths (Spearman and Brown)."""
    agreement = max(0.0, float(spearmanr(first, second).statistic))
    return float(np.sqrt(2 * agreement / (1 + agreement)))
