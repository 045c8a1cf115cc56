"""A latent diffusion model with everything that drawing from it needs.

Components are loaded one by one as the classes named here, from safetensors only: what a bundle's
model_index.json asks for (custom pipelines, remote code) is never looked at.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..runtime.errors import UsageError
from .adapters import add_adapters, fuse_adapters
from .bundle import (
    check_fit,
    check_prediction,
    default_size,
    find_model,
    load_component,
    load_weights,
    read_defaults,
)
from .tokens import add_tokens, read_index

if TYPE_CHECKING:
    from ..shards.sample import Sample
    from .class_adapters import ClassAdapters

TEMPLATE = "a photo of a {}"


@dataclass
class LatentDiffusion:
    """A frozen Stable Diffusion 1.x/2.x: modules, noise schedule, and the bundle's defaults."""

    name: str
    tokenizer: Any  # CLIPTokenizer
    text_encoder: Any  # CLIPTextModel
    vae: Any  # AutoencoderKL
    unet: Any  # UNet2DConditionModel
    scheduler: Any  # DDIMScheduler
    size: int  # pixels a side
    steps: int
    guidance_scale: float
    classes: list[str] | None
    template: str
    clip: str | None  # open_clip model name, or a directory
    device: torch.device
    dtype: torch.dtype
    class_adapters: ClassAdapters | None = None

    @property
    def prediction_type(self) -> str:
        """What the U-Net predicts: `epsilon`, `v_prediction` or `sample`."""
        kind: str = self.scheduler.config.prediction_type
        return kind

    @cached_property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one latent."""
        side = self.size // vae_scale(self.vae)
        return self.unet.config.in_channels, side, side

    def drop(self, *parts: str) -> None:
        """Let go of "vae" or "text_encoder", which have done their work: their memory is free."""
        _ = self.latent_shape  # from now on kept: it asks the VAE
        for part in parts:
            setattr(self, part, None)

    def token_ids(self, prompts: Sequence[str]) -> Tensor:
        """Padded token ids, int64 [P, L], on the model's device; too long prompts are cut."""
        from diffusers.loaders import TextualInversionLoaderMixin

        # the tokenizer makes the dictionary of its added tokens anew each time that it is asked
        known: Any = SimpleNamespace(
            tokenize=self.tokenizer.tokenize,
            added_tokens_encoder=self.tokenizer.added_tokens_encoder,
        )
        expanded = TextualInversionLoaderMixin().maybe_convert_prompt(list(prompts), known)
        encoded = self.tokenizer(
            expanded, padding="max_length", max_length=self.tokenizer.model_max_length,
            truncation=True, return_tensors="pt",
        )  # fmt: skip
        return encoded.input_ids.to(self.device)

    def refuse_cut(self, prompts: Sequence[str], template: str | None = None) -> None:
        """UsageError where a prompt says nothing of its class, or what another's says, since the
        rest is cut off. `template`: what the prompts were made of, by default the model's."""
        unnamed = (template or self.template).replace("{}", "")
        blank, *found = map(tuple, self.token_ids([unnamed, *prompts]).tolist())
        longest, first = self.tokenizer.model_max_length, {blank: unnamed}
        for prompt, ids in zip(prompts, found, strict=True):
            other = first.setdefault(ids, prompt)
            if other != prompt and len(self.tokenizer(prompt).input_ids) > longest:
                why = "is the same for two classes" if other != unnamed else "comes to no class"
                raise UsageError(
                    f"prompt {prompt[:40]!r}...", f"{why} within {longest} tokens",
                    "Shorten --prompt, or the names.",
                )  # fmt: skip

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Prompt embeddings [P, L, D], as StableDiffusionPipeline.encode_prompt makes them."""
        chunks = self.token_ids(prompts).split(64)
        return torch.cat([self.text_encoder(ids).last_hidden_state for ids in chunks])

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, 4, h, w] as images, float [B, 3, H, W] in [0, 1]; differentiable."""
        scaled = (latents / self.vae.config.scaling_factor).to(self.dtype)
        return (self.vae.decode(scaled).sample.float() / 2 + 0.5).clamp(0, 1)

    def encode_images(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] as scaled latents, float [B, 4, h, w]: the mode of the
        posterior."""
        posterior = self.vae.encode((images.to(self.device) * 2 - 1).to(self.dtype)).latent_dist
        return (posterior.mean * self.vae.config.scaling_factor).float()


def vae_scale(vae: Any) -> int:
    """Pixels a latent cell."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def load_model(
    name: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    unet_dtype: torch.dtype | None = None,
    tokens: Path | None = None,
    adapters: Sequence[Path] = (),
    fuse: bool = False,
) -> LatentDiffusion:
    """Load `tiny`, `sd15`, `sd21-base`, `sd21`, a hub id or a diffusers directory, frozen.

    `tokens` is a directory that `invert` wrote; `adapters` are LoRA directories, stacked in order,
    or (first) a full pipeline directory, whose U-Net replaces the model's. `unet_dtype` is that
    of a U-Net to be trained as a whole: below float32 the small steps of a round would be lost.
    `fuse` merges the LoRAs into the weights, in float32: what is smaller than half of the last bit
    of a weight in bf16 would be lost, whatever it adds up to over all weights.
    Raises NoInput when something is not there or cannot be reached, BadInput when it does not fit.
    """
    device = torch.device(device)
    with quiet_libraries():
        kept = torch.float32 if fuse and adapters else dtype
        model = _load_bundle(name, find_model(name), device, kept, unet_dtype or kept)
        model.dtype = dtype
        if tokens is not None:
            add_tokens(model, tokens)
        add_adapters(model, [Path(adapter) for adapter in adapters])
        if fuse:
            fuse_adapters(model)
        for module in (model.unet, model.vae, model.text_encoder):
            kind = unet_dtype or dtype if module is model.unet else dtype
            module.to(device=device, dtype=kind).requires_grad_(False).eval()
    return model


