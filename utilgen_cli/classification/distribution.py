"""How a synthetic set lies beside a real one, in the features of a named extractor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.seeds import derive_seed

ROWS = 1024  # of a matrix of distances that stand at once: memory stays linear in the samples
DRAWS = 5  # of a set that is larger than those that it is compared with


def nearest_radii(features: Tensor, k: int) -> Tensor:
    """Distance of each row to its k-th nearest other row: [N, D] -> [N]."""
    parts = features.split(ROWS)
    return torch.cat([torch.cdist(p, features).kthvalue(k + 1, dim=1).values for p in parts])


def prdc(real: Tensor, synthetic: Tensor, k: int = 5) -> dict[str, float]:
    """Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020).

    real: [N, D], synthetic: [M, D]; k is cut to what the smaller set allows.
    """
    k = max(1, min(k, len(real) - 1, len(synthetic) - 1))
    radius_real, radius_synthetic = nearest_radii(real, k), nearest_radii(synthetic, k)
    around = torch.zeros(len(synthetic), dtype=torch.long)  # balls of real samples around each
    recalled = covered = 0
    for part, radius in zip(real.split(ROWS), radius_real.split(ROWS), strict=True):
        distance = torch.cdist(part, synthetic)  # [ROWS, M]
        around += (distance < radius[:, None]).sum(0)
        recalled += int((distance < radius_synthetic).any(1).sum())
        covered += int((distance.amin(1) < radius).sum())
    return {
        "precision": (around > 0).double().mean().item(),
        "recall": recalled / len(real),
        "density": around.double().mean().item() / k,
        "coverage": covered / len(real),
    }


class _Features(nn.Identity):
    """Hands features through torchmetrics, which wants a module with `num_features`."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def frechet_distance(real: Tensor, synthetic: Tensor) -> float:
    """Fréchet distance of the two feature sets (torchmetrics' FID, in double precision)."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Features(real.shape[1])).set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(synthetic.double(), real=False)
    return metric.compute().item()


def kernel_distance(real: Tensor, synthetic: Tensor, seed: int = 0) -> dict[str, float]:
    """KID (torchmetrics; unbiased, cubic kernel): mean and deviation over 50 random subsets."""
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(100, len(real), len(synthetic))
    metric = KernelInceptionDistance(
        feature=_Features(real.shape[1]), subsets=50, subset_size=size
    ).set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(synthetic.double(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("kid", seed))
        mean, std = metric.compute()
    return {"mean": mean.item(), "std": std.item(), "subset_size": size}


def spread(features: Tensor, labels: Tensor) -> float:
    """Mean distance of two samples of one class, averaged over the classes with two or more (0
    without such).

    Of each class the first thousand samples are looked at.
    """
    means = []
    for label in labels.unique().tolist():
        own = features[labels == label][:1000]
        if len(own) > 1:
            means.append(torch.pdist(own).mean())
    return torch.stack(means).mean().item() if means else 0.0


def some_of_each(labels: Tensor, count: int, seed: int) -> Tensor:
    """`count` of the samples at random, of each class as large a share as it has, int64 [count]."""
    generator = torch.Generator().manual_seed(derive_seed("some of each", seed))
    order = torch.randperm(len(labels), generator=generator)
    place = torch.zeros(len(labels))  # among those of its class, from 0 to 1
    for label in labels.unique():
        own = order[labels[order] == label]
        place[own] = (torch.arange(len(own)) + 0.5) / len(own)
    return order[place[order].argsort(stable=True)][:count]


def compare(
    real: Tensor,
    real_labels: Tensor,
    synthetic: Tensor,
    synthetic_labels: Tensor,
    extractor: str,
    count: int | None = None,
) -> dict[str, Any]:
    """All figures, with the sizes of what was compared and the extractor's name.

    `diversity` is the within-class spread of the synthetic set over that of the real one; None
    where no class has two images. The others but KID depend on how many images there are: of a set
    that has more than `count` they are the means over `DRAWS` draws of so many.
    """
    scale = real.std().clamp_min(1e-8)  # KID's cubic kernel needs features of order one
    real, synthetic = real / scale, synthetic / scale
    spreads = spread(synthetic, synthetic_labels), spread(real, real_labels)
    count = min(count or len(synthetic), len(synthetic))
    found: list[dict[str, Any]] = []
    whole = torch.arange(len(synthetic))
    draws = [some_of_each(synthetic_labels, count, draw) for draw in range(DRAWS)]
    for at in draws if count < len(synthetic) else [whole]:
        part = synthetic[at]
        found.append({
            **prdc(real, part),
            "fid": frechet_distance(real, part),
            "kid": kernel_distance(real, part),
        })  # fmt: skip
    return {
        **_mean(found),
        "diversity": spreads[0] / spreads[1] if all(spreads) else None,
        "n_real": len(real),
        "n_synthetic": count,
        "extractor": extractor,
    }


def _mean(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean of each figure over the draws."""
    first, *others = found
    if not others:
        return first
    columns = {name: [row[name] for row in found] for name in first}
    return {
        name: _mean(column) if isinstance(first[name], dict) else sum(column) / len(column)
        for name, column in columns.items()
    }
