"""Drawing the images of a plan: batches are mixed over classes, each image has its own seed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..runtime.device import pick_device, pick_dtype
from ..runtime.errors import UsageError
from ..runtime.progress import Progress, silent
from ..shards.sample import Sample, encode_json, numbered_key
from .adapters import fuse_adapters
from .bundle import find_model, read_defaults
from .ddim import SAMPLERS, initial_noise, sample
from .load import class_prompts, load_model, quiet_libraries
from .policy import Policy, load_policy
from .render import Item, prefer_channels_last, render, tile
from .tokens import read_index

FORMATS = ("png", "webp", "jpg")


@dataclass(frozen=True)
class GenerateConfig:
    """What to draw with. None means the model's own default."""

    model: str
    seed: int = 0
    tokens: Path | None = None
    adapters: tuple[Path, ...] = ()
    policy: Path | None = None
    classes: tuple[str, ...] | None = None
    prompt: str | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    sampler: str = "ddim"
    batch_size: int | None = None
    image_format: str = "png"

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            why = f"Use one of {', '.join(SAMPLERS)}."
            raise UsageError(f"--sampler {self.sampler}", "unknown", why)
        if self.image_format not in FORMATS:
            why = f"Use one of {', '.join(FORMATS)}."
            raise UsageError(f"--format {self.image_format}", "unknown", why)

    def settings(self) -> dict[str, Any]:
        """What the pictures depend on."""
        return {name: value for name, value in asdict(self).items() if name != "batch_size"}


def model_named(model: str | None, tokens: Path | None) -> str:
    """The named model, or the one that the tokens were made for."""
    named = model or (read_index(tokens).get("model") if tokens is not None else None)
    if not isinstance(named, str):
        raise UsageError("-m", "no model is named", "Add e.g. -m tiny, or set UTILGEN_MODEL.")
    return named


def known_classes(config: GenerateConfig) -> list[str]:
    """The class names in index order, found without loading the model."""
    if config.tokens is not None:
        known = read_index(config.tokens)["classes"]
        if config.classes and list(config.classes) != known:
            why = f"differ from those of {config.tokens}"
            raise UsageError("--classes", why, "Leave --classes out.")
        return list(known)
    names = config.classes or read_defaults(find_model(config.model)).get("classes")
    if not names:
        why = "its bundle names no classes"
        raise UsageError(f"model {config.model}", why, "Name them with --classes.")
    return list(names)


class Generator:
    """A loaded model with one prompt embedding a class, ready to draw items."""

    def __init__(self, config: GenerateConfig, *, device: torch.device, dtype: torch.dtype) -> None:
        self.config, self.classes = config, known_classes(config)
        self.model = load_model(
            config.model, device=device, dtype=dtype, tokens=config.tokens,
            adapters=config.adapters,
        )  # fmt: skip
        self.steps = config.steps or self.model.steps
        scale = config.guidance_scale
        self.guidance_scale = self.model.guidance_scale if scale is None else scale
        self.prompts = class_prompts(self.model, config.tokens, self.classes, config.prompt)
        self.policy: Policy | None = None
        if config.policy is not None:
            self.policy = load_policy(config.policy)
            self.policy.check(self.model, self.classes, str(config.policy))
        with quiet_libraries(), torch.no_grad():
            fuse_adapters(self.model)
            self.embeds = self.model.encode_prompts(self.prompts)  # [C, L, D]
            self.uncond = self.model.encode_prompts([""])
        prefer_channels_last(self.model)

    def latents(self, items: Sequence[Item]) -> Tensor:
        """Finished latents [B, 4, h, w] of the items."""
        noise = initial_noise(self.model, self.config.seed, items)
        steps, scale, sampler = self.steps, self.guidance_scale, self.config.sampler
        if self.policy is not None:
            return self.policy.sample(
                self.model, noise, items, self.uncond, steps, scale, sampler
            )[0]  # fmt: skip
        cond = self.embeds[[c for c, _ in items]]
        return sample(self.model, noise, cond, self.uncond, steps, scale, sampler)

    def facts(self, item: Item) -> dict[str, Any]:
        """Where the image of `item` comes from: its `json` member."""
        config, (label, image) = self.config, item
        facts = {
            "class_name": self.classes[label], "prompt": self.prompts[label],
            "seed": config.seed, "image": image, "steps": self.steps,
            "guidance_scale": self.guidance_scale, "sampler": config.sampler,
            "model": config.model, "source": "generate",
        }  # fmt: skip
        made_with = {"tokens": config.tokens, "policy": config.policy}
        facts |= {name: str(path) for name, path in made_with.items() if path is not None}
        return facts | ({"adapters": [str(a) for a in config.adapters]} if config.adapters else {})

    def draw(self, items: Sequence[Item], progress: Progress = silent) -> Iterator[Sample]:
        """The samples of `items`, in order."""
        rows, format = tile(self.model, self.config.batch_size), self.config.image_format
        with progress("draw", len(items)) as task:
            for item, image in render(self.model, items, self.latents, rows, format):
                yield generated_sample(item, image, format, self.facts(item))
                task.advance()


class LazyGenerator:
    """A `Generator` that is loaded when the first image is wanted, and counts what it draws."""

    def __init__(
        self,
        config: GenerateConfig,
        device: str | None = None,
        precision: str | None = None,
        progress: Progress = silent,
    ) -> None:
        self.config, self.progress = config, progress
        self.device = pick_device(device)
        self.dtype = pick_dtype(precision, self.device)
        self.generator: Generator | None = None
        self.images, self.seconds = 0, 0.0

    def draw(self, items: Sequence[Item]) -> Iterator[Sample]:
        """The samples of `items`, in order."""
        if self.generator is None:
            self.generator = Generator(self.config, device=self.device, dtype=self.dtype)
        start = time.monotonic()
        for drawn in self.generator.draw(items, self.progress):
            yield drawn
            self.images += 1
        self.seconds += time.monotonic() - start

    def about(self) -> dict[str, Any]:
        """How it is drawn, for a shard's statistics."""
        precision = str(self.dtype).removeprefix("torch.")
        return {"device": self.device.type, "precision": precision, "torch": torch.__version__}

    def summary(self) -> dict[str, Any]:
        """What the run drew."""
        rate = self.images / self.seconds if self.seconds else 0.0
        return {"samples": self.images, "seconds": round(self.seconds, 3),
                "images_per_second": round(rate, 3), **self.about()}  # fmt: skip

    def line(self) -> str:
        """The summary for people."""
        if not self.images:
            return "nothing to draw: all shards are there"
        rate = self.images / max(self.seconds, 1e-9)
        return f"drew {self.images} images, {rate:.3g} images/s on {self.device.type}"


def generated_sample(item: Item, image: bytes, format: str, facts: dict[str, Any]) -> Sample:
    """An encoded image of (class index, image index) as a sample."""
    members = {format: image, "cls": str(item[0]).encode(), "json": encode_json(facts)}
    return Sample(numbered_key(*item), members)
