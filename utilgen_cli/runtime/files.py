"""Files that appear whole or not at all."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from .errors import UtilgenError


def write_atomic(path: Path, data: bytes) -> None:
    """Write to a temporary neighbour, fsync, rename: `path` never holds a part of `data`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def open_locked(path: Path, what: str) -> BinaryIO:
    """Open for reading and writing, made if it is not there, and held by this process alone until
    it is closed. UtilgenError: another process holds it."""
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise UtilgenError(
            str(path), f"another process writes this {what}", "Wait for it."
        ) from None
    return file


def sync_directory(directory: Path) -> None:
    """Make renames in `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def encode_json(value: Any, indent: int | None = None) -> bytes:
    """JSON with sorted keys, ASCII only, no NaN (ValueError), and a newline at the end."""
    return (json.dumps(value, sort_keys=True, allow_nan=False, indent=indent) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomic(path, encode_json(value, indent=2))
