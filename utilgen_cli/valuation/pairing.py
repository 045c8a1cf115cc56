"""Preference pairs of a class (MLCO): of two images, the one with the higher utility wins.

Every sample is in one pair at most, and near-duplicates of a better sample are left out, so that
no image and no cluster of images dominates what the generator is taught.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from ..runtime.errors import UsageError
from ..runtime.files import encode_json
from ..runtime.progress import Progress, silent
from ..shards.sample import Sample
from .pair_pool import Candidate, SamplePool

LAYOUTS = ("utilgen", "pickapic")
DUPLICATE_RMS = 4.0  # grey levels of 255 between two descriptors: closer is the same picture
DUPLICATE_WINDOW = 64
MATCH_BLOCK = 1024
RANDOM_ROUNDS = 8

Pairs = list[tuple[int, int]]  # (winner, loser), as positions in the pool


@dataclass(frozen=True, slots=True)
class PairingConfig:
    """How pairs are chosen.

    `quantile`: share of a group that can win, and the share that can lose (top-bottom, nearest).
    `min_margin`: least difference in utility. `max_per_class`: None is no limit.
    """

    strategy: str = "top-bottom"
    quantile: float = 0.25
    min_margin: float = 0.0
    max_per_class: int | None = None
    seed: int = 0
    layout: str = "utilgen"

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise UsageError("--strategy", f"{self.strategy!r} is unknown", _one_of(STRATEGIES))
        if self.layout not in LAYOUTS:
            raise UsageError("--layout", f"{self.layout!r} is unknown", _one_of(LAYOUTS))
        if not 0 < self.quantile <= 0.5:
            raise UsageError("--quantile", f"{self.quantile} is not in (0, 0.5]", "Use e.g. 0.25.")
        if not self.min_margin >= 0:
            raise UsageError("--min-margin", f"{self.min_margin} is negative", "Use 0 or more.")
        if self.max_per_class is not None and self.max_per_class < 1:
            raise UsageError("--max-per-class", "is below 1", "Use 1 or more.")


@dataclass(slots=True)
class ClassPairs:
    """What became of one class."""

    name: str
    samples: int = 0
    duplicates: int = 0
    pairs: int = 0
    why_none: str = ""


@dataclass(slots=True)
class PairingReport:
    """Pairs per class, and why a class has none."""

    classes: dict[int, ClassPairs] = field(default_factory=dict)
    margins: list[float] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            "pairs": sum(c.pairs for c in self.classes.values()),
            "mean_margin": float(np.mean(self.margins)) if self.margins else None,
            "classes": {str(label): asdict(c) for label, c in sorted(self.classes.items())},
        }

    def lines(self) -> list[str]:
        """For people: one line for the pairs, one for every class without."""
        made = [c for c in self.classes.values() if c.pairs]
        total = sum(c.pairs for c in made)
        counts = ", ".join(f"{c.name} {c.pairs}" for c in made)
        first = f"{total} pairs in {len(made)} of {len(self.classes)} classes"
        without = [c for c in self.classes.values() if not c.pairs]
        missing = [f"no pair in {c.name}: {c.why_none}" for c in without]
        return [f"{first} ({counts})" if counts else first, *missing]


def pair_samples(
    samples: Iterable[Sample],
    config: PairingConfig,
    report: PairingReport | None = None,
    progress: Progress = silent,
) -> Iterator[Sample]:
    """One pass over scored `samples`; then pairs, the best of every class first.

    A pair has the winner's key, `win.EXT`, `lose.EXT` (bytes unchanged), `cls` and `json`.
    `report` is filled in. BadInput if a sample has no utility.
    """
    report = PairingReport() if report is None else report
    with SamplePool() as pool:
        pool.extend(samples, progress)
        by_class = [
            choose_class_pairs(pool, int(label), config, report) for label in np.unique(pool.label)
        ]
        for round_of_pairs in zip_longest(*by_class):
            for pair in filter(None, round_of_pairs):
                yield _pair_sample(pool, pair, config.layout)


def choose_class_pairs(
    pool: SamplePool, label: int, config: PairingConfig, report: PairingReport
) -> Pairs:
    """Pairs of one class, best first, at most `max_per_class`."""
    members = np.flatnonzero(pool.label == label)
    summary = ClassPairs(pool.read(int(members[0])).facts["class_name"] or str(label))
    summary.samples = len(members)
    report.classes[label] = summary
    by_group = []
    for group in _groups(pool.group, members):
        distinct = group[np.sort(np.unique(pool.digest[group], return_index=True)[1])]
        summary.duplicates += len(group) - len(distinct)
        by_group.append(_choose_group_pairs(pool, distinct, config, summary))
    pairs = [p for turn in zip_longest(*by_group) for p in turn if p is not None]
    pairs = pairs[: config.max_per_class]
    summary.pairs = len(pairs)
    if not pairs:
        summary.why_none = _why_none(pool, members, config)
    report.margins += [float(pool.utility[win] - pool.utility[lose]) for win, lose in pairs]
    return pairs


def _groups(group: np.ndarray, members: np.ndarray) -> list[np.ndarray]:
    """`members` split by group, in order of first appearance."""
    order = np.argsort(group[members], kind="stable")
    cuts = np.flatnonzero(np.diff(group[members][order])) + 1
    return sorted(np.split(members[order], cuts), key=lambda part: int(part[0]))


def _choose_group_pairs(
    pool: SamplePool, group: np.ndarray, config: PairingConfig, summary: ClassPairs
) -> Pairs:
    """Apply the strategy to one group of distinct files; `group` holds positions in the pool."""
    if len(group) < 2:
        return []
    rng = np.random.default_rng([config.seed, int(pool.group[group[0]]) % 2**64])
    ranked = group[np.argsort(-pool.utility[group], kind="stable")]
    strategy, splits = STRATEGIES[config.strategy]
    if splits:
        count = max(1, int(config.quantile * len(ranked)))
        high, low = ranked[:count], ranked[: -count - 1 : -1]  # low: the worst first
    else:
        high, low = ranked, ranked[:0]
    described = []
    for part in (high, low):
        descriptors = pool.descriptors(part)
        keep = distinct_rows(descriptors)
        summary.duplicates += int((~keep).sum())
        described.append((part[keep], descriptors[keep]))
    pairs = strategy(*described[0], *described[1], pool.utility, config.min_margin, rng)
    margins = ((w, o, pool.utility[w] - pool.utility[o]) for w, o in pairs)
    return [(w, o) for w, o, margin in margins if _wins(margin, config.min_margin)]


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
    """High and low matched at least total distance between descriptors; the closest pair first.

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
        wins = _wins(np.abs(utility[a] - utility[b]), min_margin)
        first = utility[a] > utility[b]
        winners, losers = np.where(first, a, b)[wins], np.where(first, b, a)[wins]
        pairs += zip(winners.tolist(), losers.tolist(), strict=True)
        rest = np.concatenate([a[~wins], b[~wins], rest[2 * half :]])
    return pairs


