"""DDIM (Song et al. 2021, arXiv 2010.02502): the step, its inverse, sampling runs.

Legend: x is a noisy latent x_t [B, 4, h, w]; eps the predicted noise of the same shape; `alphas` is
alpha-bar with the chain's end appended, float [T + 1], so that t = -1 means "after the last step".
`model` is a `LatentDiffusion`; only `unet`, `scheduler`, `latent_shape` and `device` are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..runtime.device import sent
from ..runtime.errors import UsageError
from ..runtime.seeds import sample_generator
from .guidance import guided_output

if TYPE_CHECKING:
    from .load import LatentDiffusion

SAMPLERS = ("ddim", "dpm++", "unipc")


def ddim_timesteps(scheduler: Any, steps: int) -> list[int]:
    """The timesteps of a run, descending, as diffusers' DDIMScheduler sets them."""
    check_steps(scheduler, steps)
    scheduler.set_timesteps(steps)
    timesteps: list[int] = scheduler.timesteps.tolist()
    last = scheduler.config.num_train_timesteps - 1
    # steps_offset may point past the last one, and then no two steps begin there
    return list(dict.fromkeys(min(t, last) for t in timesteps))


def check_steps(scheduler: Any, steps: int, option: str = "--steps") -> None:
    """UsageError where a run cannot have so many steps, or so few."""
    n = scheduler.config.num_train_timesteps
    if not 1 <= steps <= n:
        raise UsageError(f"{option} {steps}", f"must lie between 1 and {n}")


def ddim_transitions(scheduler: Any, steps: int) -> list[tuple[int, int]]:
    """The (t, t_prev) pairs of a run, descending; the last t_prev is -1, the end of the chain.

    Each step ends where the next one begins. diffusers' DDIMScheduler goes T / steps down instead:
    elsewhere, if the bundle spaces its timesteps as `linspace` does.
    """
    timesteps = ddim_timesteps(scheduler, steps)
    return list(zip(timesteps, [*timesteps[1:], -1], strict=True))


def chain_alphas(scheduler: Any) -> Tensor:
    """alpha-bar of every timestep, then that of the chain's end: float [T + 1], on the CPU."""
    alphas = scheduler.alphas_cumprod.cpu()
    return torch.cat([alphas, scheduler.final_alpha_cumprod.reshape(1).to(alphas)])


def to_eps(model_output: Tensor, x: Tensor, t: int, scheduler: Any) -> Tensor:
    """The U-Net's output at x_t as predicted noise, whatever the model predicts."""
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return model_output
    alpha = scheduler.alphas_cumprod[t].cpu()
    if kind == "v_prediction":  # v = sqrt(alpha) eps - sqrt(1 - alpha) x0
        return alpha**0.5 * model_output + (1 - alpha) ** 0.5 * x
    return (x - alpha**0.5 * model_output) / (1 - alpha) ** 0.5  # "sample": the output is x0


def predict_x0(x: Tensor, eps: Tensor, t: int, alphas: Tensor) -> Tensor:
    """The clean latent that x_t and eps imply (equation 9)."""
    return (x - (1 - alphas[t]) ** 0.5 * eps) / alphas[t] ** 0.5


def ddim_step(x: Tensor, eps: Tensor, t: int, t_prev: int, alphas: Tensor) -> Tensor:
    """x_{t_prev} from x_t, deterministic (equation 12 with sigma = 0)."""
    return alphas[t_prev] ** 0.5 * predict_x0(x, eps, t, alphas) + (1 - alphas[t_prev]) ** 0.5 * eps


def ddim_inverse_step(x: Tensor, eps: Tensor, t_prev: int, t: int, alphas: Tensor) -> Tensor:
    """x_t from x_{t_prev}: undoes `ddim_step(., eps, t, t_prev, .)` for the same eps."""
    return ddim_step(x, eps, t_prev, t, alphas)


def guided_eps(
    model: LatentDiffusion, x: Tensor, t: int, cond: Tensor, uncond: Tensor, guidance_scale: float
) -> Tensor:
    """Predicted noise at x_t under classifier-free guidance."""
    return to_eps(guided_output(model, x, t, cond, uncond, guidance_scale), x, t, model.scheduler)


def sample(
    model: LatentDiffusion,
    noise: Tensor,
    cond: Tensor,
    uncond: Tensor,
    steps: int,
    guidance_scale: float,
    sampler: str = "ddim",
) -> Tensor:
    """Latents [B, 4, h, w] from noise of that shape; no gradient, no host synchronisation.

    cond: [B, L, D]; uncond: [1 or B, L, D]. `ddim` equals diffusers' DDIMScheduler with eta 0;
    `dpm++` and `unipc` are diffusers' second-order multistep solvers for few steps.
    """
    with torch.no_grad():
        if sampler == "ddim":
            return _ddim(model, noise, cond, uncond, steps, guidance_scale)
        return _multistep(model, noise, cond, uncond, steps, guidance_scale, sampler)


def _ddim(
    model: LatentDiffusion, x: Tensor, cond: Tensor, uncond: Tensor, steps: int, scale: float
) -> Tensor:
    alphas = chain_alphas(model.scheduler)
    for t, t_prev in ddim_transitions(model.scheduler, steps):
        x = ddim_step(x, guided_eps(model, x, t, cond, uncond, scale), t, t_prev, alphas)
    return x


def _multistep(
    model: LatentDiffusion,
    x: Tensor,
    cond: Tensor,
    uncond: Tensor,
    steps: int,
    scale: float,
    sampler: str,
) -> Tensor:
    solver = multistep_solver(model.scheduler, sampler, steps)
    solver.set_begin_index(0)  # else each step searches its index, which waits for the device
    x = x * solver.init_noise_sigma
    for t in solver.timesteps:
        output = guided_output(model, x, int(t), cond, uncond, scale)
        x = solver.step(output, t, x, return_dict=False)[0]
    return x


def multistep_solver(scheduler: Any, sampler: str, steps: int) -> Any:
    """A fresh diffusers solver with the noise schedule of `scheduler`, set to so many steps.

    A bundle of another such solver may ask for a kind that draws noise of its own in every step,
    unseeded; it gets the deterministic one. UsageError where it would step from a timestep to the
    same one (a division by 0 there).
    """
    from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

    kinds: dict[str, Callable[[Any], Any]] = {
        "dpm++": partial(DPMSolverMultistepScheduler.from_config, algorithm_type="dpmsolver++"),
        "unipc": UniPCMultistepScheduler.from_config,
    }
    if sampler not in kinds:
        raise UsageError(f"--sampler {sampler}", "unknown", f"Use one of {', '.join(SAMPLERS)}.")
    check_steps(scheduler, steps)
    solver = kinds[sampler](scheduler.config)
    solver.set_timesteps(steps)
    if not (solver.sigmas[1:] < solver.sigmas[:-1]).all():
        why = f"{sampler} would step on one spot with so many"
        raise UsageError(f"--steps {steps}", why, "Take fewer, or --sampler ddim.")
    return solver


def initial_noise(model: LatentDiffusion, seed: int, items: Sequence[tuple[int, int]]) -> Tensor:
    """Starting noise [B, 4, h, w] for (class index, image index) items; one generator an image.

    The draw is made on the CPU in float32, so device, precision and batch do not change it.
    """
    return sent(torch.stack(list(_noises(seed, items, model.latent_shape))), model.device)


def _noises(
    seed: int, items: Sequence[tuple[int, int]], shape: tuple[int, ...]
) -> Iterator[Tensor]:
    for class_index, image_index in items:
        generator = sample_generator(seed, class_index, image_index)
        yield torch.randn(shape, generator=generator)
