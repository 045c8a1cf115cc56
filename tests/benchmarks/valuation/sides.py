"""The ways to value a pool: ours through the library calls of `value train` and `value score`, the
literal Meta-Weight-Net, and the peers. All give one value an image, higher is better."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from utilgen_cli.classification.data import LabelledImages, to_float
from utilgen_cli.classification.train import extract_features, predict
from utilgen_cli.valuation.baselines import valuer
from utilgen_cli.valuation.todv import ValueConfig
from utilgen_cli.valuation.training import train_values
from utilgen_cli.valuation.value_model import ValueModel

from ..store import Stopwatch
from ..valuation_inversion import literal
from .world import World, join, pixels, retrained, value_data

PEERS = "UTILGEN_PEERS"  # the Python of the peers' environment
Values = dict[str, tuple[np.ndarray, float]]  # side -> values [N], CPU seconds


def value_model(
    world: World, pool: LabelledImages, seed: int, config: ValueConfig | None = None
) -> tuple[ValueModel, float]:
    """`value train --real --synthetic POOL --val` with the shipped defaults, and its seconds."""
    with tempfile.TemporaryDirectory() as name, Stopwatch() as watch:
        model = train_values(
            value_data(world, pool), config or ValueConfig(), Path(name), seed=seed
        )
    return model, watch.seconds


def ours(world: World, pool: LabelledImages, seed: int) -> tuple[Values, ValueModel]:
    """`value score` of the pool under three methods: one training serves all."""
    model, trained = value_model(world, pool, seed)
    found: Values = {}
    for method in ("weight-net", "knn-shapley", "influence"):
        with Stopwatch() as watch:
            judged = model.judge_pixels(pool.images, pool.labels)
            values = valuer(method, model)(judged, pool.labels).numpy()
        found[f"utilgen {method}"] = values, trained + watch.seconds
    return found, model


def literal_net(world: World, pool: LabelledImages, seed: int) -> Values:
    """The literal Meta-Weight-Net: in-sample losses, the last step's W."""
    with Stopwatch() as watch, torch.no_grad():
        with torch.enable_grad():
            model, net = literal(value_data(world, pool), seed)
        logits = model(to_float(pool.images))
        values = net(F.cross_entropy(logits, pool.labels, reduction="none")).numpy()
    return {"literal Meta-Weight-Net": (values, watch.seconds)}


def peer(method: str, **arrays: np.ndarray) -> tuple[np.ndarray, float]:
    """Values and CPU seconds of one call in the peers' environment."""
    values, seconds = peers(method, [arrays])
    return values[0], seconds


def peers(method: str, jobs: list[dict[str, np.ndarray]]) -> tuple[list[np.ndarray], float]:
    """Values of several calls in one process, and the CPU seconds of all."""
    with tempfile.TemporaryDirectory() as name:
        source, target = Path(name) / "in.npz", Path(name) / "out.npz"
        arrays = {f"{i}/{k}": a for i, job in enumerate(jobs) for k, a in job.items()}
        np.savez(source, **arrays)
        script = Path(__file__).with_name("peers.py")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [os.environ[PEERS], str(script), method, str(source), str(target)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{method}: {done.stderr[-2000:]}")
        with np.load(target) as found:
            return [found[str(i)] for i in range(len(jobs))], float(found["seconds"])


def clean_features(world: World, seed: int) -> tuple[torch.nn.Module, float]:
    """A small CNN trained on the clean shots: its features serve the peers."""
    with Stopwatch() as watch:
        model = retrained(world.clean, seed, steps=200)
    return model, watch.seconds


def knn_and_oob(world: World, pool: LabelledImages, seed: int) -> Values:
    """pyDVL's KNN-Shapley and Data-OOB, on pixels and on features; both get the clean shots."""
    model, trained = clean_features(world, seed)
    found: Values = {}
    for name, before in (("pixels", 0.0), ("features", trained)):
        x, val = (
            (pixels(d) if name == "pixels" else extract_features(model, d.images)).numpy()
            for d in (pool, world.clean)
        )
        y, val_y = pool.labels.numpy(), world.clean.labels.numpy()
        values, seconds = peer("knn-shapley", x=x, y=y, val_x=val, val_y=val_y)
        found[f"pyDVL KNN-Shapley, {name}"] = values, before + seconds
        both, both_y = np.concatenate([x, val]), np.concatenate([y, val_y])
        values, seconds = peer("data-oob", x=both, y=both_y, seed=np.array(seed))
        found[f"pyDVL Data-OOB, {name}"] = values[: len(y)], before + seconds
    return found


def cleanlab(world: World, pool: LabelledImages, seed: int, folds: int = 5) -> Values:
    """cleanlab on probabilities of small CNNs cross-validated on the pool and the clean shots."""
    probabilities = torch.zeros(len(pool), 10)
    fold = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed)) % folds
    with Stopwatch() as watch:
        for k in range(folds):
            out, kept = (torch.nonzero(m)[:, 0] for m in (fold == k, fold != k))
            model = retrained(join(pool.subset(kept), world.clean), seed + k, steps=200)
            probabilities[out] = torch.softmax(predict(model, pool.images[out]), 1)
    values, seconds = peer("cleanlab", y=pool.labels.numpy(), probabilities=probabilities.numpy())
    return {"cleanlab": (values, watch.seconds + seconds)}


def kernel_ridge(world: World, pool: LabelledImages, ridge: float = 1.0) -> Values:
    """What no package offers and ten lines give: kernel ridge on pixels, left one out in closed
    form (RBF of the median distance); the value is the score of the image's own label."""
    with Stopwatch() as watch:
        data = join(pool, world.clean)
        x, targets = pixels(data), F.one_hot(data.labels, 10).float() - 0.1
        squares = torch.cdist(x, x) ** 2
        kernel = torch.exp(-squares / squares.median())
        hat = torch.linalg.solve(kernel + ridge * torch.eye(len(x)), kernel)
        own = hat.diagonal()[:, None]
        left_out = (hat.T @ targets - own * targets) / (1 - own)
        values = left_out.gather(1, data.labels[:, None])[: len(pool), 0].numpy()
    return {"kernel ridge on pixels, leave-one-out": (values, watch.seconds)}


def all_sides(world: World, pool: LabelledImages, seed: int) -> tuple[Values, ValueModel]:
    """Every side's values of the pool, and our value model."""
    found, model = ours(world, pool, seed)
    found |= literal_net(world, pool, seed) | kernel_ridge(world, pool)
    if PEERS in os.environ:
        found |= knn_and_oob(world, pool, seed) | cleanlab(world, pool, seed)
    return found, model
