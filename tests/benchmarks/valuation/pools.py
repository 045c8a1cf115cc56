"""Ranking pools of unseen candidates by what retraining with each of them brings."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import rankdata, spearmanr
from torch import Tensor

from utilgen_cli.classification.data import LabelledImages, to_float
from utilgen_cli.classification.train import predict
from utilgen_cli.valuation.lookahead import Lookahead, lookaheads

from ..store import Run, Stopwatch, Store, spread, table
from ..valuation_inversion import literal
from .sides import PEERS, peers, value_model
from .world import World, accuracy, ceiling, join, make_world, pixels, retrained, value_data

POOLS, CANDIDATES, SEEN = 25, 400, 300
RETRAINS, STEPS = 2, 100
KINDS = ("clean", "blur", "noise", "duplicates", "easy", "hard", "wrong")


class Maker:
    """Pools made of KINDS from images outside the shots; `judge` says what is easy and hard."""

    def __init__(self, world: World, seed: int) -> None:
        self.world, self.judge = world, retrained(world.clean, seed + 7, 200)
        self.generator = torch.Generator().manual_seed(seed)
        losses = F.cross_entropy(
            predict(self.judge, world.pool.images), world.pool.labels, reduction="none"
        )
        self.by_loss = losses.argsort()

    def mixture(self) -> np.ndarray:
        """Shares of the kinds: two or three of them lead."""
        draws = -torch.log(torch.rand(len(KINDS), generator=self.generator))
        return (draws**2 / (draws**2).sum()).numpy()

    def make(self, shares: np.ndarray, count: int) -> LabelledImages:
        """A pool of about `count` images."""
        parts = [self.part(k, round(s * count)) for k, s in zip(KINDS, shares, strict=True)]
        return join(*[part for part in parts if len(part)])

    def part(self, kind: str, n: int) -> LabelledImages:
        source = self.world.real if kind == "duplicates" else self.world.pool
        data = source.subset(self.pick(kind, n, len(source)))
        if kind == "blur":
            data.images = F.avg_pool2d(data.images.float(), 9, 1, 4).to(torch.uint8)
        elif kind == "noise":
            shape = data.images.shape
            data.images = torch.randint(0, 256, shape, generator=self.generator).to(torch.uint8)
        elif kind == "wrong":
            shift = torch.randint(1, 10, (n,), generator=self.generator)
            data.labels = (data.labels + shift) % 10
        return data

    def pick(self, kind: str, n: int, available: int) -> Tensor:
        """Where the images come from: easy is the fifth of least loss, hard that of the highest."""
        if kind in ("easy", "hard"):
            fifth = available // 5
            found = self.by_loss[:fifth] if kind == "easy" else self.by_loss[-fifth:]
            return found[torch.randint(fifth, (n,), generator=self.generator)]
        return torch.randint(available, (n,), generator=self.generator)


def gains(world: World, pools: list[LabelledImages], seed: int) -> np.ndarray:
    """Test accuracy with each pool minus that without, %, [POOLS, RETRAINS].

    Both have all clean shots.
    """

    def accuracies(mix: LabelledImages | None) -> np.ndarray:
        models = [retrained(world.clean, 50 * seed + r, STEPS, mix) for r in range(RETRAINS)]
        return np.array([100 * accuracy(model, world.test) for model in models])

    without = accuracies(None)
    return np.array([accuracies(pool) - without for pool in pools])


Side = Callable[[list[LabelledImages]], list[float]]  # pools -> the value of each


def each(value: Callable[[LabelledImages], float]) -> Side:
    """A side that values one pool at a time."""
    return lambda pools: [value(pool) for pool in pools]


def our_sides(world: World, seen: LabelledImages, seed: int) -> tuple[dict[str, Side], float]:
    """Lookahead by loss and by accuracy, and the means of utility and of minus the loss over a pool."""
    value, seconds = value_model(world, seen, seed)

    def mean(member: str, sign: int) -> Side:
        def of(pool: LabelledImages) -> float:
            return sign * float(
                getattr(value.judge_pixels(pool.images, pool.labels), member).mean()
            )

        return each(of)

    def both(pools: list[LabelledImages]) -> list[float]:
        sides = ahead("gain"), mean("utility", 1)
        return list(sum(rankdata(side(pools)) for side in sides))

    found: list[Lookahead] = []  # of the pools, made by the first side that asks

    def ahead(member: str) -> Side:
        def of(pools: list[LabelledImages]) -> list[float]:
            if not found:
                found.extend(lookaheads(value, world.real, pools, world.validation, seed=seed))
            return [getattr(one, member) for one in found]

        return of

    return {
        "utilgen lookahead": ahead("gain"),
        "utilgen lookahead, accuracy": ahead("accuracy_gain"),
        "utilgen mean utility": mean("utility", 1),
        "utilgen lookahead and mean utility, by mean rank": both,
        "utilgen minus mean loss": mean("loss", -1),
    }, seconds


def literal_side(world: World, seen: LabelledImages, seed: int) -> Side:
    model, net = literal(value_data(world, seen), seed)

    @torch.no_grad()
    def of(pool: LabelledImages) -> float:
        logits = model(to_float(pool.images))
        return float(net(F.cross_entropy(logits, pool.labels, reduction="none")).mean())

    return each(of)


def peer_side(method: str, world: World) -> Side:
    """The mean value of a pool's images when they join the clean shots; features are pixels."""

    def job(pool: LabelledImages) -> dict[str, np.ndarray]:
        both = join(pool, world.real)
        return {
            "x": pixels(both).numpy(), "y": both.labels.numpy(),
            "val_x": pixels(world.validation).numpy(), "val_y": world.validation.labels.numpy(),
        }  # fmt: skip

    def side(pools: list[LabelledImages]) -> list[float]:
        found, _ = peers(method, [job(pool) for pool in pools])
        return [float(values[: len(p)].mean()) for p, values in zip(pools, found, strict=True)]

    return side


