"""Checkpoints: safetensors with JSON metadata; atomic, checked, and the one before is kept."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from . import signals
from .errors import UtilgenError
from .files import write_atomic


def save_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file atomically; what is not on the CPU or not contiguous is copied.

    UtilgenError: a float tensor is not finite, and would poison whatever is made with it.
    """
    refuse_non_finite(path.name, tensors)
    write_atomic(path, save(_plain(tensors), metadata))


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same on the CPU, contiguous, no two in one storage: safetensors takes no others."""
    plain: dict[str, Tensor] = {}
    storages = set()
    for name, tensor in tensors.items():
        there = tensor.detach().cpu().contiguous()
        storage = there.untyped_storage().data_ptr()
        plain[name] = there.clone() if storage in storages else there
        storages.add(storage)
    return plain


def refuse_non_finite(what: str, tensors: dict[str, Tensor]) -> None:
    """UtilgenError if a float tensor holds a NaN or an infinity."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            advice = "Lower the learning rate, or look at the input, then run again."
            raise UtilgenError(what, f"{name} is not finite", advice)


def save_checkpoint(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write `tensors` and `meta` as the newest checkpoint; the one before becomes PATH.previous.

    A non-finite float tensor is refused: a NaN must never be what a run resumes from.
    """
    with signals.saving():
        refuse_non_finite("checkpoint", tensors)
        body = save(_plain(tensors), {"meta": json.dumps(meta, sort_keys=True, allow_nan=False)})
        if path.exists():
            path.replace(previous(path))
        write_atomic(path, body, hashlib.sha256(body).digest())


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest whole checkpoint at `path`, or the one before if it is torn, or None."""
    for candidate in (path, previous(path)):
        if candidate.exists():
            found = _read(candidate)
            if found is not None:
                return found
    return None


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    with path.open("rb") as file:  # in two parts: a slice of all would be a second copy
        body, digest = file.read(max(0, path.stat().st_size - 32)), file.read()
    if hashlib.sha256(body).digest() != digest:
        return None
    try:
        header = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])
        return load(body), json.loads(header["__metadata__"]["meta"])
    except (SafetensorError, ValueError, KeyError):
        return None


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint and the one before it."""
    path.unlink(missing_ok=True)
    previous(path).unlink(missing_ok=True)


def previous(path: Path) -> Path:
    """Where the checkpoint before the newest lies."""
    return path.with_name(path.name + ".previous")


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, prefix: str = "optimizer."
) -> dict[str, Tensor]:
    """The optimiser's per-parameter state as named tensors (the rate belongs to the schedule)."""
    state = optimizer.state_dict()["state"]
    return {
        f"{prefix}{i}.{name}": torch.as_tensor(value)
        for i, entries in state.items()
        for name, value in entries.items()
        if value is not None
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], prefix: str = "optimizer."
) -> None:
    """Put back what `optimizer_tensors` took."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith(prefix):
            index, name = key.removeprefix(prefix).split(".", 1)
            state.setdefault(int(index), {})[name] = value
    whole = optimizer.state_dict()
    optimizer.load_state_dict({**whole, "state": state})


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries whose names start with `prefix`, without it."""
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
