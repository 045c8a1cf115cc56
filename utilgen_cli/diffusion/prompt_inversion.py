"""Inversion of whole prompts: M prompt embeddings a class that denoise its real shots.

Legend: theta [C, M, L, D], the text encoder's output, as `ilpo` moves it. Textual inversion (Gal
et al. 2023) in that larger space, and by parts: the shots of a class are dealt out to its M
members, so that they come to differ as the shots do, and a set drawn from them is as varied.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.artefact import CHECKPOINT
from ..runtime.checkpoint import remove_checkpoint
from ..runtime.device import sent
from ..runtime.distributed import world
from ..runtime.errors import UsageError
from ..runtime.files import write_json
from ..runtime.progress import Progress, silent
from ..shards.sample import Sample
from .adapters import learnt_with
from .datadream import Shots, noised_errors, read_shots
from .finetune import Watch, finetune
from .finetune_config import Draw, draw_rows
from .inversion import InversionConfig, check_classes, mean_error, without_names
from .load import LatentDiffusion
from .noise import NoiseConfig
from .policy import Policy
from .prompts import PromptEmbeds, TokenEmbeds, rms

DONE = "inversion.json"  # written last


def deal(labels: Tensor, population: int) -> Tensor:
    """The member of each shot, [N]: those of a class in turn. UsageError: a class has too few."""
    members = torch.zeros_like(labels)
    for c in labels.unique().tolist():
        rows = torch.nonzero(labels == c)[:, 0]
        if len(rows) < population:
            raise UsageError(
                f"--population {population}", f"class {c} has {len(rows)} images",
                "Use at most as many prompts as the smallest class has images.",
            )  # fmt: skip
        members[rows] = torch.arange(len(rows)) % population
    return members


class PromptObjective:
    """mean |target - prediction|^2 over the shots as a function of theta alone."""

    watch: Watch | None = None
    mixed = False  # theta enters as one of the layers' precision

    def __init__(
        self, model: LatentDiffusion, shots: Shots, prompts: PromptEmbeds | TokenEmbeds
    ) -> None:
        self.model, self.shots, self.prompts = model, shots, prompts
        self.device, self.dtype, self.rows = model.device, model.dtype, len(shots.labels)
        self.members = deal(shots.labels, prompts.theta.shape[1])
        self.parameters: Mapping[str, nn.Parameter] = {"theta": prompts.theta}

    def draw(self, rows: int, generator: torch.Generator) -> Draw:
        """Noise, timestep and flip of each shot."""
        steps = len(self.model.scheduler.alphas_cumprod)
        return draw_rows(rows, self.model.latent_shape, steps, generator)

    def loss(self, rows: Tensor, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        """The denoising loss of shots `rows`."""
        return self.errors(rows, draw).mean(), {}

    def errors(self, rows: Tensor, draw: Draw) -> Tensor:
        """The denoising loss of each of shots `rows`, [R]."""
        where = (self.shots.labels[rows], self.members[rows])
        context = self.prompts(*(sent(x, self.device) for x in where))
        return noised_errors(self.model, self.shots, rows, draw, context)


def invert_prompts(
    samples: Iterable[Sample],
    out: Path,
    config: InversionConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Learn the prompts of all classes and write them to `out` as a policy; its facts come back.

    The learning rate is relative to the RMS of the class prompts' embeddings. Resumes from the
    checkpoint in `out`. UsageError: a class has fewer images than prompts. BadInput: no images,
    or a class without any.
    """
    start = time.monotonic()
    model = config.load(device, dtype)
    shots = read_shots(samples, model, lambda s: "", flip=config.flip, progress=progress)
    names = check_classes(shots, config.classes)
    texts = [model.template.replace("{}", name) for name in names]
    prompts = PromptEmbeds(model, texts, config.population, config.finetune.seed)
    objective = PromptObjective(model, shots, prompts)
    model.drop("vae", "text_encoder")
    before = mean_error(objective)
    rate = config.finetune.learning_rate * rms(prompts.theta.detach())
    result = finetune(
        objective, replace(config.finetune, learning_rate=rate), checkpoint=out / CHECKPOINT,
        fingerprint=shots.fingerprint, description="invert", progress=progress,
    )  # fmt: skip
    batch = config.finetune.batch_size * config.finetune.gradient_accumulation * world()[1]
    summary = {
        "loss_before": before, "loss_after": mean_error(objective), "images": len(shots.labels),
        "unet_latents": result.steps * batch, "seconds": round(time.monotonic() - start, 1),
    }  # fmt: skip
    found = {"classes": names, "population": config.population, **summary}
    if world()[0] == 0:
        theta = prompts.theta.detach().cpu()
        settings = {**asdict(config), "adapters": [str(path) for path in config.adapters],
                    **learnt_with(config.adapters)}  # fmt: skip
        unnamed = without_names(shots, config.classes)
        Policy(theta, names, texts, NoiseConfig("none"), settings, [], summary, unnamed).save(out)
        write_json(out / DONE, found)
        remove_checkpoint(out / CHECKPOINT)
    return found