def one_seed(seed: int) -> Run:
    """Spearman correlation of every side's value of 25 pools with their true gains."""
    world = make_world(seed)
    maker = Maker(world, seed)
    seen = maker.make(np.full(len(KINDS), 1 / len(KINDS)), SEEN)
    pools = [maker.make(maker.mixture(), CANDIDATES) for _ in range(POOLS)]
    sides, trained = our_sides(world, seen, seed)
    sides["literal Meta-Weight-Net, mean"] = literal_side(world, seen, seed)
    if PEERS in os.environ:
        sides["pyDVL KNN-Shapley, mean"] = peer_side("knn-shapley", world)
        sides["pyDVL Data-OOB, mean"] = peer_side("data-oob", world)
    truth = gains(world, pools, seed)
    run: Run = {"gains": truth.tolist(), "train seconds": trained, "spearman": {}, "seconds": {}}
    for name, side in sides.items():
        with Stopwatch() as watch:
            values = side(pools)
        run["spearman"][name] = float(spearmanr(values, truth.mean(1)).statistic)
        run["seconds"][name] = watch.seconds / POOLS
    run["spearman"]["ceiling"], run["seconds"]["ceiling"] = ceiling(truth[:, 0], truth[:, 1]), 0.0
    return run


def pool_table(stores: dict[str, Store], seeds: int) -> str:
    """The table of pool ranking."""
    runs = [stores["pool"].get(f"seed {s}", lambda s=s: one_seed(s)) for s in range(seeds)]
    rows = []
    for name in runs[0]["spearman"]:
        found = [run["spearman"][name] for run in runs]
        seconds = statistics.fmean(run["seconds"][name] for run in runs)
        rows.append([name, spread(found), f"{min(found):.3f}", f"{seconds:.1f}"])
    every = [statistics.fmean(gain) for run in runs for gain in run["gains"]]
    note = f"True gains: {min(every):.1f} to {max(every):.1f} points of accuracy. Seconds are CPU time a pool, without the peers' own process; training the value model took {statistics.fmean(run['train seconds'] for run in runs):.0f} s more."  # fmt: skip
    return table(["side", "Spearman", "least", "CPU seconds a pool"], rows) + f"\n\n{note}"
