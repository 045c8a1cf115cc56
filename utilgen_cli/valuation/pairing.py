"""Preference pairs of a class (MLCO): of two images, the one with the higher utility wins.

Every sample is in one pair at most, and near-duplicates of a better sample are left out, so that
no image and no cluster of images dominates what the generator is taught.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np

from ..runtime.errors import UsageError
from ..runtime.files import encode_json
from ..runtime.progress import Progress, silent
from ..shards.sample import MAX_KEY, Sample
from .pair_pool import Candidate, Describe, SamplePool
from .pair_strategies import STRATEGIES, Pairs, distinct_rows, wins

LAYOUTS = ("utilgen", "pickapic")
MATCHES = ("auto", "value", "clip", "grey")
SHOWN = 20  # classes that are named to people


@dataclass(frozen=True, slots=True)
class PairingConfig:
    """How pairs are chosen.

    `strategy`: in `agreement`, a sample wins if the value model sees it as its class, and loses if
    it does not. `quantile`: share of a group that can win, and the share that can lose (top-bottom,
    nearest).
    `min_margin`: least difference in utility. `max_per_class`: None is no limit.
    `match`: what `nearest` compares: `value`, the features of the value model that scored the
    samples; `clip`, what the callable given to `pair_samples` says; `grey`, 8 x 8 grey levels;
    `auto`, value where all samples have such features, else grey.
    """

    strategy: str = "top-bottom"
    quantile: float = 0.25
    min_margin: float = 0.0
    max_per_class: int | None = None
    seed: int = 0
    layout: str = "utilgen"
    match: str = "auto"

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise UsageError("--strategy", f"{self.strategy!r} is unknown", _one_of(STRATEGIES))
        if self.layout not in LAYOUTS:
            raise UsageError("--layout", f"{self.layout!r} is unknown", _one_of(LAYOUTS))
        if self.match not in MATCHES:
            raise UsageError("--match", f"{self.match!r} is unknown", _one_of(MATCHES))
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
    margin: float = 0.0  # of all pairs together
    matched_by: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        pairs = sum(c.pairs for c in self.classes.values())
        return {
            "pairs": pairs,
            "mean_margin": self.margin / pairs if pairs else None,
            "matched_by": self.matched_by,
            "classes": {str(label): asdict(c) for label, c in sorted(self.classes.items())},
        }

    def take(self) -> dict[str, Any]:
        """What was found, as JSON; the report is empty then."""
        found = {"margin": self.margin, **self.as_dict()}
        self.classes, self.margin, self.matched_by = {}, 0.0, None
        return found

    def add(self, counts: dict[str, Any]) -> None:
        """Fill the empty report with what was taken."""
        self.margin, self.matched_by = counts["margin"], counts["matched_by"]
        self.classes = {int(n): ClassPairs(**c) for n, c in counts["classes"].items()}

    def lines(self) -> list[str]:
        """For people: one line for the pairs, one for every class without (of many, for some)."""
        classes = [c for _, c in sorted(self.classes.items())]
        made = [c for c in classes if c.pairs]
        total = sum(c.pairs for c in made)
        counts = ", ".join(f"{c.name} {c.pairs}" for c in made)
        if len(made) > SHOWN:
            few, most = (bound(c.pairs for c in made) for bound in (min, max))
            counts = f"{few} to {most} a class"
        first = f"{total} pairs in {len(made)} of {len(classes)} classes"
        if self.matched_by is not None:
            first += f", matched by {MATCH_NAMES[self.matched_by]}"
        missing = [f"no pair in {c.name}: {c.why_none}" for c in classes if not c.pairs]
        if len(missing) > SHOWN:
            missing[SHOWN:] = [f"no pair in {len(missing) - SHOWN} more classes: see --json"]
        if total:
            first += f" ({counts}); winners' utility {self.margin / total:.2g} higher on average"
        return [first, *missing]


def pair_samples(
    samples: Iterable[Sample],
    config: PairingConfig,
    report: PairingReport | None = None,
    progress: Progress = silent,
    describe: Describe | None = None,
) -> Iterator[Sample]:
    """One pass over scored `samples`; then pairs, the best of every class first.

    A pair has the winner's key (with a number behind it where another set's winner had that key),
    `win.EXT`, `lose.EXT` (bytes unchanged), `cls` and `json`.
    `report` is filled in. `describe`: images -> vectors, for `match` clip.
    BadInput if a sample has no utility, or not the features that are asked for.
    """
    report = PairingReport() if report is None else report
    with SamplePool() as pool:
        pool.extend(samples, progress)
        vectors = _matching(pool, config, report, describe)
        by_class = [
            choose_class_pairs(pool, int(label), config, report, vectors)
            for label in np.unique(pool.label)
        ]
        taken: set[str] = set()
        for round_of_pairs in zip_longest(*by_class):
            for pair in filter(None, round_of_pairs):
                made = _pair_sample(pool, pair, config.layout)
                yield Sample(_free_key(made.key, taken), made.members)


MATCH_NAMES = {"value": "the value model's features", "clip": "CLIP", "grey": "grey levels"}
Vectors = Callable[[np.ndarray], np.ndarray]  # positions in the pool -> float [N, D]


def _matching(
    pool: SamplePool, config: PairingConfig, report: PairingReport, describe: Describe | None
) -> Vectors | None:
    """What `nearest` compares samples by; None is their grey levels (or no comparison)."""
    if config.strategy != "nearest":
        return None
    match = config.match
    if match == "auto":
        match = "value" if pool.featured == len(pool) else "grey"
    report.matched_by = match
    if match == "clip":
        assert describe is not None
        return lambda indices: pool.described(indices, describe)
    return pool.features if match == "value" else None


def choose_class_pairs(
    pool: SamplePool,
    label: int,
    config: PairingConfig,
    report: PairingReport,
    vectors: Vectors | None = None,
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
        by_group.append(_choose_group_pairs(pool, distinct, config, summary, vectors))
    pairs = [p for turn in zip_longest(*by_group) for p in turn if p is not None]
    pairs = pairs[: config.max_per_class]
    summary.pairs = len(pairs)
    if not pairs:
        summary.why_none = _why_none(pool, members, config)
    report.margin += sum(float(pool.utility[win] - pool.utility[lose]) for win, lose in pairs)
    return pairs


def _groups(group: np.ndarray, members: np.ndarray) -> list[np.ndarray]:
    """`members` split by group, in order of first appearance."""
    order = np.argsort(group[members], kind="stable")
    cuts = np.flatnonzero(np.diff(group[members][order])) + 1
    return sorted(np.split(members[order], cuts), key=lambda part: int(part[0]))


def _choose_group_pairs(
    pool: SamplePool,
    group: np.ndarray,
    config: PairingConfig,
    summary: ClassPairs,
    vectors: Vectors | None,
) -> Pairs:
    """Apply the strategy to one group of distinct files; `group` holds positions in the pool."""
    if len(group) < 2:
        return []
    rng = np.random.default_rng([config.seed, int(pool.group[group[0]]) % 2**64])
    ranked = group[np.argsort(-pool.utility[group], kind="stable")]
    strategy, apart = STRATEGIES[config.strategy]
    high, low = ranked, ranked[:0]
    if apart == "ends":
        count = max(1, int(config.quantile * len(ranked)))
        high, low = ranked[:count], ranked[: -count - 1 : -1]  # low: the worst first
    elif apart == "agreement":
        agreed = pool.agreed(ranked)
        high, low = ranked[agreed], ranked[~agreed]
    described = []
    for part in (high, low):
        descriptors = pool.descriptors(part)
        keep = distinct_rows(descriptors)
        summary.duplicates += int((~keep).sum())
        part = part[keep]
        described.append((part, vectors(part) if vectors else descriptors[keep]))
    pairs = strategy(*described[0], *described[1], pool.utility, config.min_margin, rng)
    margins = ((w, o, pool.utility[w] - pool.utility[o]) for w, o in pairs)
    return [(w, o) for w, o, margin in margins if wins(margin, config.min_margin)]


def _why_none(pool: SamplePool, members: np.ndarray, config: PairingConfig) -> str:
    if len(members) == 1:
        return "it has one sample"
    sizes = [len(g) for g in _groups(pool.group, members)]
    if max(sizes) == 1:
        return "every sample has another prompt"
    if len(np.unique(pool.digest[members])) == 1:
        return "its images are all the same"
    if config.strategy == "agreement":
        agreed = pool.agreed(members)
        if agreed.all() or not agreed.any():
            return f"the value model sees {'all' if agreed.all() else 'none'} of its samples as it"
    spread = max(float(np.ptp(pool.utility[g])) for g in _groups(pool.group, members))
    if spread == 0:
        return "its utilities are all equal"
    if spread < config.min_margin:
        return f"utilities differ by {spread:.3g} at most, --min-margin is {config.min_margin:g}"
    return "near-duplicates and small margins left nothing"


def _free_key(key: str, taken: set[str]) -> str:
    """`key`, or `key-2` and so on; it is taken then."""
    ends = itertools.chain([""], (f"-{n}" for n in itertools.count(2)))
    free = next(one for end in ends if (one := key[: MAX_KEY - len(end)] + end) not in taken)
    taken.add(free)
    return free


def _pair_sample(pool: SamplePool, pair: tuple[int, int], layout: str) -> Sample:
    win, lose = pair
    winner, loser = pool.read(win), pool.read(lose)
    label = str(pool.label[win])
    if layout == "pickapic":
        return Sample(winner.key, _pickapic_members(winner, loser, label))
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
        "cls": label.encode(),
        "json": encode_json(facts),
    }
    return Sample(winner.key, members)


def _pickapic_members(winner: Candidate, loser: Candidate, label: str) -> dict[str, bytes]:
    """The columns of the Pick-a-Pic data set; the first image is the preferred one."""
    caption = winner.facts["prompt"] or f"a photo of a {winner.facts['class_name'] or label}"
    return {
        "jpg_0": winner.image,
        "jpg_1": loser.image,
        "label_0": b"1",
        "caption": caption.encode(),
    }


def _one_of(names: Iterable[str]) -> str:
    return f"Use one of {', '.join(names)}."
