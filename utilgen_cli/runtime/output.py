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

from .artefact import CHECKPOINT, clear_checkpoints, is_done
from .contents import SETTINGS, STATS, contents
from .errors import UsageError, UtilgenError
from .files import write_json
from .ranks import world

MADE_IN = "made in"  # among the settings, not one of them: the directory that names are relative to
ANEW = ".begun-anew"  # from the emptying by --overwrite until the run has ended well


_held: set[int] = set()  # descriptors of locks


def _let_go() -> None:
    """A forked child (a loader's worker) may outlive its parent: the lock must not."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


class OutputDirectory:
    """Use as a context: makes PATH, locks it, and compares PATH/settings.json with `settings`.

    Raises UtilgenError when another process holds the directory, UsageError when it was made
    with other settings (the difference is shown; `overwrite` empties it instead, once: it goes on
    with a run of the same settings that began so and did not end). A `Path` in the settings is an
    input: what lies there now is a setting as well. A run that failed before it had made anything
    binds no later one to its settings, nor to its command.
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
        self.reads = {name: list(_paths(value)) for name, value in settings.items()}
        self.settings = {"command": command, **json.loads(json.dumps(settings, default=str))}
        for name, paths in self.reads.items():
            if found := contents(paths):
                self.settings[f"{name} contents"] = found
        self.settings[MADE_IN] = str(Path.cwd())
        self._locks: list[int] = []
        self.ends_run = True  # False: the run goes on elsewhere, and calls `end_run` at its end

    @property
    def checkpoint(self) -> Path:
        """Where the run's state is kept until it is done."""
        return self.path / CHECKPOINT

    def is_done(self, marker: str) -> bool:
        """True if the file that is written last is there, and the model is as it was made; of one
        that is not the marker goes, and nothing is gone on from. Done, it has no checkpoints."""
        if done := is_done(self.path / marker):
            clear_checkpoints(self.path)
        elif (self.path / marker).exists():
            clear_checkpoints(self.path)
            (self.path / marker).unlink()
        return done

    def __enter__(self) -> OutputDirectory:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise UsageError(str(self.path), "is a file", "Name a directory with -o.") from None
        try:
            with self._own_turn():
                self._take_lock()
                self._refuse_foreign()
                if self.overwrite:
                    self._begin_anew()
                if self.part is None:
                    self._clear_leftovers()
                self._compare()
        except BaseException:
            self._release()
            raise
        return self

    @contextmanager
    def _own_turn(self) -> Iterator[None]:
        """Processes that start in the same moment take turns here."""
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
        try:
            if kind is None and self.ends_run:
                end_run(self.path)
        finally:
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
        _held.add(descriptor)
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)  # the lock of a dead process is free
        except OSError:
            self._release()
            raise UtilgenError(
                str(self.path), "another process writes there", "Wait for it, or name another -o."
            ) from None

    def _release(self) -> None:
        for descriptor in self._locks:
            _held.discard(descriptor)
            os.close(descriptor)
        self._locks = []

    def _begin_anew(self) -> None:
        """Empty the directory, unless this same run did so before it was stopped. (Of a pipe nobody
        knows whether it is the same.)"""
        mark, processes = self.path / ANEW, str(world()[1])
        piped = any(path == Path("-") for paths in self.reads.values() for path in paths)
        begun = not piped and mark.exists() and mark.read_text() == processes
        if begun and {**self._before(), MADE_IN: ""} == {**self.settings, MADE_IN: ""}:
            return
        self._empty()
        write_json(self.path / SETTINGS, self.settings)
        mark.write_text(processes)

    def _empty(self) -> None:
        own = self.path.resolve()
        for path in (p for paths in self.reads.values() for p in paths):
            if path.exists() and own in (path.resolve(), *path.resolve().parents):
                raise UsageError(str(path), f"is in {self.path}, which --overwrite empties",
                                 "Name another -o.")  # fmt: skip
        write_json(self.path / SETTINGS, {"command": self.command})  # half empty it is no run's
        for entry in sorted(self.path.iterdir(), key=_outlives):
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
        """Never mix with, or empty, a directory that this command did not make."""
        if (self.path / SETTINGS).exists():
            made_by = self._before().get("command")
            if made_by == self.command or (made_by and not self._made_anything()):
                return
            why = (
                f"was made by utilgen {made_by}" if made_by else f"its {SETTINGS} is not utilgen's"
            )
            raise UsageError(str(self.path), why, "Name an empty or new directory with -o.")
        own = (".lock", f".{SETTINGS}.tmp")
        others = sorted(e.name for e in self.path.iterdir() if not e.name.startswith(own))
        if others:
            raise UsageError(
                str(self.path),
                f"holds {others[0]!r}, which utilgen {self.command} did not write",
                "Name an empty or new directory with -o.",
            )

    def _made_anything(self) -> bool:
        """False if only locks, settings and shards that were begun in vain lie there."""
        files = (f for f in self.path.rglob("*") if f.is_file())
        return any(
            f.stat().st_size > 0
            and f.name not in (SETTINGS, ANEW)
            and not f.name.endswith(".journal")
            for f in files
        )

    def _before(self) -> dict[str, Any]:
        """What the directory was made with."""
        try:
            found = json.loads((self.path / SETTINGS).read_text())
        except ValueError:
            found = None
        return found if isinstance(found, dict) else {}

    def _compare(self) -> None:
        path = self.path / SETTINGS
        if not path.exists():
            write_json(path, self.settings)
            return
        before = self._before()
        changes = list(_changes({**before, MADE_IN: ""}, {**self.settings, MADE_IN: ""}))
        if changes and self._is_alone() and not self._made_anything():
            self._empty()
            write_json(path, self.settings)
        elif changes:
            redo = "add --overwrite to redo it"
            if self.part is not None:
                redo = "remove the directory once no part writes there"
            why = f"was made with other settings ({', '.join(changes)})"
            raise UsageError(str(self.path), why, f"Name another -o, or {redo}.")

    def _is_alone(self) -> bool:
        """True if no other part is at work, and none will be before this one's turn is over."""
        if self.part is None:
            return True
        try:
            fcntl.flock(self._locks[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        finally:  # also where it was refused: Linux lets go of the shared lock first
            fcntl.flock(self._locks[0], fcntl.LOCK_SH)
        return True


def _outlives(entry: Path) -> tuple[bool, ...]:
    """What a kill in the middle may leave: nothing is called done, no lost shard goes unseen, and
    the settings still say whose the directory is."""
    return entry.name == SETTINGS, entry.name.endswith(STATS), entry.suffix != ".json"


def end_run(directory: Path) -> None:
    """The run has ended well: from now on --overwrite begins anew."""
    (directory / ANEW).unlink(missing_ok=True)


def _changes(before: dict[str, Any], now: dict[str, Any], above: str = "") -> Iterator[str]:
    """What differs between two settings, by name."""
    for name in sorted({*before, *now}):
        a, b = before.get(name), now.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _changes(a, b, f"{above}{name}.")
        elif a != b:
            yield f"{above}{name} was {a!r}, now {b!r}"


def _paths(value: Any) -> Iterator[Path]:
    """Every `Path` in nested settings."""
    if isinstance(value, Path):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _paths(item)
