"""DataDream's baseline: LoRA on U-Net and text encoder from the few real shots (Kim et al. 2024).

The recipe of arXiv 2407.10910: rank 16, AdamW at 1e-4 with a cosine schedule, the plain denoising
loss, one adapter for the data set or one a class. Nothing but the given shots is looked at: the
number of steps is fixed, and the last weights are kept.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..runtime import signals
from ..runtime.artefact import CHECKPOINT, is_done, seal, sealed
from ..runtime.checkpoint import remove_checkpoint
from ..runtime.device import sent
from ..runtime.distributed import world
from ..runtime.errors import BadInput, UsageError
from ..runtime.files import write_json
from ..runtime.progress import Progress, silent
from ..runtime.seeds import seed_modules
from ..shards.classes import note_class
from ..shards.sample import Sample
from .adapters import LORA_WEIGHTS
from .finetune import finetune, refuse_other_processes
from .finetune_config import Draw, FinetuneConfig, draw_rows
from .latents import LatentCache, index_prompts
from .load import LatentDiffusion, TokenPrompts, load_model
from .lora import TEXT_TARGETS, UNET_TARGETS, add_lora, save_lora, train_lora_only
from .preference_loss import denoising_error, diffusion_target
from .prompts import taken
from .tokens import class_folder

DONE = "lora.json"
PER = ("dataset", "class")


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """What to adapt, and how."""

    model: str
    tokens: Path | None = None
    rank: int = 16
    per: str = "dataset"
    flip: bool = False
    gradient_checkpointing: bool = False
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)

    def __post_init__(self) -> None:
        if self.per not in PER:
            raise UsageError(f"--per {self.per}", "is neither dataset nor class")


@dataclass(frozen=True, slots=True)
class Shots:
    """latents float32 [N, variants, C, h, w]; prompt_index, labels int64 [N].

    `unnamed` classes have no name in their shards, and stand in `names` by their number.
    """

    latents: Tensor
    prompts: list[str]
    prompt_index: Tensor
    labels: Tensor
    names: dict[int, str]
    fingerprint: str
    unnamed: frozenset[int] = frozenset()

    def of_class(self, label: int) -> Shots:
        """The shots of one class."""
        rows = torch.nonzero(self.labels == label).flatten()
        index = self.prompt_index[rows]
        print_of = f"{self.fingerprint}-{label}"
        part = (self.latents[rows], self.prompts, index, self.labels[rows])
        return Shots(*part, self.names, print_of, self.unnamed)


class DenoisingObjective:
    """mean |target - prediction|^2 over the shots, with both adapters in training."""

    watch = None
    mixed = True

    def __init__(self, model: LatentDiffusion, shots: Shots) -> None:
        self.model, self.shots = model, shots
        self.device, self.dtype, self.rows = model.device, model.dtype, len(shots.labels)
        self.token_ids = model.token_ids(shots.prompts)  # [P, L]
        self.parameters = {
            f"{part}.{name}": parameter
            for part in ("unet", "text_encoder")
            for name, parameter in train_lora_only(getattr(model, part)).items()
        }

    def draw(self, rows: int, generator: torch.Generator) -> Draw:
        """Noise, timestep and flip of each shot."""
        return draw_rows(
            rows, self.model.latent_shape, len(self.model.scheduler.alphas_cumprod), generator
        )

    def loss(self, rows: Tensor, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        """The plain denoising loss of shots `rows`."""
        used, place = self.shots.prompt_index[rows].unique(return_inverse=True)
        ids = self.token_ids[sent(used, self.device)]
        encoded = self.model.text_encoder(ids).last_hidden_state
        context = taken(encoded, sent(place, self.device))
        return noised_errors(self.model, self.shots, rows, draw, context).mean(), {}


def noised_errors(
    model: LatentDiffusion, shots: Shots, rows: Tensor, draw: Draw, context: Tensor
) -> Tensor:
    """|target - prediction|^2 of shots `rows`, noised by `draw`, under prompts [R, L, D]: [R]."""
    flip = draw.flip.long() * (shots.latents.shape[1] - 1)
    alpha = model.scheduler.alphas_cumprod[draw.timesteps].view(-1, 1, 1, 1)
    given = (shots.latents[rows, flip], draw.noise, draw.timesteps, alpha)
    x0, noise, t, a = (sent(x, model.device) for x in given)
    x = a.sqrt() * x0 + (1 - a).sqrt() * noise
    prediction = model.unet(x.to(model.dtype), t, context.to(model.dtype)).sample
    return denoising_error(prediction, diffusion_target(model.prediction_type, x0, noise, a))


def read_shots(
    samples: Iterable[Sample],
    model: LatentDiffusion,
    prompt: Callable[[Sample], str],
    *,
    flip: bool = False,
    progress: Progress = silent,
) -> Shots:
    """Encode every real image once. BadInput: none, one without label, or a class of two names."""
    cache, digest = LatentCache(model, flip), hashlib.blake2b(digest_size=16)
    prompts, labels = [], []
    names: dict[int, str] = {}
    with progress("read shots", None) as task:
        for sample in samples:
            signals.check()
            prompts.append(prompt(sample))
            labels.append(note_class(names, sample))
            cache.add(sample)
            digest.update(sample.image[1] + prompts[-1].encode())
            task.advance()
    if not labels:
        raise BadInput("shots", "there are none", "Make some with `utilgen pack`.")
    known, index = index_prompts(prompts)
    unnamed = frozenset(labels) - set(names)
    return Shots(
        cache.finish(), known, index, torch.tensor(labels),
        names | {label: str(label) for label in unnamed}, digest.hexdigest(), unnamed,
    )  # fmt: skip


def shot_prompt(sample: Sample, tokens: TokenPrompts | None, template: str) -> str:
    """The class's prompt, with its token where tokens are given. BadInput: no class name."""
    if tokens is not None:
        return tokens.of(sample, sample.label, sample.facts.get("class_name"))
    if "class_name" not in sample.facts:
        raise sample.bad("its json names no class")
    return template.replace("{}", str(sample.facts["class_name"]))


