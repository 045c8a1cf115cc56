"""open_clip image towers as classifiers: frozen under a linear head, or with LoRA adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ..runtime.contents import contents, directory_named
from ..runtime.errors import UsageError

OPEN_CLIP = "open_clip:"
OPEN_CLIP_LORA = "open_clip-lora:"
RANK = 8
FUNCTIONAL = ("MultiheadAttention", "AttentionPool2d")  # they use their layers' weights directly


def is_clip(arch: str) -> bool:
    """True for the names of this module."""
    return arch.startswith((OPEN_CLIP, OPEN_CLIP_LORA))


def tower_files(arch: str) -> Path | None:
    """The local directory of the tower, if that is how it is named."""
    return directory_named(arch.partition(":")[2]) if is_clip(arch) else None


def has_named_weights(arch: str) -> bool:
    """True where a classifier never trains its tower, and every seed has the same."""
    tag = arch.partition(":")[2].partition("/")[2]
    return arch.startswith(OPEN_CLIP) and (tower_files(arch) is not None or tag != "")


def known_as(arch: str) -> str:
    """The architecture's name, and for a local directory a digest of what lies there."""
    files = tower_files(arch)
    return arch if files is None else f"{arch}#{contents([files])}"


def load_tower(arch: str, weights: bool = True) -> tuple[nn.Module, dict[str, Any]]:
    """The image tower, and its transform {"size", "mean", "std"}; open_clip's errors pass through.

    After the prefix: NAME, NAME/TAG for its weights, or a local directory. Without `weights` none
    are looked for: the caller has them.
    """
    import open_clip

    name = arch.partition(":")[2]
    local = Path(name).is_dir()
    model_name, _, tag = (f"local-dir:{name}", "", "") if local else name.partition("/")
    quick = bool(open_clip.get_pretrained_cfg(model_name, tag).get("quick_gelu"))
    clip = open_clip.create_model(
        model_name, pretrained=(tag if weights else "") or None, load_weights=weights,
        require_pretrained=local and weights, pretrained_text=False, force_quick_gelu=quick,
    )  # fmt: skip
    tower = clip.visual
    size = tower.image_size[0] if isinstance(tower.image_size, tuple) else tower.image_size
    mean = getattr(tower, "image_mean", None) or open_clip.OPENAI_DATASET_MEAN
    std = getattr(tower, "image_std", None) or open_clip.OPENAI_DATASET_STD
    return tower, {"size": size, "mean": tuple(mean), "std": tuple(std)}


def add_lora(tower: nn.Module, rank: int = RANK) -> None:
    """Put trainable low-rank adapters into the tower (Hu et al. 2021); its own weights stay frozen.

    peft adapts fused attention by merging weights inside the forward pass, which no functional
    derivative survives, so the adapters sit in the linear layers outside of it (the MLPs of a
    CLIP transformer), or, where a tower has none, in its convolutions.
    """
    from peft import LoraConfig, inject_adapter_in_model

    names = adapted_layers(tower)
    if not names:
        raise UsageError(
            f"--arch {OPEN_CLIP_LORA}", "no layer of this tower can be adapted",
            f"Use {OPEN_CLIP}NAME for a linear head.",
        )  # fmt: skip
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names)
    inject_adapter_in_model(config, tower)


def adapted_layers(tower: nn.Module) -> list[str]:
    """The names of the linear layers outside fused attention, else of the convolutions."""
    fused = tuple(
        f"{name}." for name, module in tower.named_modules() if type(module).__name__ in FUNCTIONAL
    )
    free = [(n, m) for n, m in tower.named_modules() if n and not (fused and n.startswith(fused))]
    for kind in (nn.Linear, nn.Conv2d):
        names = [name for name, module in free if isinstance(module, kind)]
        if names:
            return names
    return []
