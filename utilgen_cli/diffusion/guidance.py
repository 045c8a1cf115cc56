"""Classifier-free guidance (Ho and Salimans 2022) in one U-Net call, its halves' common part once.

The unconditional and the conditional half of the batch differ in their text alone, so whatever lies
before the first cross-attention is the same in both; and all rows have one timestep. Computing
these once changes no picture; it saves 7.9 % of the operations of the tiny bundle's U-Net, 2.5 % of
SD 2.1's at 512 px.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .load import LatentDiffusion


class CommonPart:
    """Hooks on a U-Net that act inside `once`: equal halves are computed once and repeated."""

    def __init__(self, unet: nn.Module) -> None:
        self._acts = False
        for module in before_the_text(unet):
            module.register_forward_pre_hook(self._halve)
            module.register_forward_hook(self._repeat)
        if isinstance(embedding := getattr(unet, "time_embedding", None), nn.Module):
            embedding.register_forward_pre_hook(self._one_row)

    @classmethod
    def of(cls, unet: nn.Module) -> CommonPart:
        """The one of this U-Net: a copy of the module takes its own along."""
        if "common_part" not in vars(unet):
            unet.common_part = cls(unet)  # type: ignore[assignment]
        found: CommonPart = vars(unet)["common_part"]
        return found

    @contextmanager
    def once(self) -> Iterator[None]:
        """Inside, the U-Net must be given one timestep, and x twice: [2B, 4, h, w]."""
        self._acts = True
        try:
            yield
        finally:
            self._acts = False

    def _halve(self, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        if not self._acts:
            return inputs
        rows = len(inputs[0])  # the time embedding that comes second has one row
        return tuple(x[: rows // 2] if x is not None and len(x) == rows else x for x in inputs)

    def _repeat(self, _: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return torch.cat([output, output]) if self._acts else output

    def _one_row(self, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0][:1], *inputs[1:]) if self._acts else inputs


def before_the_text(unet: Any) -> Iterator[nn.Module]:
    """The modules that run before the first cross-attention; none of an unknown kind of U-Net."""
    if not hasattr(unet, "down_blocks"):
        return
    yield unet.conv_in
    for block in unet.down_blocks:
        if type(block).__name__ == "DownBlock2D":
            yield from (*block.resnets, *(block.downsamplers or ()))
            continue
        if type(block).__name__ == "CrossAttnDownBlock2D":
            transformer = block.attentions[0]
            yield from (block.resnets[0], transformer.norm, transformer.proj_in)
            first = transformer.transformer_blocks[0]
            if not first.only_cross_attention:
                yield from (first.norm1, first.attn1)
        return


def output_halves(
    model: LatentDiffusion, x: Tensor, t: int, cond: Tensor, uncond: Tensor
) -> tuple[Tensor, Tensor]:
    """The U-Net's outputs (without the text, with it) at x_t, [B, 4, h, w] each.

    cond: [B, L, D]; uncond: [1 or B, L, D].
    """
    dtype = model.unet.dtype
    text = torch.cat([uncond.to(cond).expand_as(cond), cond]).to(dtype)
    with CommonPart.of(model.unet).once():
        output = model.unet(torch.cat([x, x]).to(dtype), timestep(t, x), text).sample
    low, high = output.to(x.dtype).chunk(2)
    return low, high


def guided_output(
    model: LatentDiffusion, x: Tensor, t: int, cond: Tensor, uncond: Tensor, scale: float
) -> Tensor:
    """The U-Net's output under guidance (equation 6); a scale of 1 needs no unconditional half."""
    if scale == 1:
        dtype = model.unet.dtype
        return model.unet(x.to(dtype), timestep(t, x), cond.to(dtype)).sample.to(x.dtype)
    low, high = output_halves(model, x, t, cond, uncond)
    return low + scale * (high - low)


def timestep(t: int, x: Tensor) -> Tensor:
    """As a tensor that is filled where x is: a copied number would make the host wait, and would be
    compiled anew each time."""
    return torch.full((), t, device=x.device)
