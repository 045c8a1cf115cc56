"""Training of f_theta for a fixed number of steps.

Nothing here ever sees a test set: `train_classifier` takes training data and, at most, validation
data, and `predict` is called by the evaluation once the model is final.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..runtime import signals
from ..runtime.device import DTYPES, autocast
from ..runtime.distributed import all_reduce_mean, world
from ..runtime.errors import UsageError
from ..runtime.progress import Progress, silent
from ..runtime.seeds import derive_seed
from .batches import Batches, loader_errors
from .data import LabelledImages, to_float
from .models import Classifier, has_common_tower
from .resume import Keeper, Training

FEATURES = 1 << 30  # bytes that may be kept of a tower that is never trained


@dataclass(frozen=True)
class TrainConfig:
    """Choices of one training run; `steps` are optimiser steps, whatever the size of the data."""

    steps: int = 400
    batch_size: int = 64
    optimizer: str = "adamw"  # "adamw" | "sgd" (Nesterov momentum .9)
    lr: float = 4e-3
    weight_decay: float = 5e-2
    warmup: float = 0.05  # share of the steps with a linearly rising rate; cosine to zero after it
    label_smoothing: float = 0.0
    augmentation: str = "pad"  # see batches.AUGMENTATIONS
    real_share: float = 0.5  # share of each batch that comes from `data` when there is a `mix`
    validate_every: int = 0  # steps between looks at the validation set; 0 keeps the last step
    precision: str = "fp32"

    def facts(self) -> dict[str, Any]:
        """The configuration as JSON."""
        return asdict(self)


PRESETS = {
    "quick": TrainConfig(),
    # The paper trains ResNet-50 from scratch and names no more: steps, rate, decay, schedule, crop
    # and batch are the usual choices for a few thousand images of 224 pixels.
    "paper": TrainConfig(
        steps=10_000, batch_size=64, optimizer="sgd", lr=0.05, weight_decay=5e-4,
        warmup=0.05, augmentation="crop",
    ),
    # torchvision's first ImageNet recipe (SGD .1, momentum .9, weight decay 1e-4, batch 256).
    "torchvision-v1": TrainConfig(
        steps=10_000, batch_size=256, optimizer="sgd", lr=0.1, weight_decay=1e-4,
        warmup=0.0, augmentation="crop",
    ),
}  # fmt: skip


PRESET_ARCHS = {"quick": "small-cnn", "paper": "resnet50", "torchvision-v1": "resnet50"}


@dataclass
class TrainResult:
    """What a run left behind; the model itself is trained in place."""

    steps: int
    selected_step: int
    seconds: float
    loss: float  # mean of the last tenth of the steps
    history: list[dict[str, float]] = field(default_factory=list)  # validation looks


def preset(name: str, **changes: Any) -> TrainConfig:
    """A named configuration with the given fields changed (None keeps the preset's value)."""
    if name not in PRESETS:
        raise UsageError(f"--preset {name}", "unknown", f"Use one of {', '.join(PRESETS)}.")
    return replace(PRESETS[name], **{k: v for k, v in changes.items() if v is not None})


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The configured optimiser; vectors (biases, batch norm) are not decayed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=config.lr)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine to zero."""
    rising = max(1, round(config.warmup * config.steps))
    if step < rising and config.warmup > 0:
        return config.lr * (step + 1) / rising
    return config.lr * 0.5 * (1 + math.cos(math.pi * step / config.steps))


def batch_loss(logits: Tensor, y: Tensor, config: TrainConfig, processes: int = 1) -> Tensor:
    """Mean cross-entropy of a batch. Of several processes that share it each gets its part, such
    that their mean is the loss."""
    losses = F.cross_entropy(logits, y, reduction="none", label_smoothing=config.label_smoothing)
    return losses.sum() / (config.batch_size / processes)


def in_parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """The model as torch's DistributedDataParallel; on GPUs batch norm sees the whole batch."""
    if device.type == "cuda":
        synchronise_batch_norm(model)
        return nn.parallel.DistributedDataParallel(model, device_ids=[device])
    return nn.parallel.DistributedDataParallel(model)


def synchronise_batch_norm(model: nn.Module) -> None:
    """Batch norm over all processes, in place; torch's own function loses timm's activations."""
    from timm.layers import convert_sync_batchnorm

    convert_sync_batchnorm(model)


def pays_to_keep(model: Classifier, count: int, asked: int) -> bool:
    """Whether the features of `count` images shall be kept: the tower is never trained, so many or
    more are asked for in all, and they take no more than `FEATURES`."""
    small = count * model.head.in_features * 4 <= FEATURES
    return has_common_tower(model.arch) and count <= asked and small


def tower_features(
    model: Classifier, images: Tensor, precision: str = "fp32", progress: Progress = silent
) -> Tensor:
    """`extract_features` in this precision, with progress. The batches are always the same, so that
    a run that goes on finds the same."""
    found = []
    with progress("features", len(images)) as task:
        for part in images.split(256):
            with autocast(next(model.parameters()).device, DTYPES[precision]):
                found.append(extract_features(model, part))
            task.advance(len(part))
    return torch.cat(found)


Sight = Callable[[Classifier, Tensor, str, Progress], Tensor]


def _seen(
    model: Classifier, see: Sight, progress: Progress, data: LabelledImages, precision: str
) -> LabelledImages:
    return replace(data, images=see(model, data.images, precision, progress))


