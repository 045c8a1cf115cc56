"""Noise optimisation: eps' = DDIM-Inv_{omega_w}( DDIM_{omega_l}(eps, p*) ).

Legend: x_t latents; a_t cumulative alpha; eps_c, eps_u the noise predicted with and without the
prompt; omega_l, omega_w guidance scales of the denoising and of the inverting half; (t, s) a step
from t down to s. Both halves share the coefficients of the step, so one step and back is
    x'_t = x_t - k_t (omega_l - omega_w) (eps_c - eps_u),
    k_t = sqrt(1 - a_t) - sqrt(a_t (1 - a_s) / a_s).
k_T grows as the steps get fewer: a strength is stated at 50 steps and converted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime.errors import UsageError
from .ddim import (
    chain_alphas,
    ddim_inverse_step,
    ddim_step,
    ddim_transitions,
    guided_eps,
    sample,
    to_eps,
)
from .guidance import output_halves

if TYPE_CHECKING:
    from .load import LatentDiffusion

MODES = ("none", "single", "zigzag", "full")
REFERENCE_STEPS = 50
Prompts = tuple[Tensor, Tensor]  # cond [B, L, D], uncond [1, L, D]


@dataclass(frozen=True)
class NoiseConfig:
    """`single`: one step at T and back (Golden Noise); `zigzag`: at every step; `full`: the chain.

    omega_l - omega_w holds at 50 steps; `at_steps` rescales it for other counts, so that the noise
    moves equally far. `refine` bounds the fixed-point iterations of an inverse step; an image whose
    relative change falls below `tolerance` is left alone from then on.
    """

    mode: str = "none"
    omega_l: float = 5.5
    omega_w: float = 1.0
    refine: int = 0
    tolerance: float = 1e-5

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UsageError(f"--noise {self.mode}", "unknown", f"Use one of {', '.join(MODES)}.")

    def at_steps(self, scheduler: Any, steps: int) -> NoiseConfig:
        """The same strength at another number of steps."""
        factor = strength(scheduler, REFERENCE_STEPS, self.mode) / strength(
            scheduler, steps, self.mode
        )
        return replace(self, omega_l=self.omega_w + factor * (self.omega_l - self.omega_w))

    def facts(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


def step_strength(alphas: Tensor, t: int, s: int) -> float:
    """k_t of the step from t to s."""
    a_t, a_s = alphas[t].double(), alphas[s].double()
    return float((1 - a_t).sqrt() - (a_t * (1 - a_s) / a_s).sqrt())


def strength(scheduler: Any, steps: int, mode: str = "single") -> float:
    """Sum of k_t over the steps that the mode walks back."""
    transitions = ddim_transitions(scheduler, steps)
    used = transitions if mode in ("zigzag", "full") else transitions[:1]
    return sum(step_strength(chain_alphas(scheduler), t, s) for t, s in used)


def eps_halves(
    model: LatentDiffusion, x: Tensor, t: int, prompts: Prompts
) -> tuple[Tensor, Tensor]:
    """(eps_u, eps_c) at x_t: one U-Net call on the doubled batch."""
    low, high = output_halves(model, x, t, *prompts)
    return to_eps(low, x, t, model.scheduler), to_eps(high, x, t, model.scheduler)


def invert_step(
    model: LatentDiffusion,
    x_s: Tensor,
    transition: tuple[int, int],
    prompts: Prompts,
    config: NoiseConfig,
    start: Tensor | None = None,
) -> Tensor:
    """x_t [B, 4, h, w] from which one DDIM step at guidance omega_w leads to x_s.

    Fixed-point iteration of x_t = inverse(x_s, eps(x_t, t)) from `start`, or from the usual
    approximation eps(x_s, t). Each image settles by itself, whatever else is in the batch.
    """
    t, s = transition
    alphas = chain_alphas(model.scheduler)

    def iterate(x: Tensor) -> Tensor:
        eps = guided_eps(model, x, t, *prompts, config.omega_w)
        return ddim_inverse_step(x_s, eps, s, t, alphas)

    x_t = iterate(x_s) if start is None else start
    moving = torch.ones(len(x_t), dtype=torch.bool, device=x_t.device)
    for _ in range(config.refine):
        better = torch.where(moving[:, None, None, None], iterate(x_t), x_t)
        change = (better - x_t).flatten(1).norm(dim=1)
        moving = moving & (change > config.tolerance * x_t.flatten(1).norm(dim=1))
        x_t = better
        if not moving.any():  # a GPU's host waits here: it may save a U-Net call
            break
    return x_t


def there_and_back(
    model: LatentDiffusion,
    x_t: Tensor,
    transition: tuple[int, int],
    prompts: Prompts,
    config: NoiseConfig,
) -> Tensor:
    """x'_t: one step down at omega_l, back at omega_w. One U-Net call, at most `refine` more.

    The inverse starts at x_t, where both halves need the same eps_c and eps_u.
    """
    t, s = transition
    alphas = chain_alphas(model.scheduler)
    low, high = eps_halves(model, x_t, t, prompts)
    x_s = ddim_step(x_t, low + config.omega_l * (high - low), t, s, alphas)
    back = ddim_inverse_step(x_s, low + config.omega_w * (high - low), s, t, alphas)
    return invert_step(model, x_s, transition, prompts, config, back)


def round_trip(
    model: LatentDiffusion, x: Tensor, steps: int, prompts: Prompts, config: NoiseConfig
) -> Tensor:
    """The whole chain down at omega_l, up at omega_w: 2 U-Net calls a step, plus `refine`."""
    alphas = chain_alphas(model.scheduler)
    transitions = ddim_transitions(model.scheduler, steps)
    for t, s in transitions:
        x = ddim_step(x, guided_eps(model, x, t, *prompts, config.omega_l), t, s, alphas)
    for transition in reversed(transitions):
        x = invert_step(model, x, transition, prompts, config)
    return x


def optimise_noise(
    model: LatentDiffusion, noise: Tensor, steps: int, prompts: Prompts, config: NoiseConfig
) -> Tensor:
    """eps' of `single` and `full`; the noise itself otherwise. `config` as `at_steps` gives it."""
    if config.mode == "single":
        first = ddim_transitions(model.scheduler, steps)[0]
        return there_and_back(model, noise, first, prompts, config)
    if config.mode == "full":
        return round_trip(model, noise, steps, prompts, config)
    return noise


