"""The training loop of `dpo`, `lora` and `invert`: resumable, the same on one process or several.

Step s draws everything from (seed, s), so a resumed run goes on bit for bit, and the global batch
(batch_size x gradient_accumulation x processes) is dealt to the processes row by row, so that two
processes compute what one does with the doubled batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from ..runtime import distributed, signals
from ..runtime.checkpoint import (
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from ..runtime.device import autocast
from ..runtime.errors import UsageError, UtilgenError
from ..runtime.progress import Progress, silent
from ..runtime.seeds import step_generator
from .finetune_config import Draw, FinetuneConfig, make_optimizer, schedule_factor, shuffled

Figures = dict[str, float]
SAVE_EVERY = 60.0  # seconds, where saving takes no more than a twentieth of them
MAX_LOST = 3  # steps in a row that half precision may lose


class Watch(Protocol):
    """What an objective sees on held-out data."""

    def validate(self) -> Figures:
        """Figures of the parameters as they are."""

    def score(self, figures: Figures) -> float:
        """What the best checkpoint maximises."""

    def degrading(self, history: list[Figures]) -> str | None:
        """Why training should stop now, if it should."""


class Objective(Protocol):
    """What is trained, on which rows."""

    rows: int
    dtype: torch.dtype
    mixed: bool  # parameters in float32 stand among layers of `dtype`

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What the optimiser changes, by name."""

    @property
    def watch(self) -> Watch | None:
        """None where nothing is held out."""

    def draw(self, rows: int, generator: torch.Generator) -> Draw:
        """The randomness of a batch."""

    def loss(self, rows: Tensor, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss over training rows int64 [R], and figures to show: no host waits for them."""


@dataclass(slots=True)
class FinetuneResult:
    """What happened; `best_step` is the step whose weights were kept."""

    steps: int = 0
    best_step: int = 0
    stopped: str | None = None
    history: list[Figures] = field(default_factory=list)


def means(figures: list[dict[str, Tensor]]) -> Figures:
    """The mean of each figure over the parts of a batch: a GPU is waited for once."""
    values = torch.stack([torch.stack(list(f.values())).float() for f in figures]).tolist()
    columns = zip(figures[0], zip(*values, strict=True), strict=True)
    return {name: sum(column) / len(column) for name, column in columns}


class Finetuning:
    """The state of a run between two steps."""

    def __init__(self, objective: Objective, config: FinetuneConfig) -> None:
        self.objective, self.config = objective, config
        self.rank, self.processes = distributed.init()
        self.parameters = list(objective.parameters.values())
        self.device = self.parameters[0].device
        self.optimizer = make_optimizer(self.parameters, config)
        self.learning_rate = schedule_factor(self.optimizer, config)
        self.autocast_to = objective.dtype if objective.mixed else torch.float32
        fp16 = objective.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=fp16)
        self.average = [p.detach().clone() for p in self.parameters] if config.ema else []
        watched = objective.watch is not None
        self.best = [p.detach().clone() for p in self.parameters] if watched else []
        self.result = FinetuneResult()
        self.lost = 0  # steps in a row whose loss was not finite

    def advance(self) -> Figures | None:
        """One optimiser step; the figures of its batch. None: a stop signal came between its parts
        (of several processes none looks, since all would wait for it), and it is to be begun anew.
        """
        step, config = self.result.steps, self.config
        rows, draw = self._global_batch(step)
        mine = torch.arange(len(rows))[self.rank :: self.processes]
        figures: list[dict[str, Tensor]] = []
        for part in mine.split(config.batch_size):
            if figures and self.processes == 1 and signals.stop_requested():
                self.optimizer.zero_grad(set_to_none=True)
                return None
            with autocast(self.device, self.autocast_to):
                loss, shown = self.objective.loss(rows[part], draw.part(part))
            self.scaler.scale(loss / config.gradient_accumulation).backward()
            figures.append({"loss": loss.detach(), **shown})
        mean = means(figures)
        self.lost = 0 if math.isfinite(mean["loss"]) else self.lost + 1
        if self.lost > (MAX_LOST if self.scaler.is_enabled() else 0):
            self._refuse()
        self._update(step)
        return mean

    def _refuse(self) -> NoReturn:
        step = f"step {self.result.steps}"
        raise UtilgenError(step, "the loss is not finite", "Lower --lr or --beta.")

    def _update(self, step: int) -> None:
        distributed.all_reduce_mean([p.grad for p in self.parameters if p.grad is not None])
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * self.learning_rate(step)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.result.steps = step + 1
        if self.config.ema:
            # young averages forget faster, as diffusers' EMAModel does
            decay = min(self.config.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)

    def _global_batch(self, step: int) -> tuple[Tensor, Draw]:
        config, n = self.config, self.objective.rows
        size = config.batch_size * config.gradient_accumulation * self.processes
        first = step * size
        rows = [shuffled(config.seed, n, i // n)[i % n] for i in range(first, first + size)]
        return torch.stack(rows), self.objective.draw(size, step_generator(config.seed, step))

    def look(self) -> Figures:
        """Judge the weights as they would be saved, keep them if they are the best so far, and
        stop if they degrade."""
        watch, result = self.objective.watch, self.result
        if watch is None:
            return {}
        with self.final_weights():
            figures = distributed.as_the_first(watch.validate(), self.device)
            if watch.score(figures) > max(map(watch.score, result.history), default=-math.inf):
                self.best = [p.detach().clone() for p in self.parameters]
                result.best_step = result.steps
        result.history.append({"step": float(result.steps), **figures})
        result.stopped = watch.degrading(result.history)
        return figures

    @contextmanager
    def final_weights(self) -> Iterator[None]:
        """Inside, the parameters hold their moving average, where one is kept."""
        if not self.average:
            yield
            return
        now = [p.detach().clone() for p in self.parameters]
        copy_into(self.parameters, self.average)
        yield
        copy_into(self.parameters, now)

    def finish(self) -> FinetuneResult:
        """Leave the weights to keep in the parameters: the best, or without validation the last.

        UtilgenError: half precision lost the last steps, or all of them.
        """
        if self.lost:
            self._refuse()
        if self.result.steps and not self.optimizer.state:
            why = f"none of {self.result.steps} steps was taken, their gradients overflowed"
            raise UtilgenError(
                "half precision", why, "Use --precision bf16 or fp32, or more --steps."
            )
        if self.result.history:
            copy_into(self.parameters, self.best)
        else:
            if self.average:
                copy_into(self.parameters, self.average)
            self.result.best_step = self.result.steps
        return self.result

    def save(self, path: Path, fingerprint: str) -> None:
        """Write the whole state (first process only)."""
        if self.rank:
            return
        tensors = optimizer_tensors(self.optimizer)
        for kind, values in self._kinds():
            named = zip(self.objective.parameters, values, strict=True)
            tensors |= {f"{kind}.{name}": value for name, value in named}
        scaler = self.scaler.state_dict()
        meta = {"result": asdict(self.result), "scaler": scaler, "fingerprint": fingerprint,
                "processes": self.processes}  # fmt: skip
        save_checkpoint(path, tensors, meta)

    def _kinds(self) -> list[tuple[str, list[Any]]]:
        kinds: list[tuple[str, list[Any]]] = [
            ("weights", self.parameters),
            ("average", self.average),
            ("best", self.best),
        ]
        return [(kind, values) for kind, values in kinds if values]

    def resume(self, path: Path, fingerprint: str) -> None:
        """Go on from the checkpoint at `path`, if there is one.

        UsageError: made on other data, or by another number of processes.
        """
        found = load_checkpoint(path)
        if found is None:
            return
        tensors, meta = found
        if meta["fingerprint"] != fingerprint:
            raise UsageError(
                str(path.parent),
                "was begun on other data",
                "Begin again with --overwrite, or remove it.",
            )
        refuse_other_processes(path.parent, meta.get("processes"))
        for kind, values in self._kinds():
            copy_into(values, [tensors[f"{kind}.{name}"] for name in self.objective.parameters])
        restore_optimizer(self.optimizer, tensors)
        self.scaler.load_state_dict(meta["scaler"])
        self.result = FinetuneResult(**meta["result"])


def finetune(
    objective: Objective,
    config: FinetuneConfig,
    *,
    checkpoint: Path | None = None,
    fingerprint: str = "",
    description: str = "train",
    progress: Progress = silent,
) -> FinetuneResult:
    """Train `objective`; afterwards its parameters hold the weights to keep.

    With a `checkpoint` path the run resumes from it and keeps it up to date; on a stop signal
    (to any process) all processes save and raise `Stopped`.
    """
    run = Finetuning(objective, config)
    if checkpoint is not None:
        run.resume(checkpoint, fingerprint)
    if run.result.steps == 0 and not run.result.history:
        run.look()
    saved, wait = time.monotonic(), SAVE_EVERY
    with progress(description, config.steps) as task, signals.deferred():
        task.advance(run.result.steps)
        while run.result.steps < config.steps and run.result.stopped is None:
            if figures := run.advance():
                task.advance(1, **figures)
                if due(run.result.steps, config):
                    task.advance(0, **{f"held-out {name}": v for name, v in run.look().items()})
            stop = figures is None or distributed.stop_anywhere(run.device)
            if checkpoint is not None and (stop or time.monotonic() - saved > wait):
                began = time.monotonic()
                run.save(checkpoint, fingerprint)
                saved = time.monotonic()
                wait = max(SAVE_EVERY, 20 * (saved - began))
            if stop:
                distributed.raise_stopped()
    return run.finish()


def refuse_other_processes(directory: Path, begun_with: int | None) -> None:
    """UsageError unless so many processes run now: the global batch is dealt to all of them."""
    now = distributed.world()[1]
    if begun_with not in (None, now):
        why = f"was begun with {begun_with} processes, now there are {now}, and so another batch"
        advice = f"Run it with {begun_with}, or add --overwrite to begin again."
        raise UsageError(str(directory), why, advice)


def due(step: int, config: FinetuneConfig) -> bool:
    """True where a validation stands: every so many steps, and at the end."""
    return step % config.validate_every == 0 or step == config.steps


def copy_into(parameters: list[Any], values: list[Tensor]) -> None:
    """Overwrite the parameters' values in place."""
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
