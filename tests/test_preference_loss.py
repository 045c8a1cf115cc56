"""Diffusion-DPO's loss and gradient against an oracle in float64 that shares no code with it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call

from utilgen_cli.diffusion.finetune_config import Draw
from utilgen_cli.diffusion.load import LatentDiffusion, load_model
from utilgen_cli.diffusion.lora import UNET_TARGETS, add_lora
from utilgen_cli.diffusion.pair_data import Preferences
from utilgen_cli.diffusion.preference import (
    Denoisers,
    PreferenceObjective,
    full_denoisers,
    lora_denoisers,
)
from utilgen_cli.diffusion.preference_loss import (
    beta_to_public,
    diffusion_target,
    dpo_loss,
    ipo_loss,
    kto_loss,
    kto_reference_point,
)

from .random_bundle import make_bundle

BETA = 40.0
ROWS = torch.tensor([2, 0, 1])


def test_a_model_that_predicts_the_image_is_to_say_the_image() -> None:
    x0, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(diffusion_target("sample", x0, noise, torch.full((2, 1, 1, 1), 0.5)), x0)


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle"), prediction_type=request.param)


def made_pairs(variants: int = 2) -> Preferences:
    """Three pairs of two prompts; the mirrored variant is other noise, so that mix-ups show."""
    latents = torch.randn(3, 2, variants, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return Preferences(latents.double(), ["a", "b"], torch.tensor([0, 1, 0]), "made")


def made_draw() -> Draw:
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(3, 4, 8, 8, generator=generator).double()
    return Draw(noise, torch.tensor([3, 500, 980]), torch.tensor([True, False, True]))


def objective_for(model: LatentDiffusion, denoisers: Denoisers, loss: str) -> PreferenceObjective:
    embeds = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(3)).double()
    made = PreferenceObjective(model, denoisers, made_pairs(), embeds, embeds, loss=loss, beta=BETA)
    made.alpha_bar = made.alpha_bar.double()
    return made


def disturb(parameters: dict[str, torch.nn.Parameter]) -> None:
    """Move away from the start, where the model equals its reference."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def oracle(
    unet: torch.nn.Module, psi: dict[str, Tensor], ref: dict[str, Tensor], kind: str,
    objective: PreferenceObjective, loss: str,
) -> Tensor:  # fmt: skip
    """Pair after pair, image after image, in the paper's words."""
    pairs, draw = objective.pairs, made_draw()
    rewards = []
    for i, row in enumerate(objective.train_rows[ROWS].tolist()):
        abar = float(objective.alpha_bar[draw.timesteps[i]])
        for side in (0, 1):
            x0 = pairs.latents[row, side, 1 if draw.flip[i] else 0]
            eps = draw.noise[i]
            x_t = math.sqrt(abar) * x0 + math.sqrt(1 - abar) * eps
            target = eps if kind == "epsilon" else math.sqrt(abar) * eps - math.sqrt(1 - abar) * x0
            args = (x_t[None], draw.timesteps[i], objective.embeds[pairs.prompt_index[row]][None])
            errors = [
                ((functional_call(unet, weights, args).sample[0] - target) ** 2).sum()
                / target.numel()
                for weights in (psi, ref)
            ]
            rewards.append(-BETA * (errors[0] - errors[1]))
    r_w, r_l = torch.stack(rewards[::2]), torch.stack(rewards[1::2])
    if loss == "dpo":
        return -torch.log(1 / (1 + torch.exp(-(r_w - r_l)))).mean()
    if loss == "ipo":
        return ((r_w - r_l - 0.5) ** 2).mean()
    z = max(0.0, float(torch.cat([r_w, r_l]).detach().mean()))
    good, bad = 1 / (1 + torch.exp(-(r_w - z))), 1 / (1 + torch.exp(-(z - r_l)))
    return (1 - good).mean() / 2 + (1 - bad).mean() / 2


def assert_equal(value: Tensor, got: dict[str, Tensor], want: Tensor, grads: list[Tensor]) -> None:
    torch.testing.assert_close(value, want, rtol=1e-10, atol=1e-12)
    for gradient, expected in zip(got.values(), grads, strict=True):
        torch.testing.assert_close(gradient.double(), expected.double(), rtol=1e-5, atol=1e-10)
    assert max(float(g.abs().max()) for g in grads) > 1e-4


@pytest.mark.parametrize("loss", ["dpo", "ipo", "kto"])
def test_full_tuning_equals_the_oracle(bundle: Path, loss: str) -> None:
    model = load_model(str(bundle), dtype=torch.float32)
    plain = load_model(str(bundle)).unet.double()
    denoisers = full_denoisers(model.unet)
    denoisers.psi.double()
    denoisers.reference.double()
    disturb(denoisers.parameters)
    objective = objective_for(model, denoisers, loss)
    value, _ = objective.loss(ROWS, made_draw())
    value.backward()
    psi = {k: p.detach().clone().requires_grad_() for k, p in denoisers.parameters.items()}
    want = oracle(
        plain, psi, dict(plain.named_parameters()), model.prediction_type, objective, loss
    )
    want.backward()
    kept = {k: p.grad for k, p in denoisers.parameters.items() if p.grad is not None}
    assert_equal(value, kept, want, [psi[k].grad for k in kept])


