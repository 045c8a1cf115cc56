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

from ..runtime.errors import UsageError, UtilgenError, first_line, no_memory

Objective = Callable[[Tensor, Tensor], Tensor]  # images [B, 3, H, W], labels [B] -> [B]
BY_VALUE = ("utility", "loss", "entropy")  # what a value model says
BUILT_IN = (*BY_VALUE, "clip")


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
    """The same callable, which says plainly when it fails, or its scores are none to climb."""
    what = f"--objective {name}"

    def score(images: Tensor, labels: Tensor) -> Tensor:
        try:
            scores: object = objective(images, labels)
        except UtilgenError:
            raise
        except Exception as error:  # a user's own code raises whatever it does
            if no_memory(error):
                raise
            raise UsageError(what, f"raised {type(error).__name__}: {first_line(error)}") from error
        if not isinstance(scores, torch.Tensor):
            advice = "Return a torch.Tensor of one score an image."
            raise UsageError(what, f"returned {type(scores).__name__}", advice)
        if scores.shape != labels.shape:
            why = f"returned shape {tuple(scores.shape)}, not {tuple(labels.shape)}"
            raise UsageError(what, why, "Return one score an image.")
        if images.requires_grad and not scores.requires_grad:
            advice = "Compute them from the images in torch, without detach or no_grad."
            raise UsageError(what, "returned scores without a gradient to the images", advice)
        return scores

    return score
