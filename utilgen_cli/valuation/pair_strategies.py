"""How pairs are chosen from the high and the low samples of a group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

DUPLICATE_RMS = 4.0  # grey levels of 255 between two descriptors: closer is the same picture
DUPLICATE_WINDOW = 64
MATCH_BLOCK = 1024
RANDOM_ROUNDS = 8

Pairs = list[tuple[int, int]]  # (winner, loser), as positions in the pool


def distinct_rows(descriptors: np.ndarray) -> np.ndarray:
    """Mask of rows (uint8 [N, D], best first) that are not nearly equal to a better row.

    Rows are compared with their 64 neighbours in order of mean grey level: linear in N.
    """
    values = descriptors.astype(np.float32)
    order = np.argsort(values.mean(axis=1), kind="stable")
    keep = np.ones(len(values), bool)
    limit = DUPLICATE_RMS**2
    for shift in range(1, min(DUPLICATE_WINDOW, len(values) - 1) + 1):
        a, b = order[:-shift], order[shift:]
        near = np.square(values[a] - values[b]).mean(axis=1) < limit
        keep[np.maximum(a, b)[near]] = False
    return keep


Strategy = Callable[
    [np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, float, np.random.Generator], Pairs
]


def top_bottom(
    high: np.ndarray, high_rows: np.ndarray, low: np.ndarray, low_rows: np.ndarray,
    utility: np.ndarray, min_margin: float, rng: np.random.Generator,
) -> Pairs:  # fmt: skip
    """The best against the worst, the second best against the second worst, ..."""
    return list(zip(high.tolist(), low.tolist(), strict=False))


def nearest(
    high: np.ndarray, high_rows: np.ndarray, low: np.ndarray, low_rows: np.ndarray,
    utility: np.ndarray, min_margin: float, rng: np.random.Generator,
) -> Pairs:  # fmt: skip
    """High and low matched at least total distance between rows; the closest pair first.

    Large groups are cut at random into blocks of 1,024, so that time stays linear.
    """
    found: list[tuple[float, int, int]] = []
    blocks = -(-max(len(high), len(low)) // MATCH_BLOCK)
    for i, j in zip(_deal(len(high), blocks, rng), _deal(len(low), blocks, rng), strict=True):
        a, b = high_rows[i].astype(np.float32), low_rows[j].astype(np.float32)
        squared = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
        cost = np.sqrt(np.maximum(squared, 0))  # [len(i), len(j)]
        for r, c in zip(*linear_sum_assignment(cost), strict=True):
            found.append((float(cost[r, c]), int(high[i[r]]), int(low[j[c]])))
    return [(win, lose) for _, win, lose in sorted(found)]


def random_margin(
    high: np.ndarray, high_rows: np.ndarray, low: np.ndarray, low_rows: np.ndarray,
    utility: np.ndarray, min_margin: float, rng: np.random.Generator,
) -> Pairs:  # fmt: skip
    """Random pairs of all samples (`high`) whose utilities differ by the margin."""
    pairs: Pairs = []
    rest = high
    for _ in range(RANDOM_ROUNDS):
        rest = rng.permutation(rest)
        half = len(rest) // 2
        a, b = rest[:half], rest[half : 2 * half]
        won = wins(np.abs(utility[a] - utility[b]), min_margin)
        first = utility[a] > utility[b]
        winners, losers = np.where(first, a, b)[won], np.where(first, b, a)[won]
        pairs += zip(winners.tolist(), losers.tolist(), strict=True)
        rest = np.concatenate([a[~won], b[~won], rest[2 * half :]])
    return pairs


def at_random(
    high: np.ndarray, high_rows: np.ndarray, low: np.ndarray, low_rows: np.ndarray,
    utility: np.ndarray, min_margin: float, rng: np.random.Generator,
) -> Pairs:  # fmt: skip
    """Any of the high against any of the low: what wins is not the easiest of its class."""
    return list(zip(rng.permutation(high).tolist(), rng.permutation(low).tolist(), strict=False))


# name: (how, what makes a sample high or low: the ends of the ranking, nothing, or whether the
# value model sees it as its class)
STRATEGIES: dict[str, tuple[Strategy, str]] = {
    "top-bottom": (top_bottom, "ends"),
    "random-margin": (random_margin, "nothing"),
    "nearest": (nearest, "ends"),
    "agreement": (at_random, "agreement"),
}


def _deal(count: int, hands: int, rng: np.random.Generator) -> list[np.ndarray]:
    return np.array_split(rng.permutation(count), hands)


def wins(margin: Any, min_margin: float) -> Any:
    """A margin counts if it reaches the least one and is not nothing."""
    return (margin >= min_margin) & (margin > 0)
