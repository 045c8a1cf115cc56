"""The state of a classifier's training, kept at a stop signal and now and then, and taken up."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime import signals
from ..runtime.checkpoint import (
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
    under,
)
from ..runtime.distributed import raise_stopped, stop_anywhere, world

SAVE_EVERY = 60.0  # seconds


@dataclass
class Training:
    """What a step changes, but for the order of the batches: that depends on the step alone."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    losses: list[Tensor] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)  # of the looks at validation
    best_state: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0  # of the processes before this one

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def save(self, path: Path, seconds: float) -> None:
        """Write everything, torch's own generators included: dropout draws from them."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"best.{k}": v for k, v in self.best_state.items()}
        tensors |= optimizer_tensors(self.optimizer)
        tensors["noise"] = torch.get_rng_state()
        if self.on_gpu:
            tensors["noise.cuda"] = torch.cuda.get_rng_state(self.device)
        tensors["losses"] = torch.stack(self.losses) if self.losses else torch.empty(0)
        meta = {"step": self.step, "best": self.best, "seconds": seconds,
                "scaler": self.scaler.state_dict()}  # fmt: skip
        save_checkpoint(path, tensors, meta)

    def load(self, path: Path) -> None:
        """Go on where `path` was saved, if it was."""
        found = load_checkpoint(path)
        if found is None:
            return
        tensors, meta = found
        self.model.load_state_dict(under(tensors, "model."))
        restore_optimizer(self.optimizer, tensors)
        if meta["scaler"]:
            self.scaler.load_state_dict(meta["scaler"])
        self.losses = list(tensors["losses"].to(self.device))
        self.best, self.best_state = meta["best"], under(tensors, "best.")
        self.step, self.seconds = meta["step"], meta["seconds"]
        torch.set_rng_state(tensors["noise"])
        if self.on_gpu and "noise.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["noise.cuda"], self.device)


class Keeper:
    """Saves a training every minute and where a signal asks for it, which then stops it.

    Of the processes that train one model `together` the first one saves, and all stop at one step.
    """

    def __init__(self, path: Path | None, device: torch.device, together: bool = False) -> None:
        self.path, self.start = path, time.monotonic()
        self.device, self.together, self.last = device, together, self.start

    def seconds(self, training: Training) -> float:
        """Spent on the training so far."""
        return training.seconds + time.monotonic() - self.start

    def look(self, training: Training) -> None:
        """Save where it is due. Stopped: a signal came, and the state is saved."""
        if self.path is None:
            return
        stop = stop_anywhere(self.device) if self.together else signals.stop_requested()
        if stop or time.monotonic() - self.last > SAVE_EVERY:
            if not self.together or world()[0] == 0:
                training.save(self.path, self.seconds(training))
            self.last = time.monotonic()
        if stop:
            raise_stopped()
