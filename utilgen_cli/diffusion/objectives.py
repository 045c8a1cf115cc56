"""What instance-level optimisation climbs: callables `images in [0, 1], labels -> score [B]`.

This room knows no value model: whatever gives a `Verdict` can be handed in.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..runtime.errors import UsageError

Objective = Callable[[Tensor, Tensor], Tensor]  # images [B, 3, H, W], labels [B] -> [B]
BUILT_IN = ("utility", "loss", "entropy", "clip")


class Verdict(Protocol):
    """What a value model says of images."""

    logit: Tensor  # [B], the weight network's score before its sigmoid
    loss: Tensor  # [B], cross-entropy of the classifier
    probabilities: Tensor  # [B, C], of the classifier


Judge = Callable[[Tensor, Tensor], Any]  # images, labels -> Verdict


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy in nats of distributions [B, C]: [B]."""
    return -(probabilities * probabilities.clamp_min(1e-12).log()).sum(1)


def make_objective(name: str, judge: Judge, clip_score: Objective) -> Objective:
    """The named objective; every one is better when higher.

    utility: the logit of W_phi (W itself saturates, and its gradient with it);
    loss, entropy: the two adversarial signals of GAP; clip: cos(image, class text);
    MODULE:FUNCTION: a callable of one's own. Raises UsageError for anything else.
    """
    if name == "utility":
        return lambda images, labels: judge(images, labels).logit
    if name == "loss":
        return lambda images, labels: judge(images, labels).loss
    if name == "entropy":
        return lambda images, labels: entropy(judge(images, labels).probabilities)
    if name == "clip":
        return clip_score
    return imported(name)


def imported(name: str) -> Objective:
    """The callable MODULE:FUNCTION; modules of the working directory are found as well."""
    module, _, function = name.partition(":")
    advice = f"Use {', '.join(BUILT_IN)} or MODULE:FUNCTION."
    if not function:
        raise UsageError(f"--objective {name}", "unknown objective", advice)
    try:
        if (here := str(Path.cwd())) not in sys.path:
            sys.path.append(here)
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"--objective {name}", str(error), advice) from None
    return checked(found, name)


def checked(objective: Objective, name: str) -> Objective:
    """The same callable, which says plainly when its scores have the wrong shape."""

    def score(images: Tensor, labels: Tensor) -> Tensor:
        scores = objective(images, labels)
        if not isinstance(scores, torch.Tensor) or scores.shape != labels.shape:
            shape = tuple(getattr(scores, "shape", ()))
            raise UsageError(
                f"--objective {name}", f"returned shape {shape}, not {tuple(labels.shape)}",
                "Return one score an image.",
            )  # fmt: skip
        return scores

    return score
