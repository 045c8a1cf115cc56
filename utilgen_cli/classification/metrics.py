"""Accuracy, calibration, and differences between arms with their intervals. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of the samples whose largest logit is the label's."""
    return (logits.argmax(1) == labels).double().mean().item()


def per_class_accuracy(logits: Tensor, labels: Tensor, num_classes: int) -> list[float | None]:
    """Accuracy (recall) of each class; None where the class has no sample."""
    right = (logits.argmax(1) == labels).double()
    total = torch.bincount(labels, minlength=num_classes).double()
    hits = torch.zeros(num_classes, dtype=torch.float64).scatter_add_(0, labels, right)
    return [h / n if n else None for h, n in zip(hits.tolist(), total.tolist(), strict=True)]


def expected_calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """ECE with equal-width confidence bins (Guo et al. 2017, eq. 5)."""
    confidence, predicted = logits.double().softmax(1).max(1)
    right = (predicted == labels).double()
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gap = torch.zeros(bins, dtype=torch.float64).scatter_add_(0, index, right - confidence)
    return (gap.abs().sum() / len(labels)).item()


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> float:
    """Mean cross-entropy."""
    return torch.nn.functional.cross_entropy(logits.double(), labels).item()


def mean_std(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and sample standard deviation (None for a single value)."""
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": spread}


ROUNDING = 1e-12  # differences of accuracies that are all one number spread by less


def paired_difference(
    values: Sequence[float], baseline: Sequence[float], confidence: float = 0.95
) -> dict[str, Any]:
    """Mean of the paired differences, Student's t interval, and two-sided p of no difference.

    Values are paired by position (by seed). With one pair, or no spread, what cannot be known
    is None.
    """
    from scipy import stats

    d = np.asarray(values, dtype=float) - np.asarray(baseline, dtype=float)
    n, mean = len(d), float(d.mean())
    result: dict[str, Any] = {"mean": mean, "low": None, "high": None, "p": None, "n": n}
    error = float(d.std(ddof=1)) / math.sqrt(n) if n > 1 else 0.0
    if error > ROUNDING:
        half = float(stats.t.ppf(0.5 + confidence / 2, n - 1)) * error
        p = 2 * float(stats.t.sf(abs(mean) / error, n - 1))
        result |= {"low": mean - half, "high": mean + half, "p": p}
    return result


def holm(values: Sequence[float | None]) -> list[float | None]:
    """p values corrected for how many there are (Holm 1979); None where there is none."""
    known = sorted((p, i) for i, p in enumerate(values) if p is not None)
    found: list[float | None] = [None] * len(values)
    highest = 0.0
    for rank, (p, i) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * p))
        found[i] = highest
    return found


def score(logits: Tensor, labels: Tensor, num_classes: int) -> dict[str, Any]:
    """All figures of one tested classifier."""
    classes = per_class_accuracy(logits, labels, num_classes)
    return {
        "accuracy": accuracy(logits, labels),
        "per_class": classes,
        "worst_class": min(a for a in classes if a is not None),
        "ece": expected_calibration_error(logits, labels),
        "nll": negative_log_likelihood(logits, labels),
    }
