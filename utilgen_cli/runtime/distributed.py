"""One process or several under torchrun; gloo on the CPU, NCCL on CUDA."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from . import signals
from .errors import Stopped
from .ranks import world as world


def init() -> tuple[int, int]:
    """Join the process group if there is more than one process; (rank, world size) comes back."""
    rank, size = world()
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return rank, size


def all_reduce_mean(tensors: list[Tensor]) -> None:
    """Average tensors of one type and device over the processes, in place (nothing to do in one
    process); many small ones go at once."""
    if not dist.is_initialized():
        return
    for together in buckets(tensors):
        flat = torch.cat([tensor.flatten() for tensor in together])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for tensor, mean in zip(together, flat.split([t.numel() for t in together]), strict=True):
            tensor.copy_(mean.view_as(tensor))


def buckets(tensors: list[Tensor], most: int = 1 << 23) -> list[list[Tensor]]:
    """The tensors in order, as many together as have `most` elements, or one that has more."""
    found: list[list[Tensor]] = []
    held = 0
    for tensor in tensors:
        if not found or held + tensor.numel() > most:
            found.append([])
            held = 0
        found[-1].append(tensor)
        held += tensor.numel()
    return found


def as_the_first(figures: dict[str, float], device: torch.device) -> dict[str, float]:
    """The figures of the first process, in all: GPUs of two kinds round differently, and a decision
    must be one."""
    if world()[1] == 1:
        return figures
    values = torch.tensor(list(figures.values()), dtype=torch.float64, device=device)
    dist.broadcast(values, 0)
    return dict(zip(figures, values.tolist(), strict=True))


def stop_anywhere(device: torch.device) -> bool:
    """True if a stop signal reached any of the processes."""
    if world()[1] == 1:
        return signals.stop_requested()
    flag = torch.tensor([float(signals.stop_requested())], device=device)
    all_reduce_mean([flag])
    return bool(flag.item() > 0)


def raise_stopped() -> None:
    """Leave with exit code 75: the state is saved."""
    signals.check()
    raise Stopped("another process", "was stopped", "Run the same command again to go on.")