def train_classifier(
    model: Classifier,
    data: LabelledImages,
    config: TrainConfig,
    *,
    seed: int,
    mix: LabelledImages | None = None,
    validation: LabelledImages | None = None,
    checkpoint: Path | None = None,
    workers: int = 0,
    together: bool = False,
    see: Sight = tower_features,
    progress: Progress = silent,
) -> TrainResult:
    """Train `model` in place on `data` (and `mix`) for `config.steps` steps; it ends in eval mode.

    With `validation` and `config.validate_every` the step with the best validation accuracy is
    kept, else the last. The same seed, data and number of threads give the same weights bit for bit
    on the CPU, also where a run that a signal stopped (Stopped) goes on from `checkpoint`.
    `workers` processes crop and augment, where that is asked for image by image. `together`: all
    processes under torchrun train this one model, each on its share of every batch (batch norm sees
    the share, but for synchronised one on GPUs). Where a head alone learns and nothing augments, it
    learns from features, which `see` finds, if that pays (`pays_to_keep`). Not `together`.
    UtilgenError: a worker died; at most the last minute is lost where there is a checkpoint.
    """
    device = next(model.parameters()).device
    model.to(memory_format=torch.channels_last)  # as `to_float` makes the images
    rank, processes = world() if together else (0, 1)
    keeper = Keeper(checkpoint, device, together)
    learner: nn.Module = model
    validation = validation if config.validate_every else None
    count, asked = len(data) + (len(mix) if mix else 0), config.steps * config.batch_size
    if not together and config.augmentation == "none" and pays_to_keep(model, count, asked):
        learner, seen = model.head, partial(_seen, model, see, progress)
        data, mix = seen(data, config.precision), mix and seen(mix, config.precision)
        validation = validation and seen(validation, "fp32")  # as `predict` is asked
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(derive_seed("noise", seed))  # of dropout and its like
        scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        training = Training(learner, make_optimizer(learner, config), scaler)
        if checkpoint:
            training.load(checkpoint)
        batches = Batches(
            data, config, seed, mix, training.step, device, model.transform["size"], workers,
            rank, processes,
        )  # fmt: skip
        best = _Best(training, validation)
        with signals.deferred() if checkpoint else nullcontext(), loader_errors():
            _take_steps(training, batches, best, keeper, config, progress)
    selected = best.restore(config.steps)
    last = training.losses[-max(1, config.steps // 10) :]
    loss = torch.stack(last).mean().item() if last else math.nan
    model.eval()
    return TrainResult(config.steps, selected, keeper.seconds(training), loss, best.history)


def _take_steps(
    training: Training, batches: Batches, best: _Best, keeper: Keeper, config: TrainConfig,
    progress: Progress,
) -> None:  # fmt: skip
    device, processes = batches.device, batches.processes
    model = in_parallel(training.model, device) if processes > 1 else training.model
    model.train()
    with progress("train", config.steps) as task:
        task.advance(training.step)
        for x, y in islice(batches, config.steps - training.step):
            for group in training.optimizer.param_groups:
                group["lr"] = learning_rate(training.step, config)
            with autocast(device, DTYPES[config.precision]):
                loss = batch_loss(model(x), y, config, processes)
            training.optimizer.zero_grad(set_to_none=True)
            training.scaler.scale(loss).backward()
            training.scaler.step(training.optimizer)
            training.scaler.update()
            loss = loss.detach()
            if processes > 1:
                all_reduce_mean([loss])
            training.losses.append(loss)
            training.step += 1
            if config.validate_every and training.step % config.validate_every == 0:
                best.look(training.step)
            task.advance()
            keeper.look(training)


class _Best:
    """The weights of the step with the best validation accuracy (the earliest of equals)."""

    def __init__(self, training: Training, validation: LabelledImages | None) -> None:
        self.training, self.validation = training, validation
        self.found = training.best or {"accuracy": -1.0, "step": 0, "history": []}

    @property
    def history(self) -> list[dict[str, float]]:
        looks: list[dict[str, float]] = self.found["history"]
        return looks

    def look(self, step: int) -> None:
        if self.validation is None:
            return
        model = self.training.model
        logits = predict(model, self.validation.images)
        model.train()
        accuracy = (logits.argmax(1) == self.validation.labels).float().mean().item()
        self.history.append({"step": step, "accuracy": accuracy})
        if accuracy > self.found["accuracy"]:
            self.found |= {"accuracy": accuracy, "step": step}
            state = model.state_dict().items()
            self.training.best_state = {k: v.detach().clone() for k, v in state}
        self.training.best = self.found

    def restore(self, last_step: int) -> int:
        if not self.training.best_state:
            return last_step
        self.training.model.load_state_dict(self.training.best_state)
        return int(self.found["step"])


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, batch_size: int = 256) -> Tensor:
    """Logits [N, C] (CPU, fp32) of uint8 images [N, 3, S, S], or by a head of features [N, D]; the
    model is put in eval mode."""
    return _in_batches(model, model, images, batch_size)


@torch.no_grad()
def extract_features(model: nn.Module, images: Tensor, batch_size: int = 256) -> Tensor:
    """Penultimate features [N, D] (CPU, fp32) of uint8 images [N, 3, S, S]."""
    return _in_batches(model, model.features, images, batch_size)


def _in_batches(model: nn.Module, call: Any, images: Tensor, batch_size: int) -> Tensor:
    model.eval()
    device = next(model.parameters()).device
    return torch.cat([call(to_float(x.to(device))).float().cpu() for x in images.split(batch_size)])
