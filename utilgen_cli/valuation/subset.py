"""What `value score` does with a whole stream: pick a subset, or keep a sample of it aside."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..classification.data import LabelledImages
from ..runtime.seeds import derive_seed
from ..shards.images import decode_many
from ..shards.sample import Sample
from .score import UTILITY, Scorer
from .select import CANDIDATES, Best, pick_diverse, shares

ASIDE = 1000  # samples that a set is valued on


def select_samples(samples: Iterable[Sample], scorer: Scorer, count: int) -> Iterator[Sample]:
    """`count` samples of high utility that differ from each other, classes evenly, in their order.

    Memory holds the best candidates of each class only (4 for each sample that will be picked).
    """
    best: Best[tuple[Sample, Tensor]] = Best(CANDIDATES * count)
    for sample, features in scorer.with_features(samples):
        best.offer(sample.label, sample.parsed(UTILITY)["utility"], (sample, features))
    found = {label: best.of(label) for label in sorted(best.heaps)}
    picked: list[tuple[int, Sample]] = []
    portions = shares(count, [len(entries) for entries in found.values()])
    for entries, n in zip(found.values(), portions, strict=True):
        if len(entries) > CANDIDATES * n:
            least = sorted((u for u, _, _ in entries), reverse=True)[CANDIDATES * n - 1]
            entries = [entry for entry in entries if entry[0] >= least]
        utilities = torch.tensor([u for u, _, _ in entries])
        vectors = torch.stack([f for _, _, (_, f) in entries])
        picked += [(entries[i][1], entries[i][2][0]) for i in pick_diverse(utilities, vectors, n)]
    for _, sample in sorted(picked, key=lambda entry: entry[0]):
        yield sample


@dataclass
class Aside:
    """Up to ASIDE samples of a stream, drawn evenly whatever its length, at `size` pixels."""

    classes: list[str]
    size: int
    heap: list[tuple[int, str, int, Sample]] = field(default_factory=list)

    def watch(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """Pass the samples on."""
        for number, sample in enumerate(samples):
            entry = (-derive_seed("aside", sample.key), sample.key, -number, sample)
            if len(self.heap) < ASIDE:
                heapq.heappush(self.heap, entry)
            elif entry[:2] > self.heap[0][:2]:
                heapq.heapreplace(self.heap, entry)
            yield sample

    def images(self) -> LabelledImages:
        """What was kept, in the order of the keys."""
        kept = [sample for *_, sample in sorted(self.heap, key=lambda entry: entry[1])]
        arrays = decode_many(kept, self.size, torch.get_num_threads())
        images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
        labels = torch.tensor([s.label for s in kept])
        return LabelledImages(images, labels, [s.key for s in kept], self.classes)
