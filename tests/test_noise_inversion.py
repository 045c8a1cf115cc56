"""Noise optimisation against plain fp64 arithmetic and diffusers' own scheduler."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from utilgen_cli.diffusion.noise import (
    NoiseConfig,
    counted,
    describe_noise,
    invert_step,
    sample_optimised,
    strength,
    there_and_back,
)

STEPS = 10


def tiny_model(prediction_type: str = "epsilon") -> SimpleNamespace:
    """A random U-Net in float64 with Stable Diffusion's schedule."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        cross_attention_dim=12, attention_head_dim=4, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1, prediction_type=prediction_type,
    )  # fmt: skip
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    return SimpleNamespace(
        unet=unet.double().eval().requires_grad_(False), scheduler=scheduler,
        latent_shape=(4, 8, 8), device=torch.device("cpu"), dtype=torch.float64,
    )  # fmt: skip


def draw(n: int = 2) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Noise and prompts large enough to matter to a random U-Net."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, 4, 8, 8, generator=g, dtype=torch.float64)
    cond = 10 * torch.randn(n, 6, 12, generator=g, dtype=torch.float64)
    return x, (cond, torch.zeros(1, 6, 12, dtype=torch.float64))


def oracle_eps(
    model: SimpleNamespace, x: torch.Tensor, t: int, prompt: torch.Tensor
) -> torch.Tensor:
    """Noise at x_t from one plain U-Net call, converted from v by its definition."""
    output = model.unet(x, t, prompt.expand(len(x), -1, -1)).sample
    if model.scheduler.config.prediction_type == "epsilon":
        return output
    a = model.scheduler.alphas_cumprod[t]
    return a.sqrt() * output + (1 - a).sqrt() * x


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_single_step_moves_noise_by_the_closed_form(kind: str) -> None:
    """x' = x - k_T (omega_l - omega_w)(eps_c - eps_u), with k_T from the alphas by hand."""
    model, (x, prompts) = tiny_model(kind), draw()
    t, s = 901, 801
    a_t, a_s = model.scheduler.alphas_cumprod[t], model.scheduler.alphas_cumprod[s]
    k = (1 - a_t).sqrt() - (a_t * (1 - a_s) / a_s).sqrt()
    direction = oracle_eps(model, x, t, prompts[0]) - oracle_eps(model, x, t, prompts[1])
    expected = x - k * (5.0 - 1.5) * direction
    config = NoiseConfig("single", omega_l=5.0, omega_w=1.5)
    got = there_and_back(model, x, (t, s), prompts, config)
    assert direction.abs().max() > 1e-3
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_fixed_point_inverse_undoes_a_diffusers_step(kind: str) -> None:
    """The refined inverse of DDIMScheduler.step finds x_t to 1e-10; unrefined it does not."""
    model, (x, prompts) = tiny_model(kind), draw()
    model.scheduler.set_timesteps(STEPS)
    t, s = 501, 401
    low, high = (model.unet(x, t, p.expand(2, -1, -1)).sample for p in reversed(prompts))
    x_s = model.scheduler.step(low + 3.0 * (high - low), t, x).prev_sample
    config = NoiseConfig(omega_w=3.0, refine=100, tolerance=1e-13)
    refined = invert_step(model, x_s, (t, s), prompts, config)
    plain = invert_step(model, x_s, (t, s), prompts, replace(config, refine=0))
    torch.testing.assert_close(refined, x, rtol=1e-10, atol=1e-10)
    assert (plain - x).abs().max() > 1e-6


@pytest.mark.parametrize("mode", ["single", "full"])
def test_equal_guidance_gives_the_noise_back(mode: str) -> None:
    """With omega_l = omega_w nothing is added: eps' = eps to 1e-8 after refinement."""
    model, (x, prompts) = tiny_model(), draw()
    config = NoiseConfig(mode, 2.0, 2.0, refine=100, tolerance=1e-13)
    _, figures = sample_optimised(model, x, prompts, STEPS, 2.0, config)
    assert figures["moved"] < 1e-8


def test_an_image_does_not_depend_on_its_batch() -> None:
    """Refinement stops for each image by itself."""
    model, (x, prompts) = tiny_model(), draw(3)
    config = NoiseConfig("full", 4.0, 1.0, refine=3, tolerance=1e-4)
    together, _ = sample_optimised(model, x, prompts, 4, 2.0, config)
    for i in range(3):
        alone, _ = sample_optimised(
            model, x[i : i + 1], (prompts[0][i : i + 1], prompts[1]), 4, 2.0, config
        )
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-9, atol=1e-9)


def test_zigzag_at_equal_guidance_is_plain_sampling() -> None:
    """There and back with one scale changes nothing at any step."""
    model, (x, prompts) = tiny_model(), draw()
    plain, _ = sample_optimised(model, x, prompts, STEPS, 2.0, NoiseConfig("none"))
    zigzag, _ = sample_optimised(model, x, prompts, STEPS, 2.0, NoiseConfig("zigzag", 2.0, 2.0))
    other, _ = sample_optimised(model, x, prompts, STEPS, 2.0, NoiseConfig("zigzag", 6.0, 1.0))
    torch.testing.assert_close(zigzag, plain, rtol=1e-10, atol=1e-10)
    assert (other - plain).abs().max() > 1e-4


def test_strength_does_not_depend_on_the_number_of_steps() -> None:
    """k_T is .110, .238, .385 at 50, 20, 10 steps; rescaled, k_T (omega_l - omega_w) is one number."""
    scheduler = tiny_model().scheduler
    assert [round(strength(scheduler, n), 3) for n in (50, 20, 10)] == [0.110, 0.238, 0.385]
    config = NoiseConfig("single", 5.5, 1.0)
    moved = []
    for steps in (50, 20, 10):
        at = config.at_steps(scheduler, steps)
        moved.append(strength(scheduler, steps) * (at.omega_l - at.omega_w))
    assert moved == pytest.approx([moved[0]] * 3, rel=1e-9)


@pytest.mark.parametrize(
    ("mode", "calls"), [("none", 10), ("single", 11), ("zigzag", 20), ("full", 30)]
)
def test_cost_in_unet_calls(mode: str, calls: int) -> None:
    """Every mode stays within four times plain sampling."""
    model, (x, prompts) = tiny_model(), draw()
    with counted(model.unet) as count:
        sample_optimised(model, x, prompts, STEPS, 2.0, NoiseConfig(mode, 5.0, 2.0))
    assert count.calls == calls <= 4 * STEPS


def test_noise_figures_tell_white_from_smooth() -> None:
    """White unit noise has norm 1 and no correlation; smoothed noise is found out."""
    x = torch.randn(64, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    white = describe_noise(x, x)
    assert white["norm"] == pytest.approx(1, abs=0.02)
    assert abs(white["neighbours"]) < 0.02
    assert white["channels"] < 0.03
    assert white["moved"] == 0
    smooth = torch.nn.functional.avg_pool2d(x, 3, 1, 1)
    assert describe_noise(smooth, x)["neighbours"] > 0.5
    mixed = x + x.roll(1, dims=1)
    assert describe_noise(mixed, x)["channels"] > 0.2
