"""Which samples would lower the validation loss: last-layer influence functions.

Koh & Liang (2017), restricted to the linear head, whose Hessian is exact. With h the features
and a one for the bias [D+1], p the predicted probabilities, r = p - onehot(y):

    gradient of one loss     r hᵀ                                             [C, D+1]
    Hessian applied to V     mean_j (diag(p_j) - p_j p_jᵀ) V h_j h_jᵀ + damping V
    influence of sample i    <r_i h_iᵀ, H⁻¹ mean_v r_v h_vᵀ>   > 0: it lowers the validation loss
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..runtime.seeds import derive_seed


def with_bias(features: Tensor) -> Tensor:
    """Append a one to each row, in double precision: [N, D] -> [N, D+1]."""
    return torch.cat([features.double(), torch.ones(len(features), 1, dtype=torch.float64)], 1)


def residuals(probabilities: Tensor, labels: Tensor) -> Tensor:
    """p - onehot(y): [N, C]."""
    onehot = torch.nn.functional.one_hot(labels, probabilities.shape[1])
    return probabilities.double() - onehot


def temperature(logits: Tensor, labels: Tensor) -> float:
    """T in [1, 100] that minimises the loss of logits / T (Guo et al. 2017), by search.

    Never below one: where every label is right, sharpening would leave no gradient to compare.
    """
    candidates = torch.logspace(0, 2, 201, dtype=torch.float64)
    exact = logits.double()
    # As numbers: a tensor a candidate, kept between the freed logits, holds the heap open.
    losses = [torch.nn.functional.cross_entropy(exact / t, labels).item() for t in candidates]
    return candidates[int(np.argmin(losses))].item()


def solve_hessian(h: Tensor, p: Tensor, target: Tensor, damping: float, steps: int = 100) -> Tensor:
    """H⁻¹ target [C, D+1] by conjugate gradients; h: [N, D+1], p: [N, C].

    `damping` is relative to the mean of H's diagonal, which keeps it free of units.
    """
    diagonal = (p * (1 - p)).sum(1).dot(h.square().sum(1)) / (len(h) * target.numel())
    damp = damping * diagonal.clamp_min(1e-12)

    def apply(v: Tensor) -> Tensor:
        a = h @ v.T  # [N, C]
        a = p * (a - (p * a).sum(1, keepdim=True))
        return a.T @ h / len(h) + damp * v

    x, r = torch.zeros_like(target), target.clone()
    d, rr = r.clone(), r.square().sum()
    start = rr
    for _ in range(steps):
        if rr <= 1e-20 * start:
            break
        hd = apply(d)
        alpha = rr / (d * hd).sum()
        x, r = x + alpha * d, r - alpha * hd
        rr, before = r.square().sum(), rr
        d = r + (rr / before) * d
    return x


def direction(
    train: tuple[Tensor, Tensor], validation: tuple[Tensor, Tensor, Tensor], damping: float = 0.1
) -> Tensor:
    """S = H⁻¹ times the mean validation gradient, [C, D+1].

    train: (features [N, D], logits [N, C]), where H is taken; validation: the same and labels [V].
    """
    features, logits, labels = validation
    r = residuals(logits.double().softmax(1), labels)
    gradient = r.T @ with_bias(features) / len(labels)
    return solve_hessian(with_bias(train[0]), train[1].double().softmax(1), gradient, damping)


def influence_parts(features: Tensor, logits: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """(A [N, C], b [N]): with label y the influence of sample i is b_i - A_iy."""
    a = with_bias(features) @ s.T
    return a, (a * logits.double().softmax(1)).sum(1)


def of_labels(parts: tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
    """The influence [N] that the samples have with these labels."""
    a, b = parts
    return b - a.gather(1, labels[:, None])[:, 0]


def mean_over(models: Iterable[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The mean of each place of the models' tuples; memory does not grow with the models."""
    sums: tuple[Tensor, ...] = ()
    count = 0
    for found in models:
        sums = tuple(map(torch.add, sums, found)) if sums else found
        count += 1
    return tuple(total / count for total in sums)


def bootstrap_share(positive: np.ndarray, seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """95 % percentile interval of the share of true entries, by resampling the samples."""
    rng = np.random.default_rng(derive_seed("bootstrap", seed))
    shares = rng.binomial(len(positive), positive.mean(), draws) / len(positive)
    low, high = np.percentile(shares, [2.5, 97.5])
    return float(low), float(high)


def positive_share(
    parts: tuple[Tensor, Tensor], labels: Tensor, seed: int = 0, shuffles: int = 200
) -> dict[str, Any]:
    """Share of samples with positive influence, and its null; `parts` as of `influence_parts`.

    The null gives every sample the label of another one: what a set with these images but
    meaningless labels would score, as mean and 95 % range.
    """
    values = of_labels(parts, labels)
    positive = (values > 0).numpy()
    generator = torch.Generator().manual_seed(derive_seed("shuffle", seed))
    null = [
        (of_labels(parts, labels[torch.randperm(len(labels), generator=generator)]) > 0)
        .double().mean().item()
        for _ in range(shuffles)
    ]  # fmt: skip
    low, high = bootstrap_share(positive, seed)
    null_low, null_high = np.percentile(null, [2.5, 97.5]).tolist()
    return {
        "share": float(positive.mean()),
        "low": low,
        "high": high,
        "null": {"share": float(np.mean(null)), "low": null_low, "high": null_high},
        "n": len(labels),
        "values": values.tolist(),
    }
