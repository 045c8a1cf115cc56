"""What `value score` does with a whole stream: pick a subset, or keep a sample of it aside."""

from __future__ import annotations

import heapq
import io
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..classification.data import LabelledImages
from ..runtime.seeds import derive_seed
from ..shards.images import decode_many
from ..shards.reader import read_tar
from ..shards.sample import Sample
from ..shards.writer import end_of_tar, sample_bytes
from .score import UTILITY, Scorer
from .select import CANDIDATES, Best, pick_diverse, shares

ASIDE = 1000  # samples that a set is valued on


def select_samples(samples: Iterable[Sample], scorer: Scorer, count: int) -> Iterator[Sample]:
    """`count` samples of high utility that differ from each other, classes evenly, in their order.

    Memory holds the features of the best candidates of each class only (in all, four for each
    sample that is picked, and four a class); the samples themselves wait on disk.
    """
    with Waiting() as waiting:
        yield from _selected(samples, scorer, count, waiting)


class Waiting:
    """Samples in a temporary file."""

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile(prefix="utilgen-select-")  # noqa: SIM115

    def put(self, sample: Sample) -> tuple[int, int]:
        """Where it lies: offset and length."""
        data = sample_bytes(sample)
        data += end_of_tar(len(data))
        at = self.file.seek(0, os.SEEK_END)
        self.file.write(data)
        return at, len(data)

    def get(self, place: tuple[int, int]) -> Sample:
        """The sample that lies there."""
        at, length = place
        self.file.seek(at)
        (sample,) = read_tar(io.BytesIO(self.file.read(length)), "a waiting sample")
        return sample

    def __enter__(self) -> Waiting:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()


def _selected(
    samples: Iterable[Sample], scorer: Scorer, count: int, waiting: Waiting
) -> Iterator[Sample]:
    best: Best[tuple[tuple[int, int], Tensor]] = Best(count)
    for place, (sample, features) in enumerate(scorer.with_features(samples)):
        utility = sample.parsed(UTILITY)["utility"]
        if best.wants(sample.label, utility):
            best.keep(sample.label, utility, place, (waiting.put(sample), features.clone()))
    picked: list[tuple[int, tuple[int, int]]] = []
    labels = sorted(best.heaps)
    portions = zip(labels, shares(count, [best.seen[label] for label in labels]), strict=True)
    for label, n in ((label, n) for label, n in portions if n):
        entries = best.of(label, CANDIDATES * n)
        utilities = torch.tensor([u for u, _, _ in entries])
        vectors = torch.stack([f for _, _, (_, f) in entries])
        picked += [(entries[i][1], entries[i][2][0]) for i in pick_diverse(utilities, vectors, n)]
    for _, where in sorted(picked, key=lambda entry: entry[0]):
        yield waiting.get(where)


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
