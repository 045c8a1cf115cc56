"""Who runs beside this process: what torchrun and `accelerate launch` set. No heavy import here."""

from __future__ import annotations

import os

from .errors import UsageError


def world() -> tuple[int, int]:
    """(rank, world size) as torchrun or accelerate set them, else (0, 1). SLURM_* is not read."""
    try:
        return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    except ValueError:
        return 0, 1  # somebody else's variables


def processes_here() -> int:
    """How many of the processes run on this machine."""
    try:
        return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", 1))) if world()[1] > 1 else 1
    except ValueError:
        return 1


def one_process(advice: str = "Run it without torchrun.") -> None:
    """UsageError if several processes were started for work that is not shared between them."""
    if world()[1] > 1:
        raise UsageError(f"{world()[1]} processes", "this is work for one", advice)
