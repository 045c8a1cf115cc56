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
from ..runtime.errors import BadInput, UsageError
from ..runtime.files import encode_json
from ..runtime.progress import Progress, silent
from ..shards.sample import Sample, numbered_key
from .adapters import other_adapters, rounds_away
from .bundle import find_model, model_files, read_defaults
from .class_adapters import acting
from .ddim import SAMPLERS, check_steps, initial_noise, sample
from .guidance import guided_output
from .load import class_prompts, load_model, quiet_libraries
from .policy import Policy, load_policy, policy_facts
from .render import Item, compile_unet, prefer_channels_last, render, tile
from .tokens import read_index
from .utilisation import image_flops, matrix_rate

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
    compile: bool = False
    images: int | None = None  # of the whole run, all its parts: no larger batch is filled up

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            why = f"Use one of {', '.join(SAMPLERS)}."
            raise UsageError(f"--sampler {self.sampler}", "unknown", why)
        if self.guidance_scale == 0:  # nothing but the empty prompt would be left
            advice = "1 is no guidance here, as 0 is in diffusers."
            raise UsageError("--guidance-scale 0", "would draw without the class", advice)
        if self.policy is not None and self.prompt is not None:
            raise UsageError(
                "--prompt", "a policy has prompts of its own", "Leave one of them out."
            )
        if self.image_format not in FORMATS:
            why = f"Use one of {', '.join(FORMATS)}."
            raise UsageError(f"--format {self.image_format}", "unknown", why)

    def settings(self) -> dict[str, Any]:
        """What the pictures depend on."""
        found = {k: v for k, v in asdict(self).items() if k not in ("batch_size", "images")}
        return {**found, "model files": model_files(self.model)}


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
    names = config.classes
    if not names and config.policy is not None:
        names = policy_facts(config.policy).get("classes")
    names = names or read_defaults(find_model(config.model)).get("classes")
    if not names:
        why = "its bundle names no classes"
        raise UsageError(f"model {config.model}", why, "Name them with --classes.")
    return list(names)


def unnamed_classes(config: GenerateConfig) -> frozenset[int]:
    """The classes that stand among `known_classes` by their number: nobody ever named them."""
    if config.tokens is not None:
        return frozenset(read_index(config.tokens).get("unnamed", ()))
    if config.policy is not None:
        return frozenset(policy_facts(config.policy).get("unnamed", ()))
    return frozenset()


def warnings_of(config: GenerateConfig, dtype: torch.dtype, init: Path | None = None) -> list[str]:
    """What a user should know before drawing; `init` is a policy as well."""
    learnt = [(f"tokens {p}", read_index(p)) for p in [config.tokens] if p is not None]
    learnt += [(f"policy {p}", policy_facts(p).get("settings", {}))
               for p in (config.policy, init) if p is not None]  # fmt: skip
    found = [other_adapters(what, facts, config.adapters) for what, facts in learnt]
    found += [rounds_away(adapter, dtype) for adapter in config.adapters[:1]]
    return [line for line in found if line is not None]


