"""Nearest duplicates in feature space, against a bounded memory."""

from __future__ import annotations

import torch
from torch import Tensor

MEMORY = 4096  # earlier samples that are remembered
ROWS = 1024  # of a matrix of similarities that stand at once


def nearest_others(features: Tensor) -> Tensor:
    """Cosine distance of each unit vector to the nearest other one: [M, D] -> [M]."""
    found, start = [], 0
    for part in features.split(ROWS):
        similar = part @ features.T  # [ROWS, M]
        similar.diagonal(start).fill_(-1)
        found.append(1 - similar.amax(1))
        start += len(part)
    return torch.cat(found)


class Memory:
    """The real images' features for good, and those of the last MEMORY samples in a ring."""

    def __init__(self, fixed: Tensor, capacity: int = MEMORY) -> None:
        self.fixed, self.capacity = fixed, capacity
        self.ring = fixed.new_empty(0, fixed.shape[1])
        self.at = 0

    def nearest(self, features: Tensor) -> Tensor:
        """Cosine distance of each unit vector to the nearest real or *earlier* one, [B]; then
        remember them."""
        b = len(features)
        old = torch.cat([self.fixed, self.ring])
        best = (features @ old.T).amax(1) if len(old) else features.new_full((b,), -1.0)
        among = (features @ features.T).tril(-1) - 2 * torch.ones(b, b).triu().to(features)
        self._remember(features)
        return (1 - torch.maximum(best, among.amax(1))).clamp_min(0)

    def _remember(self, features: Tensor) -> None:
        features = features[-self.capacity :]
        free = self.capacity - len(self.ring)
        if free:
            self.ring = torch.cat([self.ring, features[:free]])
            features = features[free:]
        for feature in features:
            self.ring[self.at] = feature
            self.at = (self.at + 1) % self.capacity