def zigzag(
    model: LatentDiffusion,
    x: Tensor,
    steps: int,
    prompts: Prompts,
    guidance_scale: float,
    config: NoiseConfig,
) -> tuple[Tensor, Tensor]:
    """(latents x_0, first x'_T), where each step starts from the x'_t of `there_and_back`."""
    alphas = chain_alphas(model.scheduler)
    first = x
    for i, (t, s) in enumerate(ddim_transitions(model.scheduler, steps)):
        x = there_and_back(model, x, (t, s), prompts, config)
        first = x if i == 0 else first
        x = ddim_step(x, guided_eps(model, x, t, *prompts, guidance_scale), t, s, alphas)
    return x, first


@torch.no_grad()
def sample_optimised(
    model: LatentDiffusion,
    noise: Tensor,
    prompts: Prompts,
    steps: int,
    guidance_scale: float,
    config: NoiseConfig,
    sampler: str = "ddim",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Latents [B, 4, h, w] from optimised noise, and `describe_noise` of that noise."""
    config = config.at_steps(model.scheduler, steps)
    if config.mode == "zigzag":
        latents, better = zigzag(model, noise, steps, prompts, guidance_scale, config)
    else:
        better = optimise_noise(model, noise, steps, prompts, config)
        latents = sample(model, better, *prompts, steps, guidance_scale, sampler)
    return latents, describe_noise(better, noise)


def describe_noise(noise: Tensor, before: Tensor) -> dict[str, Tensor]:
    """Norm and whiteness of noise [B, 4, h, w]; white unit noise has norm 1 and correlations 0.
    Scalars on the noise's device, so that nobody waits for them.

    `neighbours` is the correlation of horizontal and vertical neighbours, `channels` the mean
    absolute correlation between channels, `mean` the absolute mean; `moved` the relative distance
    from `before`.
    """
    x = noise.float()
    d = x[0].numel()
    moved = (x - before.float()).flatten(1).norm(dim=1) / before.float().flatten(1).norm(dim=1)
    power = x.square().mean((1, 2, 3))
    pairs = (
        (x[..., 1:] * x[..., :-1]).mean((1, 2, 3)),
        (x[..., 1:, :] * x[..., :-1, :]).mean((1, 2, 3)),
    )
    flat = x.flatten(2) - x.flatten(2).mean(2, keepdim=True)
    rows = F.normalize(flat.transpose(0, 1).flatten(1), dim=1)  # over all images
    pooled = rows @ rows.T  # [channels, channels]
    off = pooled - torch.diag(pooled.diagonal())
    channels = len(off)
    return {
        "norm": (x.flatten(1).norm(dim=1) / d**0.5).mean(),
        "mean": x.mean((1, 2, 3)).abs().mean(),
        "neighbours": ((pairs[0] + pairs[1]) / (2 * power)).mean(),
        "channels": off.abs().sum() / max(1, channels * (channels - 1)),
        "moved": moved.mean(),
    }


class Calls:
    """How often the U-Net ran, and on how many latents."""

    def __init__(self) -> None:
        self.calls, self.latents = 0, 0

    def __call__(self, module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        self.calls += 1
        self.latents += len(arguments[0])


@contextmanager
def counted(unet: torch.nn.Module, calls: Calls | None = None) -> Iterator[Calls]:
    """Count the calls of the U-Net inside the block (further, with `calls`)."""
    calls = Calls() if calls is None else calls
    handle = unet.register_forward_pre_hook(calls)
    try:
        yield calls
    finally:
        handle.remove()
