"""Computing the common part of a guided call once changes neither outputs nor gradients."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from utilgen_cli.diffusion.guidance import CommonPart, before_the_text, guided_output, output_halves

DOWN = {"tiny's": ("DownBlock2D", "CrossAttnDownBlock2D"), "SD's": ("CrossAttnDownBlock2D",) * 2}
ROWS, LENGTH, WIDTH = 3, 5, 12


@pytest.fixture(params=DOWN)
def model(request: pytest.FixtureRequest) -> Any:
    """A U-Net in fp64 whose first block has no text, as tiny's, or has, as Stable Diffusion's."""
    torch.manual_seed(0)
    down = DOWN[request.param]
    up = [name.replace("Down", "Up") for name in reversed(down)]
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=2, norm_num_groups=4,
        attention_head_dim=2, cross_attention_dim=WIDTH, down_block_types=down, up_block_types=up,
    )  # fmt: skip
    return SimpleNamespace(unet=unet.double().eval())


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((ROWS, 4, 8, 8), (ROWS, LENGTH, WIDTH), (1, LENGTH, WIDTH))
    x, cond, uncond = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return x, cond.requires_grad_(), uncond


def test_halves_and_gradients_equal_those_of_two_calls(model: Any) -> None:
    x, cond, uncond = inputs()
    x.requires_grad_()
    low, high = output_halves(model, x, 500, cond, uncond)
    with_text = model.unet(x, 500, cond).sample
    without = model.unet(x, 500, uncond.expand_as(cond)).sample
    assert torch.allclose(low, without, atol=1e-12)
    assert torch.allclose(high, with_text, atol=1e-12)
    weights = torch.randn(x.shape, dtype=torch.float64)
    found = torch.autograd.grad((weights * (2 * high - low)).sum(), (x, cond))
    wanted = torch.autograd.grad((weights * (2 * with_text - without)).sum(), (x, cond))
    for f, w in zip(found, wanted, strict=True):
        assert torch.allclose(f, w, atol=1e-12)


def test_the_common_part_is_computed_for_half_of_the_rows(model: Any) -> None:
    x, cond, uncond = inputs()
    rows: list[int] = []
    output_halves(model, x, 500, cond, uncond)  # the hooks are there from now on
    for module in before_the_text(model.unet):
        module.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    attention = model.unet.mid_block.attentions[0]
    attention.register_forward_pre_hook(lambda _, given: rows.append(-len(given[0])))
    output_halves(model, x, 500, cond, uncond)
    assert set(rows[:-1]) == {ROWS}
    assert len(rows) > 5
    assert rows[-1] == -2 * ROWS
    with FlopCounterMode(display=False) as once:
        output_halves(model, x, 500, cond, uncond)
    with FlopCounterMode(display=False) as twice:
        model.unet(x, 500, cond)
        model.unet(x, 500, cond)
    assert once.get_total_flops() < twice.get_total_flops()


def test_other_calls_of_the_unet_are_left_alone(model: Any) -> None:
    """Rows of different latents and timesteps, as training calls it; an error ends the sharing."""
    x, cond, uncond = inputs()
    t = torch.tensor([1, 500, 900])
    before = model.unet(x, t, cond).sample
    guided_output(model, x, 500, cond, uncond, 3.0)
    with pytest.raises(RuntimeError), CommonPart.of(model.unet).once():
        model.unet(torch.cat([x, x]), torch.tensor(500), cond[..., :-1])
    assert torch.equal(model.unet(x, t, cond).sample, before)


def test_a_copy_of_the_unet_has_its_own(model: Any) -> None:
    x, cond, uncond = inputs()
    wanted = guided_output(model, x, 500, cond, uncond, 3.0)
    other = SimpleNamespace(unet=copy.deepcopy(model.unet))
    assert CommonPart.of(other.unet) is not CommonPart.of(model.unet)
    found = guided_output(other, x, 500, cond, uncond, 3.0)  # type: ignore[arg-type]
    assert torch.equal(found, wanted)
