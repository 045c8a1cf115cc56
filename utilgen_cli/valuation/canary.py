"""The canary: real images with a wrong label must score below the images themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime.seeds import derive_seed

WARN, REFUSE = 0.9, 0.5
ASKED = 1000  # wrong labels that are judged at most


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
    """Which images are judged under a wrong label, and under which, [m] each, m <= `ASKED`: every
    image under as many as that allows, or some images under one."""
    generator = torch.Generator().manual_seed(derive_seed("canary labels", seed))
    at = torch.randperm(len(labels), generator=generator)[:ASKED].sort().values
    rounds = min(classes - 1, ASKED // max(1, len(at)))
    shifts = 1 + torch.rand(len(at), classes - 1, generator=generator).argsort(1)[:, :rounds]
    wrong = (labels[at, None] + shifts) % classes  # [images, rounds]
    return at.repeat_interleave(rounds), wrong.flatten()


def verdict(found: float | None) -> str:
    """`ok`, `weak` (warn) or `inverted` (refuse); without canaries `unknown`."""
    if found is None:
        return "unknown"
    return "inverted" if found < REFUSE else "weak" if found < WARN else "ok"
