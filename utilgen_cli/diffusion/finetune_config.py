"""What a fine-tuning run is made of: its settings, its random draws, optimiser and schedule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.errors import UsageError
from ..runtime.seeds import step_generator

OPTIMIZERS = ("adamw", "adamw8bit")


@dataclass(frozen=True, slots=True)
class FinetuneConfig:
    """How to train; `batch_size` is that of one process, `warmup` and `validate_every` in steps."""

    steps: int = 200
    batch_size: int = 16
    learning_rate: float = 1e-4
    schedule: str = "constant_with_warmup"
    warmup: int = 0
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    gradient_accumulation: int = 1
    ema: float | None = None
    optimizer: str = "adamw"
    validate_every: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            advice = f"Use one of {', '.join(OPTIMIZERS)}."
            raise UsageError(f"--optimizer {self.optimizer}", "unknown", advice)
        if not self.learning_rate > 0:
            raise UsageError(f"--lr {self.learning_rate}", "must be positive")


@dataclass(frozen=True, slots=True)
class Draw:
    """The randomness of some rows: noise [R, C, h, w], timesteps int64 [R], flip bool [R]."""

    noise: Tensor
    timesteps: Tensor
    flip: Tensor

    def part(self, index: Tensor) -> Draw:
        """The draws of some of the rows."""
        return Draw(self.noise[index], self.timesteps[index], self.flip[index])


def draw_rows(
    rows: int, latent_shape: tuple[int, ...], num_timesteps: int, generator: torch.Generator
) -> Draw:
    """Noise, uniform timesteps and coin flips for `rows` rows, on the CPU."""
    noise = torch.randn(rows, *latent_shape, generator=generator)
    timesteps = torch.randint(num_timesteps, (rows,), generator=generator)
    flip = torch.randint(2, (rows,), generator=generator).bool()
    return Draw(noise, timesteps, flip)


@lru_cache(maxsize=2)
def shuffled(seed: int, rows: int, epoch: int) -> Tensor:
    """The order of the rows in one epoch, int64 [rows]."""
    return torch.randperm(rows, generator=step_generator(seed, epoch, "epoch"))


def make_optimizer(parameters: list[nn.Parameter], config: FinetuneConfig) -> torch.optim.Optimizer:
    """AdamW, or bitsandbytes' 8-bit one."""
    kind: Any = torch.optim.AdamW if config.optimizer == "adamw" else eight_bit_adamw()
    made: torch.optim.Optimizer = kind(
        parameters, lr=config.learning_rate, weight_decay=config.weight_decay
    )
    return made


def eight_bit_adamw() -> Any:
    """bitsandbytes' AdamW, where it is installed."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        why = "bitsandbytes is not installed"
        raise UsageError("--optimizer adamw8bit", why, "pip install bitsandbytes.") from None
    return AdamW8bit


def schedule_factor(
    optimizer: torch.optim.Optimizer, config: FinetuneConfig
) -> Callable[[int], float]:
    """step -> factor of the learning rate, by the name that diffusers gives the schedule."""
    from diffusers.optimization import SchedulerType, get_scheduler

    names = [s.value for s in SchedulerType if s.value != "piecewise_constant"]
    if config.schedule not in names:
        raise UsageError(
            f"--schedule {config.schedule}", "unknown", f"Use one of {', '.join(names)}."
        )
    try:
        scheduler = get_scheduler(
            config.schedule, optimizer,
            num_warmup_steps=config.warmup, num_training_steps=config.steps,
        )  # fmt: skip
    except ValueError as error:  # `polynomial` ends at a rate of its own, and not above
        what, advice = f"--schedule {config.schedule}", "Raise --lr, or take another schedule."
        raise UsageError(what, str(error), advice) from None
    factor, last = scheduler.lr_lambdas[0], config.warmup - 1
    # diffusers' warm-up begins at 0, which would waste the first step; and one as long as the run
    # ends where what follows would divide by 0
    return lambda step: 1.0 if step == last else factor(step + (step < last))