def train_lora(
    samples: Iterable[Sample],
    out: Path,
    config: LoraConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Train on the shots and write the adapter (or one in a folder a class) and lora.json.

    Resumes from the checkpoint in the adapter's folder. Returns what lora.json says.
    """
    start = time.monotonic()
    model = load_model(config.model, device=device, dtype=dtype, tokens=config.tokens)
    tokens = TokenPrompts.read(model, config.tokens)
    shots = read_shots(
        samples, model, lambda s: shot_prompt(s, tokens, model.template),
        flip=config.flip, progress=progress,
    )  # fmt: skip
    parts = {".": shots} if config.per == "dataset" else shots_by_class(shots)
    for number, (folder, part) in enumerate(parts.items()):
        if is_done(out / folder / LORA_WEIGHTS):
            leave_done(out / folder)
            continue
        if number:
            model = load_model(config.model, device=device, dtype=dtype, tokens=config.tokens)
        train_adapter(model, part, out / folder, config, progress)
    settings = asdict(config) | {"tokens": config.tokens and str(config.tokens)}
    summary = {
        **settings, "images": len(shots.labels), "classes": len(shots.names),
        "adapters": list(parts), "seconds": round(time.monotonic() - start, 1),
    }  # fmt: skip
    if world()[0] == 0:
        seal(out, processes=world()[1])
        write_json(out / DONE, summary)
    return summary


def shots_by_class(shots: Shots) -> dict[str, Shots]:
    """The shots of each class under the name of its folder."""
    return {class_folder(c, name): shots.of_class(c) for c, name in sorted(shots.names.items())}


def train_adapter(
    model: LatentDiffusion, shots: Shots, out: Path, config: LoraConfig, progress: Progress
) -> None:
    """Train one adapter of U-Net and text encoder; its file appears when it is done."""
    seed_modules(config.finetune.seed)
    add_lora(model.unet, config.rank, UNET_TARGETS)
    add_lora(model.text_encoder, config.rank, TEXT_TARGETS)
    if config.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
    model.drop("vae")
    checkpoint = out / CHECKPOINT
    finetune(
        DenoisingObjective(model, shots), config.finetune, checkpoint=checkpoint,
        fingerprint=shots.fingerprint, description=f"lora {out.name}", progress=progress,
    )  # fmt: skip
    if world()[0] == 0:
        save_lora(out, model.unet, model.text_encoder)
        seal(out, processes=world()[1])
        remove_checkpoint(checkpoint)


def leave_done(out: Path) -> None:
    """Take an adapter of the run before as it is. UsageError: it had other processes."""
    facts = sealed(out)
    refuse_other_processes(out, (facts or {}).get("processes"))
    if world()[0] == 0:
        if facts is None:
            seal(out)
        remove_checkpoint(out / CHECKPOINT)