STRATEGIES: dict[str, tuple[Strategy, bool]] = {  # name: (how, takes the top and the bottom apart)
    "top-bottom": (top_bottom, True),
    "random-margin": (random_margin, False),
    "nearest": (nearest, True),
}


def _deal(count: int, hands: int, rng: np.random.Generator) -> list[np.ndarray]:
    return np.array_split(rng.permutation(count), hands)


def _wins(margin: Any, min_margin: float) -> Any:
    """A margin counts if it reaches the least one and is not nothing."""
    return (margin >= min_margin) & (margin > 0)


def _why_none(pool: SamplePool, members: np.ndarray, config: PairingConfig) -> str:
    if len(members) == 1:
        return "it has one sample"
    sizes = [len(g) for g in _groups(pool.group, members)]
    if max(sizes) == 1:
        return "every sample has another prompt"
    if len(np.unique(pool.digest[members])) == 1:
        return "its images are all the same"
    spread = max(float(np.ptp(pool.utility[g])) for g in _groups(pool.group, members))
    if spread == 0:
        return "its utilities are all equal"
    if spread < config.min_margin:
        return f"utilities differ by {spread:.3g} at most, --min-margin is {config.min_margin:g}"
    return "near-duplicates and small margins left nothing"


def _pair_sample(pool: SamplePool, pair: tuple[int, int], layout: str) -> Sample:
    win, lose = pair
    winner, loser = pool.read(win), pool.read(lose)
    label = str(pool.label[win]).encode()
    if layout == "pickapic":
        return Sample(winner.key, _pickapic_members(winner, loser))
    facts = {
        **{name: value for name, value in winner.facts.items() if value is not None},
        "win_key": winner.key,
        "lose_key": loser.key,
        "win_utility": float(pool.utility[win]),
        "lose_utility": float(pool.utility[lose]),
    }
    members = {
        f"win.{winner.extension}": winner.image,
        f"lose.{loser.extension}": loser.image,
        "cls": label,
        "json": encode_json(facts),
    }
    return Sample(winner.key, members)


def _pickapic_members(winner: Candidate, loser: Candidate) -> dict[str, bytes]:
    """The columns of the Pick-a-Pic data set; the first image is the preferred one."""
    caption = winner.facts["prompt"] or f"a photo of a {winner.facts['class_name']}"
    return {
        "jpg_0": winner.image,
        "jpg_1": loser.image,
        "label_0": b"1",
        "caption": caption.encode(),
    }


def _one_of(names: Iterable[str]) -> str:
    return f"Use one of {', '.join(names)}."
