"""Other values of a sample, on the same classifiers: loss, KNN-Shapley, influence."""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime.errors import UsageError
from .value_model import Judgement, ValueModel

METHODS = ("weight-net", "loss", "knn-shapley", "influence")
NEIGHBOURS = 10


def values_of(method: str, value: ValueModel, judged: Judgement, labels: Tensor) -> Tensor:
    """The value of each judged sample under `method`, higher is better, [B]."""
    if method == "weight-net":
        return judged.utility
    if method == "loss":
        return judged.loss  # GAP (Yeo et al. 2024) looks for images that the classifier fails on
    if method == "influence":
        # Pruthi et al. 2020: what influences its own loss most is wrongly labelled. The product
        # with the mean validation gradient tells nothing (AUROC .47 on 20 % wrong labels).
        return judged.influence
    reference = value.reference
    return knn_shapley_joined(
        reference["train_features"], reference["train_labels"],
        reference["validation_features"], reference["validation_labels"],
        judged.features, labels,
    )  # fmt: skip


def check_method(method: str) -> str:
    """The method itself; UsageError where there is none of that name."""
    if method == "data-oob":
        raise UsageError(
            "--method data-oob", "values the samples of a training set, not new ones in a stream",
            f"Use one of {', '.join(METHODS)}.",
        )  # fmt: skip
    if method not in METHODS:
        raise UsageError(f"--method {method}", "unknown", f"Use one of {', '.join(METHODS)}.")
    return method


def knn_shapley(
    features: Tensor, labels: Tensor, val_features: Tensor, val_labels: Tensor, k: int = NEIGHBOURS
) -> Tensor:
    """Exact Shapley value of each training point for a K-NN classifier, [N].

    Jia et al. 2019, theorem 1; features [N, D] and [V, D] are compared by cosine distance.
    """
    n = len(labels)
    order = (val_features @ features.T).argsort(dim=1, descending=True, stable=True)  # [V, N]
    match = (labels[order] == val_labels[:, None]).to(features.dtype)
    s = _suffix_sums(match, torch.arange(1, n + 1, device=features.device), k)
    s = s + match[:, -1:] * min(k, n) / (n * k)
    return torch.zeros_like(s).scatter(1, order, s).mean(0)


def knn_shapley_joined(
    features: Tensor, labels: Tensor, val_features: Tensor, val_labels: Tensor,
    new_features: Tensor, new_labels: Tensor, k: int = NEIGHBOURS,
) -> Tensor:  # fmt: skip
    """KNN-Shapley of each new point when it alone joins the training points, [B]; memory is flat.

    The recursion below the new point's rank involves old points only, so its sums are shared.
    """
    n, v = len(labels), len(val_labels)
    similar, order = (val_features @ features.T).sort(dim=1, descending=True, stable=True)
    match = (labels[order] == val_labels[:, None]).to(features.dtype)  # [V, N]
    # An old point that stood at rank i (from 1) stands at i + 1 behind the new one.
    behind = _suffix_sums(match, torch.arange(2, n + 2, device=features.device), k)
    farthest = min(k, n + 1) / ((n + 1) * k)
    behind = torch.cat([behind + match[:, -1:] * farthest, features.new_zeros(v, 1)], 1)
    closeness = val_features @ new_features.T  # [V, B]
    rank = torch.searchsorted(-similar, -closeness, right=True)  # old points before the new one
    own = (new_labels[None] == val_labels[:, None]).to(features.dtype)
    after = torch.cat([match, features.new_zeros(v, 1)], 1).gather(1, rank)
    place = rank + 1.0
    step = (own - after) / k * place.clamp_max(k) / place
    last = torch.where(rank == n, own * farthest, step + behind.gather(1, rank))
    return last.mean(0)


def _suffix_sums(match: Tensor, ranks: Tensor, k: int) -> Tensor:
    """Sum over j >= i of (match_j - match_{j+1}) / k * min(k, rank_j) / rank_j, [V, N]."""
    steps = torch.zeros_like(match)
    factor = ranks[:-1].clamp_max(k) / ranks[:-1]
    steps[:, :-1] = (match[:, :-1] - match[:, 1:]) / k * factor
    return steps.flip(1).cumsum(1).flip(1)
