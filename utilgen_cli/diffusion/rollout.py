"""Sampling that gradients flow through, from a prompt embedding to images.

Legend: x latents [B, 4, h, w]; eps predicted noise; cond the prompt [B, L, D]. At a step *with*
gradient eps depends on the prompt and on x; at a step without one it is a constant, and x passes
on through the linear part of the DDIM step alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..runtime.errors import UsageError
from .ddim import chain_alphas, ddim_step, ddim_transitions, guided_eps, predict_x0

if TYPE_CHECKING:
    from .load import LatentDiffusion

ADVICE = "Use all, last:K, random:K or x0@T (T a timestep, 0 to 999)."


@dataclass(frozen=True)
class GradSteps:
    """Which sampling steps carry the gradient of the prompt.

    all: every one, exact. last:K: the last K (DRaFT-K; the prompt's early share, layout, is lost).
    random:K: K steps drawn anew at each iteration, the others constant (an estimate of `all` that
    sees every step). x0@T: stop at timestep T and decode the x0 that one step predicts (ReFL).
    """

    kind: str
    count: int = 0

    @classmethod
    def parse(cls, text: str) -> GradSteps:
        """From `--grad-steps`; UsageError if it makes no sense."""
        if text == "all":
            return cls("all")
        kind, _, number = text.partition("@" if text.startswith("x0") else ":")
        least = 0 if kind == "x0" else 1
        if kind not in ("last", "random", "x0") or not number.isdigit() or int(number) < least:
            raise UsageError(f"--grad-steps {text}", "not understood", ADVICE)
        return cls(kind, int(number))

    def choose(self, timesteps: list[int], generator: torch.Generator) -> set[int]:
        """The indices of the steps with gradient among the descending `timesteps`."""
        n = len(timesteps)
        if self.kind == "last":
            return set(range(max(0, n - self.count), n))
        if self.kind == "random":
            return set(torch.randperm(n, generator=generator)[: self.count].tolist())
        if self.kind == "x0":
            return {min(range(n), key=lambda i: abs(timesteps[i] - self.count))}
        return set(range(n))


@dataclass(frozen=True)
class Rollout:
    """How images are drawn while the prompt is optimised."""

    model: LatentDiffusion
    uncond: Tensor  # [1, L, D]
    steps: int
    guidance_scale: float
    grad_steps: GradSteps = GradSteps("all")
    checkpointed: bool = (
        False  # recompute U-Net and VAE in the backward pass: less memory, more time
    )

    def timesteps(self) -> list[int]:
        """The timesteps of the run, descending."""
        return [t for t, _ in ddim_transitions(self.model.scheduler, self.steps)]

    def images(self, noise: Tensor, cond: Tensor, chosen: set[int]) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] from noise; gradient to `cond` through the chosen steps."""
        latents = self.latents(noise, cond, chosen)
        return self._call(self.model.decode, latents)

    def latents(self, noise: Tensor, cond: Tensor, chosen: set[int]) -> Tensor:
        """Latents x_0 [B, 4, h, w]; under x0@T the x0 predicted at the chosen step."""
        alphas = chain_alphas(self.model.scheduler)
        x = noise
        for i, (t, s) in enumerate(ddim_transitions(self.model.scheduler, self.steps)):
            with torch.set_grad_enabled(torch.is_grad_enabled() and i in chosen):
                eps = self._call(self._eps, x, t, cond)
            if self.grad_steps.kind == "x0" and i in chosen:
                return predict_x0(x, eps, t, alphas)
            x = ddim_step(x, eps, t, s, alphas)
        return x

    def _eps(self, x: Tensor, t: int, cond: Tensor) -> Tensor:
        return guided_eps(self.model, x, t, cond, self.uncond, self.guidance_scale)

    def _call(self, function: Callable[..., Tensor], *arguments: object) -> Tensor:
        if self.checkpointed and torch.is_grad_enabled():
            return checkpoint(function, *arguments, use_reentrant=False)
        return function(*arguments)
