"""Textual inversion of all classes at once (Gal et al. 2023, arXiv 2208.01618).

Legend: theta [C, V, E], V token embeddings a class, is all that is trained, on the plain denoising
loss of the few real images under short captions. One batch holds images of many classes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.artefact import CHECKPOINT
from ..runtime.checkpoint import remove_checkpoint
from ..runtime.device import sent
from ..runtime.distributed import world
from ..runtime.errors import BadInput, UsageError
from ..runtime.progress import Progress, silent
from ..shards.sample import Sample
from .adapters import learnt_with
from .datadream import Shots, noised_errors, read_shots
from .finetune import Watch, finetune
from .finetune_config import Draw, FinetuneConfig, draw_rows
from .load import LatentDiffusion, load_model
from .prompts import replaced_embeddings, taken
from .tokens import INDEX, extend_vocabulary, read_index, save_tokens, token_name

CAPTIONS = ("a photo of a {}", "a picture of a {}", "a {}", "{}")
PROBE_DRAWS = 4  # noised copies of an image that the loss before and after is measured on
PROBE_ROWS = 512  # shots that it looks at


@dataclass(frozen=True, slots=True)
class InversionConfig:
    """Which tokens (or prompts) to learn, and how."""

    model: str
    vectors: int = 1
    population: int = 0  # prompts a class, instead of a token
    classes: tuple[str, ...] | None = None
    flip: bool = False
    gradient_checkpointing: bool = False
    adapters: tuple[Path, ...] = ()  # of the generator that they are learnt for
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)

    def load(self, device: torch.device, dtype: torch.dtype) -> LatentDiffusion:
        """The generator. UsageError: it has one adapter a class, and all classes learn at once."""
        model = load_model(self.model, device=device, dtype=dtype, adapters=self.adapters)
        if model.class_adapters is not None:
            why = "has one adapter a class, and invert learns all classes at once"
            raise UsageError(f"adapter {model.class_adapters.name}", why, "Use lora --per dataset.")
        if self.gradient_checkpointing:
            model.unet.enable_gradient_checkpointing()
        return model


@dataclass(frozen=True, slots=True)
class CaptionedDraw(Draw):
    """A draw that also picks the caption of each row, int64 [R]."""

    captions: Tensor

    def part(self, index: Tensor) -> CaptionedDraw:
        """The draws of some of the rows."""
        rows = Draw.part(self, index)
        return CaptionedDraw(rows.noise, rows.timesteps, rows.flip, self.captions[index])


class TokenObjective:
    """mean |target - prediction|^2 over the shots as a function of theta alone."""

    watch: Watch | None = None
    mixed = False  # theta enters as one of the layers' precision

    def __init__(self, model: LatentDiffusion, shots: Shots, start: Tensor) -> None:
        """start: float [C, V, E]. Adds the tokens to the model's vocabulary."""
        self.model, self.shots = model, shots
        self.device, self.dtype, self.rows = model.device, model.dtype, len(shots.labels)
        tokens = [token_name(c) for c in range(len(start))]
        self.vocabulary = extend_vocabulary(model, dict(zip(tokens, start, strict=True)))
        self.first = int(self.vocabulary[0, 0])  # the new ids are consecutive
        self.captions = [model.template, *(c for c in CAPTIONS if c != model.template)]
        prompts = [caption.replace("{}", token) for caption in self.captions for token in tokens]
        self.ids = model.token_ids(prompts).reshape(len(self.captions), len(tokens), -1)
        self.theta = nn.Parameter(start.to(self.device, torch.float32).clone())
        self.parameters: Mapping[str, nn.Parameter] = {"theta": self.theta}

    def draw(self, rows: int, generator: torch.Generator) -> CaptionedDraw:
        """Noise, timestep, flip and caption of each shot; half of them have the model's caption."""
        plain = draw_rows(
            rows, self.model.latent_shape, len(self.model.scheduler.alphas_cumprod), generator
        )
        others = len(self.captions) - 1
        captions = (torch.randint(2 * others, (rows,), generator=generator) - others + 1).clamp(
            min=0
        )
        return CaptionedDraw(plain.noise, plain.timesteps, plain.flip, captions)

    def loss(self, rows: Tensor, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        """The denoising loss of shots `rows`."""
        assert isinstance(draw, CaptionedDraw)
        return self.errors(rows, draw).mean(), {}

    def errors(self, rows: Tensor, draw: CaptionedDraw) -> Tensor:
        """The denoising loss of each of shots `rows`, [R]."""
        context = self.context(self.shots.labels[rows], draw.captions)
        return noised_errors(self.model, self.shots, rows, draw, context)

    def context(self, labels: Tensor, captions: Tensor) -> Tensor:
        """Prompt embeddings [R, L, D] with theta in the classes' places, each encoded once."""
        classes = self.ids.shape[1]
        used, place = (captions * classes + labels).unique(return_inverse=True)
        ids = self.ids.flatten(0, 1)[sent(used, self.device)]  # [P, L]
        table = self.model.text_encoder.get_input_embeddings().weight
        own = (ids - self.first).clamp(min=0)
        theta = taken(self.theta.flatten(0, 1), own)
        tokens = torch.where((ids >= self.first).unsqueeze(-1), theta, table[ids].float())
        with replaced_embeddings(self.model.text_encoder, tokens):
            encoded = self.model.text_encoder(ids).last_hidden_state
        return taken(encoded, sent(place, self.device))

    def probe(self) -> float:
        """`mean_error` under the model's own caption."""
        return mean_error(self, lambda d: replace(d, captions=torch.zeros_like(d.captions)))


@torch.no_grad()
def mean_error(objective: Any, settle: Callable[[Any], Any] = lambda draw: draw) -> float:
    """The loss of an objective on fixed noise and timesteps, its draws changed by `settle`; of
    PROBE_ROWS shots where there are more."""
    shots = torch.linspace(0, objective.rows - 1, min(objective.rows, PROBE_ROWS)).round().long()
    rows = shots.repeat(PROBE_DRAWS)
    draw = settle(objective.draw(len(rows), torch.Generator().manual_seed(0)))
    parts = torch.arange(len(rows)).split(64)
    errors = torch.cat([objective.errors(rows[part], draw.part(part)) for part in parts])
    return float(errors.mean())


def class_name_embeds(model: LatentDiffusion, names: Sequence[str], vectors: int) -> Tensor:
    """Where theta starts, float [C, V, E]: the embeddings of each class name's own tokens.

    With fewer vectors than tokens the last vector is the mean of the rest; with more, the last
    token is repeated.
    """
    table = model.text_encoder.get_input_embeddings().weight.float().cpu()
    return torch.stack([_fit(table[_name_ids(model, name)], vectors) for name in names])


def _name_ids(model: LatentDiffusion, name: str) -> list[int]:
    ids: list[int] = model.tokenizer(name, add_special_tokens=False).input_ids
    return ids or [model.tokenizer.eos_token_id]


def _fit(rows: Tensor, vectors: int) -> Tensor:
    if len(rows) >= vectors:
        return torch.cat([rows[: vectors - 1], rows[vectors - 1 :].mean(0, keepdim=True)])
    return torch.cat([rows, rows[-1:].expand(vectors - len(rows), -1)])


def check_classes(shots: Shots, classes: Sequence[str] | None) -> list[str]:
    """The class names in index order. BadInput: a class has no images, or a name differs."""
    count = len(classes) if classes else int(shots.labels.max()) + 1
    empty = [c for c in range(count) if c not in shots.names]
    if empty:
        name = f" ({classes[empty[0]]})" if classes else ""
        raise BadInput(f"class {empty[0]}{name}", "has no images", "Add some, or leave it out.")
    if max(shots.names) >= count:
        raise BadInput(f"class {max(shots.names)}", "is in the shards, but not among --classes")
    names = [shots.names[c] for c in range(count)]
    if classes and list(classes) != names and names != [str(c) for c in range(count)]:
        raise UsageError("--classes", f"differ from those of the shards ({', '.join(names)})")
    return list(classes) if classes else names


def without_names(shots: Shots, classes: Sequence[str] | None) -> frozenset[int]:
    """The classes that neither the shards nor the caller have named."""
    return frozenset() if classes else shots.unnamed


def invert_tokens(
    samples: Iterable[Sample],
    out: Path,
    config: InversionConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Learn the tokens of all classes and write them to `out`; what index.json says comes back.

    Resumes from the checkpoint in `out`. BadInput: no images, or a class without any.
    """
    start = time.monotonic()
    model = config.load(device, dtype)
    shots = read_shots(samples, model, lambda s: "", flip=config.flip, progress=progress)
    names = check_classes(shots, config.classes)
    model.drop("vae")
    objective = TokenObjective(model, shots, class_name_embeds(model, names, config.vectors))
    before = objective.probe()
    finetune(
        objective, config.finetune, checkpoint=out / CHECKPOINT, fingerprint=shots.fingerprint,
        description="invert", progress=progress,
    )  # fmt: skip
    if world()[0] == 0:
        facts = {
            **learnt_with(config.adapters),
            "model": config.model, "template": model.template, "images": len(shots.labels),
            "flip": config.flip, "finetune": asdict(config.finetune),
            "loss_before": before, "loss_after": objective.probe(),
            "seconds": round(time.monotonic() - start, 1),
        }  # fmt: skip
        if unnamed := without_names(shots, config.classes):
            facts["unnamed"] = sorted(unnamed)
        save_tokens(out, names, objective.theta.detach(), facts)
        remove_checkpoint(out / CHECKPOINT)
    return read_index(out) if (out / INDEX).exists() else {}
