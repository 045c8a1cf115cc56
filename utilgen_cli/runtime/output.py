"""A directory that one run owns: locked, with its settings, refusing a rerun with others."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from .errors import UsageError, UtilgenError
from .files import write_json

SETTINGS = "settings.json"


class OutputDirectory:
    """Use as a context: makes PATH, locks it, and compares PATH/settings.json with `settings`.

    Raises UtilgenError when another process holds the directory, UsageError when it was made
    with other settings (the difference is shown; `overwrite` empties it instead).
    """

    def __init__(
        self,
        path: str | Path,
        command: str,
        settings: dict[str, Any],
        overwrite: bool = False,
        part: str | None = None,
    ) -> None:
        """`part` (`I/N`) lets processes with other parts write beside this one."""
        if overwrite and part is not None:
            raise UsageError(
                "--overwrite",
                "would remove what the other parts wrote",
                "Remove the directory yourself, or leave --part out.",
            )
        self.path = Path(path)
        self.command, self.overwrite, self.part = command, overwrite, part
        self.settings = {"command": command, **json.loads(json.dumps(settings, default=str))}
        self._locks: list[int] = []

    @property
    def checkpoint(self) -> Path:
        """Where the run's state is kept until it is done."""
        return self.path / "checkpoint.safetensors"

    def is_done(self, marker: str) -> bool:
        """True if the file that is written last is there."""
        return (self.path / marker).exists()

    def __enter__(self) -> OutputDirectory:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
        except FileExistsError:
            raise UsageError(str(self.path), "is a file", "Name a directory with -o.") from None
        try:
            with self._alone():
                self._refuse_foreign()
                if self.overwrite:
                    self._empty()
                if self.part is None:
                    self._clear_leftovers()
                self._compare()
        except BaseException:
            self._release()
            raise
        return self

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Parts that start in the same moment take turns here."""
        descriptor = os.open(self.path / ".lock-settings", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._release()

    def _take_lock(self) -> None:
        """All of the directory, or with a part: a share of it and all of the part."""
        if self.part is None:
            self._lock(".lock", fcntl.LOCK_EX)
        else:
            self._lock(".lock", fcntl.LOCK_SH)
            self._lock(f".lock-{self.part.replace('/', '-of-')}", fcntl.LOCK_EX)

    def _lock(self, name: str, kind: int) -> None:
        descriptor = os.open(self.path / name, os.O_RDWR | os.O_CREAT, 0o644)
        self._locks.append(descriptor)
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)  # the lock of a dead process is free
        except OSError:
            self._release()
            raise UtilgenError(
                str(self.path), "another process writes there", "Wait for it, or name another -o."
            ) from None

    def _release(self) -> None:
        for descriptor in self._locks:
            os.close(descriptor)
        self._locks = []

    def _empty(self) -> None:
        for entry in self.path.iterdir():
            if not entry.name.startswith(".lock"):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def _clear_leftovers(self) -> None:
        """Remove the temporary files of a run that was killed; what it finished stays."""
        for directory, folders, names in os.walk(self.path):
            folders[:] = [f for f in folders if not Path(directory, f, ".lock").exists()]
            for name in names:
                if name.endswith(".tmp") and (name[0] == "." or name.endswith(".tar.tmp")):
                    Path(directory, name).unlink()

    def _refuse_foreign(self) -> None:
        """Never mix with, or empty, a directory that utilgen did not make."""
        if (self.path / SETTINGS).exists():
            return
        own = (".lock", f".{SETTINGS}.tmp")
        others = sorted(e.name for e in self.path.iterdir() if not e.name.startswith(own))
        if others:
            raise UsageError(
                str(self.path),
                f"holds {others[0]!r}, which utilgen {self.command} did not write",
                "Name an empty or new directory with -o.",
            )

    def _compare(self) -> None:
        path = self.path / SETTINGS
        if not path.exists():
            write_json(path, self.settings)
            return
        try:
            before = json.loads(path.read_text())
        except ValueError:
            before = {}
        names = sorted(
            name
            for name in {*before, *self.settings}
            if before.get(name) != self.settings.get(name)
        )
        if names:
            change = ", ".join(
                f"{n} was {before.get(n)!r}, now {self.settings.get(n)!r}" for n in names
            )
            raise UsageError(
                str(self.path),
                f"was made with other settings ({change})",
                "Name another -o, or add --overwrite to redo it.",
            )
