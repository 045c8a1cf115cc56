"""Our sampler draws what diffusers draws, and its pieces are the published equations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from utilgen_cli.diffusion import ddim
from utilgen_cli.diffusion.adapters import as_pipeline
from utilgen_cli.diffusion.load import LatentDiffusion, load_model
from utilgen_cli.runtime.errors import UsageError

from .random_bundle import make_bundle, make_scheduler

PREDICTIONS = ("epsilon", "v_prediction", "sample")
ITEMS = [(0, 0), (1, 0), (2, 0), (0, 1)]


@pytest.fixture(scope="module", params=PREDICTIONS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = make_bundle(tmp_path_factory.mktemp(request.param), prediction_type=request.param)
    return load_model(str(path))


def draw(model: LatentDiffusion, steps: int, scale: float, sampler: str = "ddim") -> np.ndarray:
    noise = ddim.initial_noise(model, 0, ITEMS)
    cond = model.encode_prompts([f"a {name}" for name in ("dress", "bag", "boot", "dress")])
    latents = ddim.sample(model, noise, cond, model.encode_prompts([""]), steps, scale, sampler)
    return model.decode(latents).permute(0, 2, 3, 1).numpy() * 255


def draw_with_diffusers(
    model: LatentDiffusion, steps: int, scale: float, scheduler: Any
) -> np.ndarray:
    pipe = as_pipeline(model)
    pipe.scheduler = scheduler
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        ["a dress", "a bag", "a boot", "a dress"], num_inference_steps=steps, guidance_scale=scale,
        latents=ddim.initial_noise(model, 0, ITEMS), height=model.size, width=model.size,
        output_type="np", eta=0.0,
    ).images  # fmt: skip
    return np.asarray(images) * 255


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("steps", [1, 7, 20])
def test_ddim_draws_what_the_diffusers_pipeline_draws(
    model: LatentDiffusion, steps: int, scale: float
) -> None:
    scheduler = DDIMScheduler.from_config(model.scheduler.config)
    theirs = draw_with_diffusers(model, steps, scale, scheduler)
    ours = draw(model, steps, scale)
    assert np.abs(ours - theirs).max() < 0.05  # of 255
    assert np.ptp(theirs) > 20  # a picture, not a constant


@pytest.mark.parametrize(
    ("sampler", "kind"),
    [("dpm++", DPMSolverMultistepScheduler), ("unipc", UniPCMultistepScheduler)],
)
def test_few_step_solvers_draw_what_the_diffusers_pipeline_draws(
    model: LatentDiffusion, sampler: str, kind: Any
) -> None:
    theirs = draw_with_diffusers(model, 6, 3.0, kind.from_config(model.scheduler.config))
    assert np.abs(draw(model, 6, 3.0, sampler) - theirs).max() < 0.05


@pytest.mark.parametrize("algorithm", ["sde-dpmsolver++", "deis"])
def test_a_bundle_that_names_another_solver_draws_the_same_twice(
    tmp_path: Path, algorithm: str
) -> None:
    """The stochastic kind would draw from the global generator in every step."""
    file = make_bundle(tmp_path) / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "algorithm_type": algorithm}))
    model = load_model(str(tmp_path))
    assert np.array_equal(draw(model, 4, 3.0, "dpm++"), draw(model, 4, 3.0, "dpm++"))


@given(
    steps=st.integers(1, 120),
    spacing=st.sampled_from(["leading", "trailing"]),
    offset=st.sampled_from([0, 1]),
    to_one=st.booleans(),
    prediction=st.sampled_from(PREDICTIONS),
)
@settings(max_examples=40, deadline=None)
def test_a_chain_of_steps_is_the_chain_of_ddim_scheduler(
    steps: int, spacing: str, offset: int, to_one: bool, prediction: str
) -> None:
    """Wherever that one ends a step at the timestep that it takes next."""
    if spacing == "trailing":
        steps = max(n for n in range(1, steps + 1) if 1000 % n == 0)
    theirs = make_scheduler(
        prediction, timestep_spacing=spacing, steps_offset=offset, set_alpha_to_one=to_one
    )
    alphas = ddim.chain_alphas(theirs).double()
    x = y = torch.linspace(-2, 2, 16, dtype=torch.float64).reshape(1, 4, 2, 2)
    transitions = ddim.ddim_transitions(theirs, steps)
    assert [t for t, _ in transitions] == theirs.timesteps.tolist()
    for t, t_prev in transitions:
        y = theirs.step(torch.sin(3 * y), t, y).prev_sample
        eps = ddim.to_eps(torch.sin(3 * x), x, t, theirs)
        x = ddim.ddim_step(x, eps, t, t_prev, alphas)
        assert torch.allclose(x, y, rtol=1e-4, atol=1e-4)
        x = y


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 5, 7, 25, 999, 1000])
def test_a_step_ends_where_the_next_begins(spacing: str, steps: int) -> None:
    """Else the model is told of less noise than it is shown: `linspace`, the spacing of a bundle
    that was saved with Euler or DPM++, has no stride of T / steps."""
    scheduler = make_scheduler(timestep_spacing=spacing, steps_offset=1)
    transitions = ddim.ddim_transitions(scheduler, steps)
    starts, ends = ([pair[i] for pair in transitions] for i in (0, 1))
    assert ends == [*starts[1:], -1] and max(starts) <= 999
    assert all(start > end for start, end in transitions)  # the offset may point past the last
    assert len(starts) == (999 if steps == 1000 and spacing == "leading" else steps)


@given(t=st.integers(1, 999), t_prev=st.integers(-1, 998))
@settings(deadline=None)
def test_the_inverse_step_undoes_the_step(t: int, t_prev: int) -> None:
    alphas = ddim.chain_alphas(make_scheduler()).double()
    x, eps = torch.randn(2, 1, 4, 8, 8, dtype=torch.float64, generator=torch.Generator())
    there = ddim.ddim_step(x, eps, t, t_prev, alphas)
    assert torch.allclose(ddim.ddim_inverse_step(there, eps, t_prev, t, alphas), x, atol=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_to_eps_recovers_the_noise_of_a_noised_latent(prediction: str) -> None:
    scheduler = make_scheduler(prediction)
    x0, eps = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64, generator=torch.Generator())
    for t in (1, 500, 999):
        when = torch.full((3,), t)
        x = scheduler.add_noise(x0, eps, when)
        target = {"epsilon": eps, "v_prediction": scheduler.get_velocity(x0, eps, when),
                  "sample": x0}[prediction]  # fmt: skip
        assert torch.allclose(ddim.to_eps(target, x, t, scheduler), eps, atol=1e-4)
        assert torch.allclose(
            ddim.predict_x0(x, eps, t, ddim.chain_alphas(scheduler)), x0, atol=1e-5
        )


def test_guidance_needs_one_call_and_at_scale_one_half_of_it(model: LatentDiffusion) -> None:
    batches = []
    hook = model.unet.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    draw(model, 3, 2.0)
    draw(model, 2, 1.0)
    hook.remove()
    assert batches == [8, 8, 8, 4, 4]


def test_an_image_keeps_its_noise_in_any_company(model: LatentDiffusion) -> None:
    alone = ddim.initial_noise(model, 3, [(2, 5)])
    among = ddim.initial_noise(model, 3, [(0, 0), (2, 5), (2, 6)])
    assert torch.equal(alone[0], among[1])
    assert not torch.equal(among[1], among[2])
    assert not torch.equal(alone, ddim.initial_noise(model, 4, [(2, 5)]))


@pytest.mark.parametrize("steps", [0, 1001])
def test_steps_outside_the_schedule_are_refused(steps: int) -> None:
    with pytest.raises(UsageError, match="between 1 and 1000"):
        ddim.ddim_timesteps(make_scheduler(), steps)


@pytest.mark.parametrize("sampler", ["dpm++", "unipc"])
def test_a_solver_that_would_step_on_one_spot_is_refused(
    model: LatentDiffusion, sampler: str
) -> None:
    """With the leading spacing of Stable Diffusion all of its 1,000 timesteps would be the same."""
    ddim.multistep_solver(model.scheduler, sampler, 900)
    with pytest.raises(UsageError, match=r"--steps 1000: .* on one spot"):
        ddim.multistep_solver(model.scheduler, sampler, 1000)


def test_an_unknown_sampler_is_refused(model: LatentDiffusion) -> None:
    with pytest.raises(UsageError, match="ddim, dpm"):
        draw(model, 2, 1.0, "euler")


def test_a_schedule_that_ends_at_zero_signal_still_draws(tmp_path: Path) -> None:
    path = make_bundle(
        tmp_path, prediction_type="v_prediction", rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )  # fmt: skip
    model = load_model(str(path))
    scheduler = DDIMScheduler.from_config(model.scheduler.config)
    theirs = draw_with_diffusers(model, 10, 3.0, scheduler)
    assert np.abs(draw(model, 10, 3.0) - theirs).max() < 2