@pytest.mark.parametrize("loss", ["dpo", "ipo", "kto"])
def test_lora_equals_the_oracle_with_w_plus_ba(bundle: Path, loss: str) -> None:
    model = load_model(str(bundle))
    torch.manual_seed(0)
    add_lora(model.unet, 3, UNET_TARGETS)
    denoisers = lora_denoisers(model.unet, "default", "base")
    model.unet.double()
    disturb(denoisers.parameters)
    objective = objective_for(model, denoisers, loss)
    value, _ = objective.loss(ROWS, made_draw())
    value.backward()

    plain = load_model(str(bundle)).unet.double()
    base = dict(plain.named_parameters())
    low = {k: p.detach().clone().requires_grad_() for k, p in denoisers.parameters.items()}
    psi = {}
    for name, weight in base.items():
        a, b = (low.get(name.replace(".weight", f".lora_{x}.default.weight")) for x in "AB")
        psi[name] = weight if a is None or b is None else weight + b @ a
    assert sum(psi[k] is not base[k] for k in base) == len(low) // 2
    want = oracle(plain, psi, base, model.prediction_type, objective, loss)
    want.backward()
    got = {k: p.grad for k, p in denoisers.parameters.items()}
    assert_equal(value, got, want, [p.grad for p in low.values()])


def test_kto_of_single_images_equals_the_oracle(bundle: Path) -> None:
    """Each image by itself, against the batch's mean reward; both signs weigh the same in all."""
    model = load_model(str(bundle))
    plain = load_model(str(bundle)).unet.double()
    denoisers = full_denoisers(model.unet)
    denoisers.psi.double()
    denoisers.reference.double()
    disturb(denoisers.parameters)
    objective = objective_for(model, denoisers, "kto")
    sign = torch.tensor([1.0, -1.0, 1.0])
    single = replace(made_pairs(), latents=made_pairs().latents[:, :1], sign=sign)
    objective.pairs = single
    value, _ = objective.loss(ROWS, made_draw())
    value.backward()
    psi = {k: p.detach().clone().requires_grad_() for k, p in denoisers.parameters.items()}
    draw, rewards = made_draw(), []
    for i, row in enumerate(ROWS.tolist()):
        abar = float(objective.alpha_bar[draw.timesteps[i]])
        x0, eps = single.latents[row, 0, int(draw.flip[i])], draw.noise[i]
        x_t = math.sqrt(abar) * x0 + math.sqrt(1 - abar) * eps
        velocity = math.sqrt(abar) * eps - math.sqrt(1 - abar) * x0
        target = eps if model.prediction_type == "epsilon" else velocity
        context = objective.embeds[single.prompt_index[row]][None]
        errors = [
            (functional_call(unet, w, (x_t[None], draw.timesteps[i], context)).sample[0] - target)
            .square().mean()
            for unet, w in ((plain, psi), (plain, dict(plain.named_parameters())))
        ]  # fmt: skip
        rewards.append(-BETA * (errors[0] - errors[1]))
    z = max(0.0, float(torch.stack(rewards).detach().mean()))
    want = torch.zeros((), dtype=torch.float64)
    for row, reward in zip(ROWS.tolist(), rewards, strict=True):
        if sign[row] > 0:  # two of three are desirable: 3 / (2 * 2) each
            want = want + 0.75 * (1 - 1 / (1 + torch.exp(-(reward - z)))) / 3
        else:
            want = want + 1.5 * (1 - 1 / (1 + torch.exp(-(z - reward)))) / 3
    want.backward()
    kept = {k: p.grad for k, p in denoisers.parameters.items() if p.grad is not None}
    torch.testing.assert_close(value, want, rtol=1e-7, atol=0)
    for name, gradient in kept.items():
        torch.testing.assert_close(gradient, psi[name].grad, rtol=1e-5, atol=1e-9)


def test_at_the_reference_the_loss_is_log_two_and_teaches(bundle: Path) -> None:
    model = load_model(str(bundle))
    add_lora(model.unet, 3, UNET_TARGETS)
    denoisers = lora_denoisers(model.unet, "default", "base")
    model.unet.double()
    value, figures = objective_for(model, denoisers, "dpo").loss(ROWS, made_draw())
    value.backward()
    assert float(value) == pytest.approx(math.log(2), abs=1e-12)
    assert figures["dL_w"] == figures["dL_l"] == 0
    assert any(float(p.grad.abs().max()) > 0 for p in denoisers.parameters.values())


errors = st.floats(-0.3, 0.3)


@given(errors, errors, st.floats(1, 1e4))
def test_public_scripts_agree_under_their_own_beta(w: float, l: float, beta: float) -> None:  # noqa: E741
    """The authors' script: -logsigmoid(-0.5 beta_dpo (dL_w - dL_l)); diffusers' has no 0.5."""
    ours = dpo_loss(*torch.tensor([w, l], dtype=torch.float64), beta, torch.tensor(0.0))
    for inside in (-0.5 * beta_to_public(beta) * (w - l), -beta * (w - l)):
        public = math.log1p(math.exp(-abs(inside))) + max(-inside, 0.0)
        assert float(ours) == pytest.approx(public, rel=1e-9, abs=1e-12)


@given(errors, errors, st.floats(1, 100))
def test_ipo_is_beta_squared_times_its_paper(w: float, l: float, beta: float) -> None:  # noqa: E741
    h = l - w
    ours = ipo_loss(*torch.tensor([w, l], dtype=torch.float64), beta, torch.tensor(0.0))
    assert float(ours) == pytest.approx(beta**2 * (h - 1 / (2 * beta)) ** 2, rel=1e-9, abs=1e-12)


def test_kto_wants_each_image_by_itself_and_its_point_has_no_gradient() -> None:
    w, l = torch.tensor([-0.1], requires_grad=True), torch.tensor([0.2], requires_grad=True)  # noqa: E741
    point = kto_reference_point(torch.cat([w, l]), 5.0)
    assert not point.requires_grad
    kto_loss(w, l, 5.0, point).sum().backward()
    assert float(w.grad) > 0 > float(l.grad)
