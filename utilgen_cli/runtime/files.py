"""Files that appear whole or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from .errors import UtilgenError


def write_atomic(path: Path, *data: bytes) -> None:
    """Write `data`, one after the other, so that `path` never holds a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with appearing_whole(path, path.with_name(f".{path.name}.tmp")) as f:
        f.writelines(data)


@contextmanager
def appearing_whole(path: Path, temporary: Path, what: str = "file") -> Iterator[BinaryIO]:
    """A file to write to: at the end it is synced and gets the name `path`, after an error it is
    gone. UtilgenError: another process writes it."""
    with open_locked(temporary, what) as file:
        try:
            file.truncate()
            yield file
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    sync_directory(path.parent)


def open_locked(path: Path, what: str) -> BinaryIO:
    """Open for reading and writing, made if it is not there, and held by this process alone until
    it is closed. UtilgenError: another process holds it."""
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            why = f"another process writes this {what}"
            raise UtilgenError(str(path), why, "Wait for it.") from None
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()  # between opening and locking, its writer gave it its final name


def sync_directory(directory: Path) -> None:
    """Make renames in `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sum(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def encode_json(value: Any, indent: int | None = None) -> bytes:
    """JSON with sorted keys, ASCII only, no NaN (ValueError), and a newline at the end."""
    return (json.dumps(value, sort_keys=True, allow_nan=False, indent=indent) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomic(path, encode_json(value, indent=2))
