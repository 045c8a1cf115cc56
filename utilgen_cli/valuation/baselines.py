"""Other values of a sample, on the same classifiers: loss, KNN-Shapley, influence."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime.errors import UsageError
from .value_model import Judgement, ValueModel

# [v, N] distances (minus the cosine, rising); [v, N + 1] whether the labels match, and the sums of
# the points from there on
Table = tuple[Tensor, Tensor, Tensor]
METHODS = ("weight-net", "loss", "knn-shapley", "influence")
NEIGHBOURS = 10
ROWS = 256  # validation points that are sorted by at once


def valuer(method: str, value: ValueModel) -> Callable[[Judgement, Tensor], Tensor]:
    """What gives judged samples and their labels [B] their values under `method`, higher is
    better, [B]."""
    if method == "weight-net":
        return lambda judged, _: judged.utility
    if method == "loss":  # GAP (Yeo et al. 2024) looks for images that the classifier fails on
        return lambda judged, _: judged.loss
    if method == "influence":
        # Pruthi et al. 2020: what influences its own loss most is wrongly labelled. The product
        # with the mean validation gradient tells nothing (AUROC .47 on 20 % wrong labels).
        return lambda judged, _: judged.influence
    r = value.reference
    joined = JoinedShapley(
        r["train_features"], r["train_labels"], r["validation_features"], r["validation_labels"]
    )
    return lambda judged, labels: joined(judged.features, labels)


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


class JoinedShapley:
    """KNN-Shapley of new points, each when it alone joins the training points.

    The recursion below a new point's rank involves old points only: its sums are made once.
    """

    def __init__(
        self, features: Tensor, labels: Tensor, val_features: Tensor, val_labels: Tensor,
        k: int = NEIGHBOURS,
    ) -> None:  # fmt: skip
        self.n, self.k = len(labels), k
        self.points = list(zip(val_features.split(ROWS), val_labels.split(ROWS), strict=True))
        self.tables = [self._table(features, labels, *part) for part in self.points]

    def __call__(self, features: Tensor, labels: Tensor) -> Tensor:
        """The values of new points, [B]."""
        parts = zip(self.points, self.tables, strict=True)
        return torch.cat([self._joined(features, labels, *p, *t) for p, t in parts]).mean(0)

    def _table(self, features: Tensor, labels: Tensor, x: Tensor, y: Tensor) -> Table:
        similar, order = (x @ features.T).sort(dim=1, descending=True, stable=True)
        match = (labels[order] == y[:, None]).to(features.dtype)
        # An old point that stood at rank i (from 1) stands at i + 1 behind the new one.
        ranks = torch.arange(2, self.n + 2, device=match.device)
        behind = _suffix_sums(match, ranks, self.k) + match[:, -1:] * self._farthest
        return -similar, F.pad(match, (0, 1)).to(torch.uint8), F.pad(behind, (0, 1))

    @property
    def _farthest(self) -> float:
        return min(self.k, self.n + 1) / ((self.n + 1) * self.k)

    def _joined(
        self, features: Tensor, labels: Tensor, x: Tensor, y: Tensor,
        distance: Tensor, match: Tensor, behind: Tensor,
    ) -> Tensor:  # fmt: skip
        rank = torch.searchsorted(distance, -(x @ features.T), right=True)  # old points before it
        own = (labels == y[:, None]).to(features.dtype)
        place = rank + 1.0
        step = (own - match.gather(1, rank).to(own)) / self.k * place.clamp_max(self.k) / place
        return torch.where(rank == self.n, own * self._farthest, step + behind.gather(1, rank))


def _suffix_sums(match: Tensor, ranks: Tensor, k: int) -> Tensor:
    """Sum over j >= i of (match_j - match_{j+1}) / k * min(k, rank_j) / rank_j, [V, N]."""
    steps = torch.zeros_like(match)
    factor = ranks[:-1].clamp_max(k) / ranks[:-1]
    steps[:, :-1] = (match[:, :-1] - match[:, 1:]) / k * factor
    return steps.flip(1).cumsum(1).flip(1)
