"""Names of the fault campaigns, and the one file that their figures go to."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).with_name("RESULTS.md")
DRY = "UTILGEN_FAULTS_DRY"
HEAD = "# Faults: what was done to the runs, and what came of it\n"
NOTE = "Each section is written by `python -m tests.faults NAME`; see that module for what it does."


@dataclass(frozen=True)
class Options:
    """What the command line of `python -m tests.faults` hands to a campaign."""

    work: Path  # scratch that outlives the call: a campaign that was stopped goes on from there
    runs: int
    seed: int
    only: list[str]  # parts of the campaign by name; empty means all


Campaign = Callable[[Options], str]
CAMPAIGNS: dict[str, tuple[Campaign, int]] = {}


def campaign(name: str, runs: int) -> Callable[[Campaign], Campaign]:
    """Register a function that returns its section of RESULTS.md; `runs` is the default count."""

    def register(function: Campaign) -> Campaign:
        CAMPAIGNS[name] = (function, runs)
        return function

    return register


@contextmanager
def _only_writer(directory: Path) -> Iterator[None]:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def record(name: str, section: str, path: Path = RESULTS) -> None:
    """Replace the section NAME in RESULTS.md, unless in a dry run; the others stay. Safe with
    several writers."""
    if DRY in os.environ:
        return
    with _only_writer(path.parent):
        text = path.read_text() if path.exists() else f"{HEAD}\n{NOTE}\n"
        head, *found = re.split(r"^## ", text, flags=re.MULTILINE)
        sections = {s.partition("\n")[0].strip(): s.partition("\n")[2].strip() for s in found}
        sections[name] = section.strip()
        body = "".join(f"\n## {key}\n\n{value}\n" for key, value in sorted(sections.items()))
        path.write_text(head.rstrip() + "\n" + body)
