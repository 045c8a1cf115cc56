"""LoRA adapters and whole tuned U-Nets on top of a loaded model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from ..runtime.contents import contents
from ..runtime.errors import BadInput, NoInput, UsageError, first_line
from .bundle import check_fit, load_weights
from .class_adapters import ClassAdapters, class_folders

if TYPE_CHECKING:
    from .load import LatentDiffusion

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
LAYER = re.compile(r"lora(_linear_layer)?[._](down|A)\.")  # in one key of each layer
LEARNT_WITH = "learnt with"  # in the facts of tokens and policies


def learnt_with(adapters: Sequence[Path]) -> dict[str, Any]:
    """What tokens and prompts say of the adapters that were there when they were learnt."""
    return {LEARNT_WITH: {"adapters": [str(a) for a in adapters], "contents": contents(adapters)}}


def other_adapters(what: str, facts: object, adapters: Sequence[Path]) -> str | None:
    """A warning where what was learnt with some adapters is to be drawn without these. (What was
    learnt with none may well be drawn with those that came after it.)"""
    before = facts.get(LEARNT_WITH) if isinstance(facts, dict) else None
    if not isinstance(before, dict) or before.get("contents") in (None, contents(adapters)):
        return None
    named, now = (_listed(names) for names in (before.get("adapters"), adapters))
    if named == now:
        return f"warning: {now} changed since {what} was learnt with it"
    return f"warning: {what} was learnt with {named}, and is drawn with {now}"


def _listed(adapters: object) -> str:
    names = adapters if isinstance(adapters, list | tuple) else ()
    return " and ".join(f"adapter {name}" for name in names) or "no adapter"


def rounds_away(adapter: Path, dtype: torch.dtype) -> str | None:
    """A warning where a tuned U-Net is drawn with in bf16, which has 8 bits for a weight."""
    if dtype != torch.bfloat16 or not is_whole(adapter):
        return None
    return (
        f"warning: adapter {adapter} is a whole U-Net: bf16 rounds away what moved its weights by "
        "less than .4 %; --precision fp16 or fp32 keeps more"
    )


def is_whole(adapter: Path) -> bool:
    """True for a pipeline with a U-Net of its own."""
    return (adapter / "unet" / "config.json").is_file()


def add_adapters(model: LatentDiffusion, adapters: Sequence[Path]) -> None:
    """Stack the adapters on the model, in order.

    Each is a LoRA (a directory, or one file as other tools have it), one LoRA a class (one such,
    `lora --per class`), or (first) a whole pipeline.
    """
    loras: dict[str, Path] = {}
    for i, adapter in enumerate(adapters):
        if folders := class_folders(adapter):
            if model.class_adapters is not None:
                raise UsageError(f"adapter {adapter}", "is the second with one adapter a class")
            model.class_adapters = ClassAdapters(model, folders, str(adapter))
        elif is_whole(adapter):
            _replace_unet(model, adapter, is_first=i == 0)
        elif (file := lora_file(adapter)).is_file():
            loras[f"adapter{i}"] = file
        else:
            lacks = f"has neither unet/ nor {LORA_WEIGHTS}"
            why = lacks if adapter.exists() else "is not there"
            advice = "Name a directory that dpo or lora wrote, or a LoRA's .safetensors."
            raise NoInput(f"adapter {adapter}", why, advice)
    for name, file in loras.items():  # last: they wrap the layers that the others hook
        _add_lora(model, file, name)
    if loras:
        as_pipeline(model).set_adapters(list(loras))


def _replace_unet(model: LatentDiffusion, adapter: Path, is_first: bool) -> None:
    from diffusers import UNet2DConditionModel

    if not is_first:
        why = "is a whole U-Net and would undo the ones before it"
        raise UsageError(f"adapter {adapter}", why, "Name it first.")
    model.unet = load_weights(adapter, "unet", UNet2DConditionModel, torch_dtype=model.unet.dtype)
    check_fit(adapter, model.unet, model.text_encoder, model.vae)


def lora_file(adapter: Path) -> Path:
    """Where the weights of a LoRA lie."""
    return adapter if adapter.suffix == ".safetensors" else adapter / LORA_WEIGHTS


def _add_lora(model: LatentDiffusion, file: Path, name: str) -> None:
    what = f"adapter {file.parent if file.name == LORA_WEIGHTS else file}"
    try:
        with safe_open(file, "pt") as tensors:
            keys = list(tensors.keys())
        as_pipeline(model).load_lora_weights(
            str(file.parent), weight_name=file.name, adapter_name=name, use_safetensors=True,
            local_files_only=True,
        )  # fmt: skip
    except Exception as error:  # peft raises whatever the keys and shapes make it stumble on
        why = first_line(error, "does not fit")
        raise BadInput(what, f"does not fit model {model.name} ({why})") from error
    _check_lora(model, what, name, keys)


def _check_lora(model: LatentDiffusion, adapter: str, name: str, keys: Sequence[str]) -> None:
    """BadInput where something of the file was passed over, as diffusers does with a warning."""
    if any(key.endswith("dora_scale") for key in keys):
        raise BadInput(adapter, "is a DoRA of kohya's kind, whose scales diffusers leaves out")
    modules = [*model.unet.modules(), *model.text_encoder.modules()]
    found = sum(name in getattr(module, "lora_A", ()) for module in modules)
    layers = sum(LAYER.search(key) is not None for key in keys)
    if found != layers:
        why = f"does not fit model {model.name}, which has {found} of its {layers} layers"
        raise BadInput(adapter, why)


def fuse_adapters(model: LatentDiffusion) -> None:
    """Merge the LoRA adapters into the weights: the same pictures without their cost."""
    if any(hasattr(module, "peft_config") for module in (model.unet, model.text_encoder)):
        pipeline = as_pipeline(model)
        pipeline.fuse_lora(components=["unet", "text_encoder"])
        pipeline.unload_lora_weights()


def as_pipeline(model: LatentDiffusion) -> Any:
    """diffusers' own pipeline around the same modules."""
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=model.vae, text_encoder=model.text_encoder, tokenizer=model.tokenizer, unet=model.unet,
        scheduler=model.scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
