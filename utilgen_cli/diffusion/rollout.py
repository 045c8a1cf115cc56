"""Sampling that gradients flow through, from a prompt embedding to images.

Legend: x latents [B, 4, h, w]; eps predicted noise; cond the prompt [B, L, D]. At a step *with*
gradient eps depends on the prompt and on x; at a step without one it is a constant, and x passes
on through the linear part of the DDIM step alone.

The gradient comes by one of two ways, with the same result. `images` is an ordinary graph of the
whole run. `draw` keeps the latent of every step (64 KiB at 512 px) and no graph; `pull_back` then
walks from the last step to the first, and holds the graph of one U-Net call at a time:
    dcond += (deps/dcond)^T b_t g_s,    g_t = a_t g_s + (deps/dx_t)^T b_t g_s,
where x_s = a_t x_t + b_t eps is the DDIM step and g_s the gradient at x_s. Memory then does not
grow with the steps, for one more U-Net call a step: that of `draw`, which a batch that is larger
than memory needs in any case.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..runtime.device import free_memory
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
        if kind not in ("last", "random", "x0") or not number.isdecimal() or int(number) < least:
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


def default_chunk(model: LatentDiffusion) -> int:
    """Images whose graph of one step may be held at once: 320 small ones; of large ones what a GPU
    has room for, 1 on the CPU. One of 512 px takes 8 GiB in fp32 (tests/benchmarks/RESULTS.md).
    """
    _, height, width = model.latent_shape
    if height * width <= 256:
        return 320
    if model.device.type != "cuda":
        return 1
    graph = 2**33 * model.dtype.itemsize / 4 * height * width / 64**2
    return max(1, int(0.8 * free_memory(model.device) / graph))


@dataclass(frozen=True)
class Rollout:
    """How images are drawn while the prompt is optimised."""

    model: LatentDiffusion
    uncond: Tensor  # [1, L, D]
    steps: int
    guidance_scale: float
    grad_steps: GradSteps = GradSteps("all")

    def timesteps(self) -> list[int]:
        """The timesteps of the run, descending."""
        return [t for t, _ in ddim_transitions(self.model.scheduler, self.steps)]

    def images(self, noise: Tensor, cond: Tensor, chosen: set[int]) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] from noise; gradient to `cond` through the chosen steps."""
        return self.model.decode(self.latents(noise, cond, chosen)[-1])

    def latents(self, noise: Tensor, cond: Tensor, chosen: set[int]) -> list[Tensor]:
        """The noise [B, 4, h, w] and the latents after each step; the last are x_0, under x0@T the
        x0 that the chosen step predicts."""
        run = [noise]
        for i, (t, s) in enumerate(self._transitions(chosen)):
            with torch.set_grad_enabled(torch.is_grad_enabled() and i in chosen):
                eps = self._eps(run[-1], t, cond)
            run.append(self._step(run[-1], eps, t, s))
        return run

    @torch.no_grad()
    def draw(self, noise: Tensor, cond: Tensor, chosen: set[int]) -> tuple[list[Tensor], Tensor]:
        """`latents` and the images of the last ones: what `pull_back` takes, and no graph."""
        run = self.latents(noise, cond, chosen)
        return run, self.model.decode(run[-1])

    @torch.enable_grad()
    def pull_back(
        self, run: list[Tensor], cond: Tensor, chosen: set[int], gradient: Tensor
    ) -> Tensor:
        """G dimages/dcond [B, L, D] for G [B, 3, H, W] at the images that `draw` gave."""
        last = run[-1].detach().requires_grad_()
        (g,) = torch.autograd.grad(self.model.decode(last), last, gradient)
        total, transitions = torch.zeros_like(cond), self._transitions(chosen)
        for i in range(len(transitions) - 1, min(chosen) - 1, -1):
            t, s = transitions[i]
            if i not in chosen:
                g = self._step(g, torch.zeros_like(g), t, s)
                continue
            x, leaf = run[i].detach().requires_grad_(), cond.detach().requires_grad_()
            g, to_cond = torch.autograd.grad(
                self._step(x, self._eps(x, t, leaf), t, s), (x, leaf), g
            )
            total += to_cond
        return total

    def _transitions(self, chosen: set[int]) -> list[tuple[int, int | None]]:
        """(t, s) of the run; under x0@T it ends at the chosen step, whose s is None."""
        run: list[tuple[int, int | None]] = [*ddim_transitions(self.model.scheduler, self.steps)]
        if self.grad_steps.kind == "x0" and chosen:
            last = min(chosen)
            run[last:] = [(run[last][0], None)]
        return run

    def _step(self, x: Tensor, eps: Tensor, t: int, s: int | None) -> Tensor:
        """x_s from x_t, linear in both; x_0 where s is None."""
        alphas = chain_alphas(self.model.scheduler)
        return predict_x0(x, eps, t, alphas) if s is None else ddim_step(x, eps, t, s, alphas)

    def _eps(self, x: Tensor, t: int, cond: Tensor) -> Tensor:
        return guided_eps(self.model, x, t, cond, self.uncond, self.guidance_scale)
