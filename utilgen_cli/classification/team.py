"""Processes under torchrun that share the runs of one evaluation: each is one process's alone.

A run is the same wherever it is trained, so that the table is that of one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from ..runtime.distributed import init
from ..runtime.errors import UsageError
from ..runtime.ranks import world

T = TypeVar("T")
PATIENCE = timedelta(days=30)  # a run may take long, and others wait for it


@dataclass
class Team:
    """This process's place among `size`."""

    rank: int = 0
    size: int = 1
    group: Any = None

    @classmethod
    def join(cls, directory: Path | None) -> Team:
        """UsageError: several processes without a directory in which they meet."""
        rank, size = world()
        if size == 1:
            return cls()
        if directory is None:
            raise UsageError(f"{size} processes", "they meet in a directory", "Name one with -o.")
        init()
        return cls(rank, size, dist.new_group(backend="gloo", timeout=PATIENCE))

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Every size-th item."""
        return items[self.rank :: self.size]

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            dist.barrier(self.group)

    def part(self) -> None:
        """When all are here each goes on alone: no library is to gather from the others."""
        self.wait()
        if self.size > 1:
            dist.destroy_process_group()
