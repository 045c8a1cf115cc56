"""The gradient of the objective's terms: at the images, and pulled back to the prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .rollout import Rollout


@dataclass(frozen=True)
class Term:
    """A summand of the objective: images, labels -> [B] or [classes]; its mean counts."""

    name: str
    weight: float
    function: Callable[[Tensor, Tensor], Tensor]
    judge: Callable[[Tensor, Tensor], Tensor] | None = None  # of iterates, instead of `function`


def class_blocks(classes: Tensor, rows: int) -> list[Tensor]:
    """Where the images of some whole classes stand, `rows` of them or fewer if that is more than
    one class; `classes` [B] has equally many of each class."""
    _, where = classes.unique(return_inverse=True)
    count = int(where.max()) + 1
    step = max(1, rows * count // len(classes))
    return [((where >= c) & (where < c + step)).nonzero()[:, 0] for c in range(0, count, step)]


def term_gradient(term: Term, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """B times the gradient of the term's mean at images [B, 3, H, W], and its squared norm at each
    image [B]."""
    leaf = images.detach().requires_grad_()
    with torch.enable_grad():
        value = term.function(leaf, labels).mean() * len(leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    return gradient, gradient.flatten(1).norm(dim=1).square()


def unit_scale(x: Tensor) -> int:
    """The power of two (which rounds nothing) that brings the elements of a vector like x and of
    norm 1 near to 1. Those of an image of 512 px are about .001, and what is pulled back from them
    can be too small for fp16."""
    return 1 << round(math.log2(x.numel()) / 2)


def rms_norm(squares: Sequence[Tensor]) -> float:
    """The root mean square of the norms whose squares are given in parts."""
    return float(torch.cat(list(squares)).mean().sqrt())


def image_gradients(
    terms: list[Term],
    images: Tensor,
    labels: Tensor,
    rows: int | None = None,
    in_place: bool = False,
) -> tuple[Tensor, dict[str, float]]:
    """(G [B, 3, H, W], rms|g_k| by term name) at detached images.

    The terms see whole classes, `rows` images at once (all without). The images may lie on the
    host: then G does; `in_place`, where they lay.
    """
    parts = [images if in_place and not k else torch.empty_like(images) for k in range(len(terms))]
    squares: list[list[Tensor]] = [[] for _ in terms]
    for at in class_blocks(labels, rows or len(labels)):
        here, y = at.to(images.device), labels[at]
        x = images[here].to(labels.device)
        for term, part, found in zip(terms, parts, squares, strict=True):
            gradient, square = term_gradient(term, x, y)
            part[here] = gradient.to(images.device)
            found.append(square)
    scales = {t.name: rms_norm(found) for t, found in zip(terms, squares, strict=True)}
    for term, part in zip(terms, parts, strict=True):
        scale = scales[term.name]
        part.mul_(term.weight / scale) if scale > 0 else part.zero_()
    total, *others = parts
    for part in others:
        total += part
    return total, scales


def accumulate(
    rollout: Rollout,
    cond: Tensor,
    noise: Tensor,
    chosen: set[int],
    gradient_of: Callable[[Tensor], Tensor],
    chunk: int,
    between: Callable[[], None] = lambda: None,
) -> Tensor:
    """G dimages/dcond [B, L, D]; of `chunk` images the graph of one step is held, or as much.
    `between` is called before each such part.

    A run that fits, decoding included, is one graph. A larger one is drawn without, for G (a term
    may value the whole set); then G is pulled back step by step and chunk by chunk. Its images lie
    on the host, and G, which may take their place.
    """
    if len(noise) * (len(chosen) + 1) <= chunk:
        leaf = cond.detach().requires_grad_()
        images = rollout.images(noise, leaf, chosen)
        (gradient,) = torch.autograd.grad(images, leaf, gradient_of(images.detach().clone()))
        return gradient
    parts = list(zip(noise.split(chunk), cond.detach().split(chunk), strict=True))
    runs, host = [], torch.empty(0)
    for number, (x, p) in enumerate(parts):
        between()
        run, images = rollout.draw(x, p, chosen)
        runs.append(run)
        if not number:
            host = images.new_empty(len(noise), *images.shape[1:], device="cpu")
        host[number * chunk : number * chunk + len(x)] = images
    gradients = gradient_of(host).split(chunk)
    pulled = []
    for run, (_, p), g in zip(runs, parts, gradients, strict=True):
        between()
        pulled.append(rollout.pull_back(run, p, chosen, g.to(p.device)))
    return torch.cat(pulled)
