"""One process or several under torchrun; gloo on the CPU, NCCL on CUDA."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .ranks import world as world


def init() -> tuple[int, int]:
    """Join the process group if there is more than one process; (rank, world size) comes back."""
    rank, size = world()
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return rank, size


def all_reduce_mean(tensors: list[Tensor]) -> None:
    """Average each tensor over the processes, in place (nothing to do in one process)."""
    if not dist.is_initialized():
        return
    for tensor in tensors:
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