class Generator:
    """A loaded model with one prompt embedding a class, ready to draw items."""

    def __init__(self, config: GenerateConfig, *, device: torch.device, dtype: torch.dtype) -> None:
        self.config, self.classes = config, known_classes(config)
        self.unnamed = unnamed_classes(config)
        self.model = load_model(
            config.model, device=device, dtype=dtype, tokens=config.tokens,
            adapters=config.adapters, fuse=True,
        )  # fmt: skip
        self.steps = config.steps or self.model.steps
        check_steps(self.model.scheduler, self.steps)
        scale = config.guidance_scale
        self.guidance_scale = self.model.guidance_scale if scale is None else scale
        self.prompts = class_prompts(self.model, config.tokens, self.classes, config.prompt)
        self.policy: Policy | None = None
        if config.policy is not None:
            self.policy = load_policy(config.policy)
            self.policy.check(self.model, self.classes, str(config.policy))
            if self.policy.noise.mode == "zigzag" and config.sampler != "ddim":
                why = f"steps and inverts with DDIM, not {config.sampler}"
                raise UsageError(f"policy {config.policy}", why, "Leave --sampler out.")
        with quiet_libraries(), torch.no_grad():
            self._encode()
        if self.policy is None:
            self.model.refuse_cut(self.prompts, config.prompt)
        self._refuse_non_finite()
        prefer_channels_last(self.model)
        if config.compile:
            self._compile()

    @torch.no_grad()
    def _compile(self) -> None:
        """Compile the U-Net, and call it once as drawing will: it fails before any work, or not."""
        compile_unet(self.model)
        items = [(0, 0)] * self.rows_a_call
        noise, classes = initial_noise(self.model, 0, items), [0] * len(items)
        prompts = rows(self.embeds, classes), self.unconditional(items)
        with acting(self.model, classes):
            guided_output(self.model, noise, 0, *prompts, self.guidance_scale)

    def _encode(self) -> None:
        """The prompts' embeddings [C, L, D], and the empty one's [1, L, D], or [C, L, D] where
        every class has its own text encoder."""
        model, adapters = self.model, self.model.class_adapters
        if adapters is None:
            self.embeds, self.uncond = (model.encode_prompts(p) for p in (self.prompts, [""]))
            return
        adapters.check(self.classes)
        pairs = []
        for c, prompt in enumerate(self.prompts):
            with acting(model, [c, c]):
                pairs.append(model.encode_prompts([prompt, ""]))
        self.embeds, self.uncond = torch.stack(pairs, 1)

    def _refuse_non_finite(self) -> None:
        if not (self.embeds.isfinite().all() and self.uncond.isfinite().all()):
            why = "its text encoder makes NaN or infinite embeddings"
            advice = "Try --precision fp32, or look at what it was made with."
            raise BadInput(f"model {self.config.model}", why, advice)

    @property
    def rows_a_call(self) -> int:
        """How many items `latents` is called with."""
        return tile(self.model, self.config.batch_size, self.config.images)

    def unconditional(self, items: Sequence[Item]) -> Tensor:
        """The empty prompt's embedding for the items, [1 or B, L, D]."""
        return self.uncond if len(self.uncond) == 1 else rows(self.uncond, [c for c, _ in items])

    def latents(self, items: Sequence[Item]) -> Tensor:
        """Finished latents [B, 4, h, w] of the items."""
        noise, classes = initial_noise(self.model, self.config.seed, items), [c for c, _ in items]
        how = (self.unconditional(items), self.steps, self.guidance_scale, self.config.sampler)
        with acting(self.model, classes):
            if self.policy is not None:
                return self.policy.sample(self.model, noise, items, *how)[0]
            return sample(self.model, noise, rows(self.embeds, classes), *how)

    def facts(self, item: Item) -> dict[str, Any]:
        """Where the image of `item` comes from: its `json` member."""
        config, (label, image) = self.config, item
        facts = {
            "prompt": self.prompts[label],
            "seed": config.seed, "image": image, "steps": self.steps,
            "guidance_scale": self.guidance_scale, "sampler": config.sampler,
            "model": config.model, "source": "generate",
        }  # fmt: skip
        facts |= {} if label in self.unnamed else {"class_name": self.classes[label]}
        made_with = {"tokens": config.tokens, "policy": config.policy}
        facts |= {name: str(path) for name, path in made_with.items() if path is not None}
        return facts | ({"adapters": [str(a) for a in config.adapters]} if config.adapters else {})

    def draw(self, items: Sequence[Item], progress: Progress = silent) -> Iterator[Sample]:
        """The samples of `items`, in order."""
        rows, format = self.rows_a_call, self.config.image_format
        with progress("draw", len(items)) as task:
            for item, image in render(self.model, items, self.latents, rows, format):
                yield generated_sample(item, image, format, self.facts(item))
                task.advance()


def rows(x: Tensor, at: Sequence[int]) -> Tensor:
    """x[at], but a list of numbers would be copied to a GPU, which makes the host wait."""
    return torch.stack([x[i] for i in at])


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
        self._utilisation: dict[str, float] = {}

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

    def utilisation(self) -> dict[str, float]:
        """Operations an image and their rate over that of matrix products here; {} where the run
        was too short to say (or had a policy, whose noise optimisation needs more)."""
        generator = self.generator
        if generator is None or generator.policy is not None or self.seconds < 1:
            return {}
        if not self._utilisation:
            flops = image_flops(generator.model, generator.steps, generator.guidance_scale)
            share = flops * self.images / self.seconds / matrix_rate(self.device, self.dtype)
            self._utilisation = {"gflop_per_image": round(flops / 1e9, 4),
                                 "model_flops_utilisation": round(share, 4)}  # fmt: skip
        return self._utilisation

    def summary(self) -> dict[str, Any]:
        """What the run drew."""
        rate = self.images / self.seconds if self.seconds else 0.0
        found = {"samples": self.images, "seconds": round(self.seconds, 3),
                 "images_per_second": round(rate, 3), **self.utilisation(),
                 **self.about()}  # fmt: skip
        if self.device.type == "cuda":
            found["gpu_peak_mib"] = torch.cuda.max_memory_allocated(self.device) >> 20
        return found

    def line(self) -> str:
        """The summary for people."""
        if not self.images:
            return "nothing left to draw"
        rate = self.images / max(self.seconds, 1e-9)
        line = f"drew {self.images} images, {rate:.3g} images/s on {self.device.type}"
        found = self.utilisation()
        if not found:
            return line
        share, flops = found["model_flops_utilisation"], found["gflop_per_image"]
        return f"{line}: {flops:.3g} GFLOP an image, {100 * share:.0f} % of the matrix rate here"


def generated_sample(item: Item, image: bytes, format: str, facts: dict[str, Any]) -> Sample:
    """An encoded image of (class index, image index) as a sample."""
    members = {format: image, "cls": str(item[0]).encode(), "json": encode_json(facts)}
    return Sample(numbered_key(*item), members)
