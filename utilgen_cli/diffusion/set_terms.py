"""Values of a *set* of images, which no per-sample score can see.

Each term maps images [B, 3, H, W] and labels [B], equally many of each class present, to one
value a class; higher is better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from ..runtime.device import plain_attention
from ..runtime.errors import UsageError
from .clip import AT_ONCE

SPREAD = "spread"  # the name of the term that has nothing to say of one image a class
SetTerm = Callable[[Tensor, Tensor], Tensor]  # images, labels -> [classes present]
Features = Callable[[Tensor], Tensor]  # images [B, 3, H, W] -> [B, D]


def by_class(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of x grouped by class: ([C, n, ...], class indices [C])."""
    present, counts = labels.unique(return_counts=True)
    if len(set(counts.tolist())) != 1:
        raise UsageError("set term", "needs equally many images of each class")
    order = labels.argsort(stable=True)
    return x[order].view(len(present), -1, *x.shape[1:]), present


def spread(features: Features) -> SetTerm:
    """Mean 1 - cos between two images of a class, in unit features."""

    def term(images: Tensor, labels: Tensor) -> Tensor:
        z, _ = by_class(F.normalize(features(images), dim=1), labels)
        n = z.shape[1]
        cosine = z @ z.transpose(1, 2)
        return 1 - (cosine.sum((1, 2)) - n) / max(1, n * (n - 1))

    return term


def coverage(
    features: Features, shots: Tensor, shot_labels: Tensor, temperature: float = 0.05
) -> SetTerm:
    """How near some image of the class comes to each real shot: mean soft maximum of the cosine."""
    with torch.no_grad():
        real = F.normalize(torch.cat([features(x) for x in shots.split(AT_ONCE)]), dim=1)

    def term(images: Tensor, labels: Tensor) -> Tensor:
        z, present = by_class(F.normalize(features(images), dim=1), labels)
        values = [
            (torch.logsumexp(real[shot_labels == c] @ own.T / temperature, 1) * temperature).mean()
            for c, own in zip(present.tolist(), z, strict=True)
        ]
        return torch.stack(values)

    return term


def _shot_gradients(model: nn.Module, shots: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """`class_gradients` of shots [N, 3, H, W], class by class: they may differ in number."""
    each = [class_gradients(model, shots[labels == c][None], c[None]) for c in labels.unique()]
    return {name: torch.cat([g[name] for g in each]) for name in each[0]}


def class_gradients(model: nn.Module, images_cn: Tensor, labels_c: Tensor) -> dict[str, Tensor]:
    """Per class the gradient of the mean loss of [C, n, 3, H, W] images: name -> [C, ...].

    The classifier is in eval mode; differentiable with respect to the images.
    """
    parameters = {k: v.detach() for k, v in model.named_parameters() if v.requires_grad}
    buffers = dict(model.named_buffers())

    def loss(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        logits = functional_call(model, (p, buffers), (x,))
        return F.cross_entropy(logits, y.expand(len(x)))

    with plain_attention():
        return vmap(grad(loss), in_dims=(None, 0, 0))(parameters, images_cn, labels_c)


def gradient_match(snapshots: Sequence[nn.Module], shots: Tensor, shot_labels: Tensor) -> SetTerm:
    """Cosine between the classifier's gradient on a class's images and on its real shots.

    The mean over layers and snapshots (Zhao et al. 2021, dataset condensation): a step on such
    images then does to the classifier what a step on real ones would.
    """
    for snapshot in snapshots:
        snapshot.eval().requires_grad_(True)
    classes = shot_labels.unique()
    with torch.no_grad():
        real = [_shot_gradients(s, shots, shot_labels) for s in snapshots]

    def term(images: Tensor, labels: Tensor) -> Tensor:
        own, present = by_class(images, labels)
        rows = [classes.tolist().index(c) for c in present.tolist()]
        values = []
        for snapshot, target in zip(snapshots, real, strict=True):
            gradients = class_gradients(snapshot, own, present)
            values += [
                F.cosine_similarity(g.flatten(1), target[name][rows].flatten(1), dim=1)
                for name, g in gradients.items()
                if g.dim() > 2  # weights: [C, out, ...]
            ]
        return torch.stack(values).mean(0)

    return term
