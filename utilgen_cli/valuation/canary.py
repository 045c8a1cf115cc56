"""The canary: copies of real images with a wrong label must score below the images themselves."""

from __future__ import annotations

import torch
from torch import Tensor

WARN, REFUSE = 0.9, 0.5


def auroc(positive: Tensor, negative: Tensor) -> float:
    """P(a positive scores above a negative), ties counted half: Mann and Whitney's U."""
    scores = torch.cat([positive, negative]).cpu().double()  # an Apple GPU has no doubles
    _, inverse, counts = scores.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    ranks = (last - (counts.double() - 1) / 2)[inverse]  # from 1, tied scores share their mean
    n, m = len(positive), len(negative)
    u = ranks[:n].sum().item() - n * (n + 1) / 2
    return u / (n * m)


def verdict(found: float | None) -> str:
    """`ok`, `weak` (warn) or `inverted` (refuse); without canaries `unknown`."""
    if found is None:
        return "unknown"
    return "inverted" if found < REFUSE else "weak" if found < WARN else "ok"
