"""Where, in which precision and by which kernels the work runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .errors import UsageError, first_line
from .ranks import world

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def pick_device(name: str | None = None) -> torch.device:
    """The named device; without a name CUDA, then Apple's MPS, then the CPU.

    Under torchrun every process of a machine takes its own GPU, unless one is numbered, or a
    launcher shows each process no other.
    """
    if name is None:
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else mps
    try:
        if name == "cuda" and world()[1] > 1 and not _shown_one():
            name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        device = torch.device(name)
        numbered = torch.empty(0, device=device).device
        if device.type == "cuda":  # pinned memory and events would go to the first GPU
            torch.cuda.set_device(numbered)
    except (RuntimeError, AssertionError) as error:
        advice = "Name cpu, cuda, cuda:1 or mps."
        raise UsageError(f"--device {name}", first_line(error), advice) from None
    return device


def _shown_one() -> bool:
    """True where a launcher has picked a GPU for this process, as SLURM's --gpus-per-task does."""
    return torch.cuda.device_count() == 1 and "CUDA_VISIBLE_DEVICES" in os.environ


def pick_precision(name: str | None, device: torch.device) -> str:
    """The named precision (fp32, fp16, bf16); without a name bf16 on CUDA, else fp32."""
    name = name or ("bf16" if device.type == "cuda" else "fp32")
    if name not in DTYPES:
        raise UsageError(f"--precision {name}", "unknown", f"Use one of {', '.join(DTYPES)}.")
    return name


def pick_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The type of `pick_precision`."""
    return DTYPES[pick_precision(name, device)]


def sent(x: Tensor, device: torch.device) -> Tensor:
    """x of the CPU on `device`. A plain copy waits until a GPU has done all that it was given; this
    one does not."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def cores() -> int:
    """How many cores this process may run on."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def free_memory(device: torch.device) -> int:
    """Bytes of a GPU that nobody holds, and those that torch keeps there for later use."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free: int = torch.cuda.mem_get_info(device)[0]
    return free + kept


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention by kernels that can be differentiated forwards and twice: the fused ones cannot."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Mixed precision where `dtype` is below float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
