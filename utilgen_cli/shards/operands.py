"""Operands: files, directories, brace patterns, `-`, or what is piped in."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from braceexpand import braceexpand

from ..runtime.contents import is_output
from ..runtime.errors import BadInput, NoInput, UsageError
from .quarantine import Quarantine
from .sample import Sample
from .sums import Sums, lost_shards

STDIN = Path("-")


@dataclass(frozen=True)
class Source:
    """Shards in order. `samples()` reads them all; standard input can be read once only."""

    paths: tuple[Path, ...]
    quarantine: Quarantine = field(default_factory=Quarantine)

    @property
    def is_stdin(self) -> bool:
        """True if the samples come through a pipe."""
        return self.paths == (STDIN,)

    def shards(self) -> list[Path]:
        """The shard files (none for standard input)."""
        return [] if self.is_stdin else list(self.paths)

    def samples(self) -> Iterator[Sample]:
        """All samples, shard after shard."""
        for path in self.paths:
            yield from self.read(path)

    def read(self, path: Path) -> Iterator[Sample]:
        """The samples of one of the shards."""
        return read_path(path, self.quarantine)

    def part(self, spec: str | None) -> Source:
        """Every N-th shard from the I-th on, for spec `I/N` (I from 0), `rank` or `slurm`."""
        if spec is None:
            return self
        if self.is_stdin:
            raise UsageError("--part", "needs shards, and a pipe has none", "Name the shards.")
        index, count = parse_part(spec)
        return replace(self, paths=self.paths[index::count])


def read_path(path: Path, quarantine: Quarantine | None = None) -> Iterator[Sample]:
    """The samples of one shard file, checked by its statistics; or of standard input for `-`."""
    from .reader import read_checked, read_tar  # not for a word about a missing file

    quarantine = quarantine or Quarantine()
    if path == STDIN:
        yield from quarantine.screen(read_tar(_stdin(), "standard input"))
        return
    try:
        file = path.open("rb")
    except OSError as error:
        raise NoInput(str(path), error.strerror or "cannot be read", "Check its rights.") from None
    with file:
        sums, name = Sums.of(path), str(path)
        samples = read_tar(file, name)
        if sums is not None:
            samples = read_checked(file, name, sums, quarantine.reject)
        yield from quarantine.screen(samples)


def _stdin() -> BinaryIO:
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("standard input", "is a terminal", "Name shards, or pipe them in.")
    return sys.stdin.buffer


def open_source(
    operands: Sequence[str] | None, quarantine: Quarantine | None = None, whole: bool = True
) -> Source:
    """The source that the operands name; without operands a piped standard input.

    NoInput: a named file or directory is missing or empty. UsageError: nothing named, no pipe.
    BadInput, if directories are to be `whole`: a shard that was finished in one is gone.
    """
    quarantine = quarantine or Quarantine()
    if not operands:
        if sys.stdin is None or sys.stdin.isatty():
            raise UsageError("SHARDS", "none named and nothing piped in", "Name shards, or pipe.")
        return Source((STDIN,), quarantine)
    if "-" in operands and len(operands) > 1:
        raise UsageError("SHARDS", "`-` stands for standard input alone", "Name it by itself.")
    paths: list[Path] = []
    for operand in operands:
        for name in expand_braces(operand):
            try:
                paths += _expand(name, whole)
            except PermissionError as error:
                where = str(error.filename or name)
                why = error.strerror or "cannot be read"
                raise NoInput(where, why, "Check its rights.") from None
    return Source(tuple(paths), quarantine)


def refuse_shared(first: tuple[str, Source], second: tuple[str, Source], advice: str) -> None:
    """UsageError where two (option, source) that must differ name a shard both."""
    (option, a), (other, b) = first, second
    known = {path.resolve() for path in b.shards()}
    if both := next((path for path in a.shards() if path.resolve() in known), None):
        raise UsageError(f"{option} {both}", f"is named by {other} too", advice)


def _expand(name: str, whole: bool) -> list[Path]:
    path = Path(name)
    if name == "-":
        return [STDIN]
    if path.is_dir():
        if whole and (lost := lost_shards(path)):
            why = "was finished, and is gone"
            advice = "Run the command that made it again, or name the shards that are left."
            raise BadInput(str(lost[0]), why, advice)
        shards = sorted(p for p in path.iterdir() if p.suffix == ".tar")
        if not shards:
            advice = "Make some with `utilgen pack`."
            if is_output(path):
                advice = "Name another, or run what made it again to see why it left none."
            raise NoInput(name, "there is no .tar shard in it", advice)
        return shards
    if not path.exists():
        raise NoInput(name, "no such file or directory", "Name shards or a directory of shards.")
    return [path]


def expand_braces(pattern: str) -> list[str]:
    """`a{000..002}.tar` and `{a,b}.tar` as shells and webdataset expand them."""
    return [pattern] if Path(pattern).exists() else _expanded(pattern)


def _expanded(pattern: str) -> list[str]:
    try:
        return list(braceexpand(pattern, escape=False))
    except ValueError:  # a brace that is alone belongs to the name: what is whole is expanded
        head, *rest = re.split(r"(\{[^{}]*\})", pattern, maxsplit=1)
        if not rest:
            return [pattern]
        group, tail = rest
        return [head + part + end for part in _expanded(group) for end in _expanded(tail)]


def parse_part(spec: str) -> tuple[int, int]:
    """(index, count) of `I/N`, of torchrun's rank (`rank`), or of a SLURM array task (`slurm`)."""
    try:
        if spec == "rank":
            index, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        elif spec == "slurm":
            index, count = _slurm_part()
        else:
            index, count = (int(n) for n in spec.split("/"))
    except KeyError as error:
        raise UsageError(
            f"--part {spec}", f"{error.args[0]} is not set", "Use --part I/N."
        ) from None
    except ValueError:
        raise UsageError(
            f"--part {spec}", "not understood", "Use I/N with I from 0 to N-1."
        ) from None
    if not 0 <= index < count:
        raise UsageError(f"--part {spec}", "I must lie between 0 and N-1", "Parts count from 0.")
    return index, count


def _slurm_part() -> tuple[int, int]:
    """UsageError for an array that is no range: its tasks cannot know which parts they are."""
    first = int(os.environ.get("SLURM_ARRAY_TASK_MIN", "0"))
    step = int(os.environ.get("SLURM_ARRAY_TASK_STEP", "1"))
    count = int(os.environ["SLURM_ARRAY_TASK_COUNT"])
    last = int(os.environ.get("SLURM_ARRAY_TASK_MAX", str(first + (count - 1) * step)))
    index, odd = divmod(int(os.environ["SLURM_ARRAY_TASK_ID"]) - first, step)
    if odd or last != first + (count - 1) * step:
        why = f"the {count} tasks from {first} to {last} are not a range"
        raise UsageError("--part slurm", why, "Give --array=0-N, or the tasks --part I/N.")
    return index, count
