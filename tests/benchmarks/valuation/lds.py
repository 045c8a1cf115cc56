"""LDS: does the sum of values over a random half predict minus the test loss after training on it?"""

from __future__ import annotations

import os

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr

from utilgen_cli.classification.data import LabelledImages, to_float
from utilgen_cli.classification.models import Classifier, small_cnn_tower
from utilgen_cli.classification.train import TrainConfig, predict, train_classifier
from utilgen_cli.runtime.seeds import seed_modules

from ..store import Run, Store, spread, table
from .sides import PEERS, all_sides, peer
from .world import SIZE, ceiling, corrupt, make_world

TRAINING, HALVES, RETRAINS, STEPS = 500, 100, 2, 60
KIND = "uniform 20 %"
WIDTHS = (8, 16, 32)
CHECKPOINTS = 3  # that TRAK averages over


def narrow_cnn(data: LabelledImages, seed: int) -> Classifier:
    """The small CNN at a quarter of its width, trained on `data`."""
    with torch.random.fork_rng([]):
        seed_modules(seed)
        transform = {"size": SIZE, "mean": (0.5,) * 3, "std": (0.25,) * 3}
        model = Classifier("small-cnn", small_cnn_tower(WIDTHS), WIDTHS[-1], 10, transform)
    train_classifier(model, data, TrainConfig(steps=STEPS), seed=seed)
    return model


def minus_test_loss(model: Classifier, test: LabelledImages) -> float:
    return -float(F.cross_entropy(predict(model, test.images), test.labels))


def halves(seed: int) -> torch.Tensor:
    """Which training images each subset has, [HALVES, TRAINING]."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(HALVES, TRAINING, generator=generator)
    return draws.argsort(1) < TRAINING // 2


def trak_values(pool: LabelledImages, test: LabelledImages, seed: int) -> tuple[np.ndarray, float]:
    """TRAK on networks like those that are retrained, on test images."""
    weights = {}
    for number in range(CHECKPOINTS):
        state = narrow_cnn(pool, 10_000 + 10 * seed + number).state_dict()
        for name, tensor in state.items():
            part, _, rest = name.partition(".")
            index = rest if part == "tower" else f"5.{rest}"
            weights[f"{number}:{index}"] = tensor.numpy()
    few = test.subset(range(500))
    x, val = ((to_float(d.images).numpy() - 0.5) / 0.25 for d in (pool, few))
    return peer("trak", x=x, y=pool.labels.numpy(), val_x=val, val_y=few.labels.numpy(), **weights)


def one_seed(seed: int) -> Run:
    """Spearman correlation of every side, and the ceiling that the noise of retraining sets."""
    world = make_world(seed, TRAINING)
    pool, _ = corrupt(world.pool, KIND, seed)
    found, _ = all_sides(world, pool, seed)
    values = {name: v for name, (v, _) in found.items()}
    if PEERS in os.environ:
        values["dattri TRAK"] = trak_values(pool, world.test, seed)[0]
    members = halves(seed)
    truth = np.array([
        [
            minus_test_loss(narrow_cnn(pool.subset(torch.nonzero(m)[:, 0]), 100 * i + r), world.test)
            for r in range(RETRAINS)
        ]
        for i, m in enumerate(members)
    ])  # fmt: skip
    run = {
        n: float(spearmanr(members.numpy() @ v, truth.mean(1)).statistic) for n, v in values.items()
    }
    return {**run, "ceiling": ceiling(truth[:, 0], truth[:, 1])}


def lds_table(stores: dict[str, Store], seeds: int) -> str:
    """The table of LDS."""
    runs = [stores["lds"].get(f"seed {s}", lambda s=s: one_seed(s)) for s in range(seeds)]
    rows = [[name, spread([run[name] for run in runs])] for name in runs[0]]
    return table(["side", "Spearman"], rows)
