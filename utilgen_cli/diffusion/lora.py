"""LoRA adapters: put on, switched off, and written as `pipe.load_lora_weights` reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..runtime.checkpoint import save_tensors
from .adapters import LORA_WEIGHTS

UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


def add_lora(module: Any, rank: int, targets: Sequence[str], name: str = "default") -> None:
    """Put a new adapter on a U-Net or text encoder; at first it changes nothing (B = 0).

    The global torch generator initialises it: seed it before.
    """
    from peft import LoraConfig

    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=list(targets), init_lora_weights="gaussian"
    )
    module.add_adapter(config, adapter_name=name)


def copy_lora(module: Any, source: str, name: str) -> None:
    """Put a second adapter `name` on the module with the weights of adapter `source`."""
    module.add_adapter(module.peft_config[source], adapter_name=name)
    values = {key.replace(f".{name}.", f".{source}."): p for key, p in lora_named(module, name)}
    with torch.no_grad():
        for key, original in lora_named(module, source):
            values[key].copy_(original)


def lora_named(module: nn.Module, name: str = "default") -> Iterator[tuple[str, nn.Parameter]]:
    """(full name, parameter) of every weight of one adapter."""
    for key, parameter in module.named_parameters():
        if "lora_" in key and f".{name}." in key:
            yield key, parameter


def train_lora_only(module: nn.Module, name: str = "default") -> dict[str, nn.Parameter]:
    """Freeze all but one adapter, in float32; its parameters by name."""
    module.requires_grad_(False)
    found = dict(lora_named(module, name))
    for parameter in found.values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return found


def tuner_layers(module: nn.Module) -> list[Any]:
    """The layers that carry adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [m for m in module.modules() if isinstance(m, BaseTunerLayer)]


@contextmanager
def adapters_off(layers: Sequence[Any]) -> Iterator[None]:
    """Inside, the module is its base model."""
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@contextmanager
def adapter_active(layers: Sequence[Any], name: str) -> Iterator[None]:
    """Inside, only adapter `name` acts."""
    before = [list(layer.active_adapters) for layer in layers]
    for layer in layers:
        layer.set_adapter(name)
    try:
        yield
    finally:
        for layer, names in zip(layers, before, strict=True):
            layer.set_adapter(names)


def lora_tensors(module: Any, prefix: str, name: str = "default") -> dict[str, torch.Tensor]:
    """One adapter under the keys of diffusers' LoRA files (`unet.` or `text_encoder.` first).

    Layers are called as peft does: diffusers has names of its own for those of attention alone, and
    of a file with both kinds loads one. Its files name no alpha, which is then read as the rank:
    another one, as an adapter of another tool may have, is multiplied into B. All have one rank, as
    diffusers below 0.42 takes the first layer's for the alpha of all.
    """
    from peft.utils import get_peft_model_state_dict

    # with class tokens peft would save the whole embedding table, which no loader takes
    state = get_peft_model_state_dict(module, adapter_name=name, save_embedding_layers=False)
    for key, b in state.items():
        layer, found, _ = key.partition(".lora_B.")
        if found and (scaling := module.get_submodule(layer).scaling[name]) != 1:
            state[key] = b * scaling
    return {f"{prefix}.{key}": weight for key, weight in of_one_rank(state).items()}


def of_one_rank(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A [r, in, ...] and B [out, r, ...] of each layer, with zeros up to the highest rank."""
    axes = {"A": 0, "B": 1}
    found = {key: at for key in state for side, at in axes.items() if f".lora_{side}.weight" in key}
    rank = max((state[key].shape[at] for key, at in found.items()), default=0)
    return state | {key: _padded(state[key], at, rank) for key, at in found.items()}


def _padded(x: torch.Tensor, axis: int, length: int) -> torch.Tensor:
    if x.shape[axis] == length:
        return x
    shape = [*x.shape[:axis], length - x.shape[axis], *x.shape[axis + 1 :]]
    return torch.cat([x, x.new_zeros(shape)], axis)


def save_lora(path: Path, unet: Any, text_encoder: Any) -> None:
    """Write PATH/pytorch_lora_weights.safetensors of the U-Net and the text encoder."""
    tensors = lora_tensors(unet, "unet") | lora_tensors(text_encoder, "text_encoder")
    save_tensors(path / LORA_WEIGHTS, tensors, {"format": "pt"})
