"""The canary: real images with a wrong label must score below the images themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime.seeds import derive_seed

WARN, REFUSE = 0.9, 0.5
ASKED = 1000  # wrong labels that are judged, where the images and classes give so many


def auroc(positive: Tensor, negative: Tensor) -> float:
    """P(a positive scores above a negative), ties counted half: Mann and Whitney's U."""
    scores = torch.cat([positive, negative]).cpu().double()  # an Apple GPU has no doubles
    _, inverse, counts = scores.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    ranks = (last - (counts.double() - 1) / 2)[inverse]  # from 1, tied scores share their mean
    n, m = len(positive), len(negative)
    u = ranks[:n].sum().item() - n * (n + 1) / 2
    return u / (n * m)


def wrong_labels(labels: Tensor, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Which images are judged under a wrong label, and under which, [m] each: every image once, or
    under several if that takes no more than `ASKED`."""
    n = len(labels)
    rounds = min(classes - 1, max(1, ASKED // max(1, n)))
    if rounds < 1 or not n:
        return torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long)
    generator = torch.Generator().manual_seed(derive_seed("canary labels", seed))
    shifts = (
        1 + torch.rand(n, classes - 1, generator=generator).argsort(1)[:, :rounds]
    )  # [n, rounds]
    return torch.arange(n).repeat_interleave(rounds), (
        (labels[:, None] + shifts) % classes
    ).flatten()


def verdict(found: float | None) -> str:
    """`ok`, `weak` (warn) or `inverted` (refuse); without canaries `unknown`."""
    if found is None:
        return "unknown"
    return "inverted" if found < REFUSE else "weak" if found < WARN else "ok"
