"""Results of a long campaign, one JSON line each: a stopped run goes on where it was."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Run = dict[str, Any]


class Store:
    """The finished runs of one part, by name; `limit` seconds of work at most, then Enough."""

    def __init__(self, directory: Path, part: str, limit: float = float("inf")) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / f"{part}.jsonl"
        self.end = time.monotonic() + limit
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.runs: dict[str, Run] = {row.pop("run"): row for row in map(json.loads, lines)}

    def get(self, name: str, compute: Callable[[], Run]) -> Run:
        """The run `name`: the stored one, or computed now and stored. Enough: out of time."""
        if name not in self.runs:
            if time.monotonic() > self.end:
                raise Enough(f"{self.path}: {len(self.runs)} runs done; the same command goes on")
            self.runs[name] = compute()
            with self.path.open("a") as f:
                f.write(json.dumps({"run": name, **self.runs[name]}) + "\n")
        return self.runs[name]


class Enough(Exception):
    """The time limit of this call is over."""


class Stopwatch:
    """CPU seconds of this process while entered; one thread, so other programs do not count."""

    def __enter__(self) -> Stopwatch:
        self.start = time.process_time()
        self.seconds = 0.0
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.process_time() - self.start


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean and standard deviation over seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.{digits}f} ± {deviation:.{digits}f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)