def class_prompts(
    model: LatentDiffusion,
    tokens: Path | None,
    classes: Sequence[str] | None = None,
    template: str | None = None,
) -> list[str]:
    """One prompt a class: "a photo of a dress", or with tokens "a photo of a <utilgen-0003>"."""
    names = classes or model.classes or () if tokens is None else read_index(tokens)["tokens"]
    template = template or model.template
    if "{}" not in template:
        raise UsageError(f"--prompt {template!r}", "has no {} for the class name")
    return [template.replace("{}", name) for name in names]


@dataclass(frozen=True)
class TokenPrompts:
    """The prompt of each class with its token, for shards of the classes that the tokens are of."""

    classes: list[str]
    prompts: list[str]

    @classmethod
    def read(cls, model: LatentDiffusion, tokens: Path | None) -> TokenPrompts | None:
        """Those of a directory that `invert` wrote; None without one."""
        if tokens is None:
            return None
        return cls(list(read_index(tokens)["classes"]), class_prompts(model, tokens))

    def of(self, sample: Sample, label: int, name: object) -> str:
        """The prompt for a class. BadSample: it has no token, or that of another class. (A token
        that is called by its number was learnt from shards without names.)"""
        if label >= len(self.classes):
            raise sample.bad(f"its class {label} has no token")
        if name not in (None, self.classes[label]) and self.classes[label] != str(label):
            why = f"class {label} is {name!r}, and the token there is of {self.classes[label]!r}"
            raise sample.bad(why)
        return self.prompts[label]


def _load_bundle(
    name: str, path: Path, device: torch.device, dtype: torch.dtype, unet_dtype: torch.dtype
) -> LatentDiffusion:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    unet = load_weights(path, "unet", UNet2DConditionModel, torch_dtype=unet_dtype)
    vae = load_weights(path, "vae", AutoencoderKL, torch_dtype=dtype)
    text_encoder = load_weights(path, "text_encoder", CLIPTextModel, dtype=dtype)
    tokenizer = load_component(path, "tokenizer", CLIPTokenizer.from_pretrained)
    scheduler = load_component(path, "scheduler", partial(load_scheduler, DDIMScheduler))
    check_fit(path, unet, text_encoder, vae)
    check_prediction(path, scheduler)
    bundle = read_defaults(path)
    return LatentDiffusion(
        name=name, tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, unet=unet,
        scheduler=scheduler, size=bundle.get("size") or default_size(path, unet, vae_scale(vae)),
        steps=bundle.get("steps", 25), guidance_scale=float(bundle.get("guidance_scale", 7.5)),
        classes=bundle.get("classes"), template=bundle.get("template", TEMPLATE),
        clip=bundle.get("clip"), device=device, dtype=dtype,
    )  # fmt: skip


def load_scheduler(kind: Any, path: Path) -> Any:
    """The bundle's noise schedule as DDIM, whatever sampler the bundle names.

    Latents are never clipped (DDIMScheduler would by default), the timesteps begin at 1 (diffusers'
    pipeline corrects both), and a schedule that ends at zero signal keeps 2^-24 of it, as its own
    solvers do. ValueError: flow matching or EDM, which DDIM cannot follow.
    """
    config = json.loads((path / "scheduler_config.json").read_text())
    if not config.keys() & {"beta_schedule", "trained_betas"}:
        raise ValueError(f"{config.get('_class_name')} has another kind of noise schedule")
    scheduler = kind.from_config(config, clip_sample=False, thresholding=False, steps_offset=1)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.clamp(min=2**-24)
    return scheduler


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep diffusers' and transformers' log lines, warnings and loading bars off the terminal.

    Of an error too: what they raise says the same, and becomes the one line that a user sees.
    """
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    levels = [library.get_verbosity() for library in libraries]
    bars = [library.is_progress_bar_enabled() for library in libraries]
    for library in libraries:
        library.set_verbosity(logging.CRITICAL)
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for library, level, bar in zip(libraries, levels, bars, strict=True):
            library.set_verbosity(level)
            if bar:
                library.enable_progress_bar()
