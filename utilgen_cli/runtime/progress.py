"""Progress of long work on stderr: a Rich bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from .errors import printable

LINE_EVERY = 30.0  # seconds


class Task(Protocol):
    """One piece of work under way."""

    def advance(self, n: int = 1, **figures: float | str) -> None:
        """Count n more units done; the figures are shown beside the count."""


Progress = Callable[[str, int | None], AbstractContextManager[Task]]


class _Silent:
    def advance(self, n: int = 1, **figures: float | str) -> None:
        return


@contextmanager
def silent(description: str, total: int | None = None) -> Iterator[Task]:
    """Report nothing."""
    yield _Silent()


def reporter(quiet: bool) -> Progress:
    """The progress of a command: silent when quiet, a bar on a terminal, else plain lines."""
    if quiet:
        return silent
    return _bar if sys.stderr.isatty() else _lines


def show(figures: dict[str, float | str]) -> str:
    """`loss=0.123 accuracy=0.9`."""
    return " ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={printable(str(value), 80)}"
        for name, value in figures.items()
    )


class _Lines:
    def __init__(self, description: str, total: int | None) -> None:
        self.description, self.total = description, total
        self.done, self.start, self.said = 0, time.monotonic(), time.monotonic()
        self.figures: dict[str, float | str] = {}

    def say(self) -> None:
        of = f"/{self.total}" if self.total else ""
        seconds = time.monotonic() - self.start
        line = f"{self.description}: {self.done}{of} in {seconds:.0f} s {show(self.figures)}"
        print(line.rstrip(), file=sys.stderr, flush=True)
        self.said = time.monotonic()

    def advance(self, n: int = 1, **figures: float | str) -> None:
        self.done += n
        self.figures.update(figures)
        if time.monotonic() - self.said > LINE_EVERY:
            self.say()


@contextmanager
def _lines(description: str, total: int | None = None) -> Iterator[Task]:
    task = _Lines(description, total)
    task.say()
    yield task
    task.say()


class _Bar:
    def __init__(self, bar: object, task_id: object) -> None:
        self.bar, self.task_id = bar, task_id

    def advance(self, n: int = 1, **figures: float | str) -> None:
        self.bar.update(self.task_id, advance=n, **({"figures": show(figures)} if figures else {}))  # type: ignore[attr-defined]


@contextmanager
def _bar(description: str, total: int | None = None) -> Iterator[Task]:
    from rich import progress as rich_progress
    from rich.console import Console
    from rich.markup import escape

    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeRemainingColumn(),
        rich_progress.TextColumn("{task.fields[figures]}", markup=False),
    )
    with rich_progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield _Bar(bar, bar.add_task(escape(description), total=total, figures=""))
