"""A diverse subset of high utility, by greedy maximisation of a determinant.

Chen, Zhang and Zhou 2018, "Fast Greedy MAP Inference for DPPs", algorithm 1.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
CANDIDATES = 4  # kept for each sample that will be picked


def pick_diverse(utilities: Tensor, features: Tensor, n: int, trade: float = 2.0) -> Tensor:
    """Indices [n] in the order picked: quality times what is new in feature space.

    utilities [N]; features [N, D] of unit length. A quality is exp(trade * utility's rank in
    [0, 1]), so that the scale of the method does not matter.
    """
    n = min(n, len(utilities))
    rank = utilities.argsort().argsort().double() / max(1, len(utilities) - 1)
    quality = torch.exp(trade * rank)
    # A little of the identity keeps the kernel regular when there are more points than features.
    similar = 0.995 * (features.double() @ features.double().T) + 0.005 * torch.eye(len(features))
    kernel = quality[:, None] * similar * quality[None]
    rows = torch.zeros(0, len(utilities), dtype=torch.float64)
    gain = kernel.diagonal().clone()
    picked: list[int] = []
    for _ in range(n):
        best = int(gain.argmax())
        picked.append(best)
        row = (kernel[best] - rows[:, best] @ rows) / gain[best].sqrt()
        rows = torch.cat([rows, row[None]])
        gain = (gain - row**2).clamp_min(1e-12)
        gain[picked] = -torch.inf
    return torch.tensor(picked, dtype=torch.long)


class Best(Generic[T]):
    """The items of highest utility of each class: CANDIDATES for each that may still be picked.

    Where `count` are picked evenly, no class gives more than `portion`, which falls as the classes
    fill up. No more is kept than CANDIDATES * (`count` + the number of classes).
    """

    def __init__(self, count: int) -> None:
        self.count, self.portion = count, count
        self.seen: Counter[int] = Counter()
        self.without_last = 0  # what the classes seen would give if each gave below its portion
        self.heaps: dict[int, list[tuple[float, int, T]]] = {}

    def wants(self, label: int, utility: float) -> bool:
        """Look at an item: True if it is among the best of its class so far; earlier ones win
        ties."""
        self._count(label)
        heap = self.heaps.setdefault(label, [])
        return len(heap) < CANDIDATES * self.portion or utility > heap[0][0]

    def keep(self, label: int, utility: float, place: int, item: T) -> None:
        """Keep an item that is wanted; `place` is where it stands in the stream."""
        heapq.heappush(self.heaps[label], (utility, -place, item))
        self._cut(label)

    def _count(self, label: int) -> None:
        self.seen[label] += 1
        self.without_last += self.seen[label] < self.portion
        if self.without_last >= self.count:
            enough = bisect_left(range(self.portion), self.count, key=self._given)
            self.portion, self.without_last = enough, self._given(enough - 1)
            for other in self.heaps:
                self._cut(other)

    def _given(self, most: int) -> int:
        """What the classes seen would give if none gave more than `most`."""
        return sum(min(n, most) for n in self.seen.values())

    def _cut(self, label: int) -> None:
        while len(self.heaps[label]) > CANDIDATES * self.portion:
            heapq.heappop(self.heaps[label])

    def of(self, label: int, most: int) -> list[tuple[float, int, T]]:
        """(utility, position in the stream, item) of the best `most`, in the stream's order."""
        best = heapq.nlargest(most, self.heaps[label], key=lambda entry: entry[:2])
        return sorted(((u, -at, item) for u, at, item in best), key=lambda entry: entry[1])


def shares(total: int, available: Iterable[int]) -> list[int]:
    """`total` dealt evenly over classes with `available` items each; small ones give all."""
    left = list(available)
    found = [0] * len(left)
    while total > 0 and any(left):
        for i, have in enumerate(left):
            if have and total:
                found[i], left[i], total = found[i] + 1, have - 1, total - 1
    return found
