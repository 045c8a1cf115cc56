"""Run `utilgen` in a fork with its own standard files, and write tables."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import runs


@dataclass
class Done:
    """How a command ended; `said` is its stderr."""

    code: int
    said: str
    out: bytes
    seconds: float
    rss: int  # largest resident size in bytes
    cpu: float  # seconds of the processor

    @property
    def line(self) -> str:
        """The one line of the error ("" without one)."""
        lines = [x for x in self.said.splitlines() if x.startswith("utilgen: ")]
        return lines[-1] if lines else ""

    @property
    def clean(self) -> bool:
        """No traceback, and at least one line that says what failed if something did."""
        return "Traceback" not in self.said and (self.code == 0 or bool(self.line))


def utilgen(
    words: Sequence[object],
    stdin: Path | None = None,
    stdout: Path | None = None,
    before: Callable[[], None] | None = None,
    timeout: float = 300,
) -> Done:
    """`utilgen WORDS` with stdin and stdout from and to files; `before` runs in the new process."""
    runs.warm()
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="utilgen-shell-") as scratch:
        out, said = stdout or Path(scratch) / "out", Path(scratch) / "said"
        pid = begin(words, out, said, stdin, before)
        code, rss, cpu = _wait(pid, start + timeout)
        data = out.read_bytes() if stdout is None else b""
        text = said.read_text(errors="replace")
        return Done(code, text, data, time.monotonic() - start, rss, cpu)


def begin(
    words: Sequence[object],
    out: Path,
    said: Path,
    stdin: Path | None = None,
    before: Callable[[], None] | None = None,
) -> int:
    """Start `utilgen WORDS` in a fork; its process id."""
    runs.warm()
    said.touch()
    pid = os.fork()
    if pid == 0:
        _child([str(w) for w in words], stdin, out, said, before)
    return pid


def _child(
    words: list[str],
    stdin: Path | None,
    out: Path,
    said: Path,
    before: Callable[[], None] | None,
) -> None:
    code = 70
    for inherited in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        inherited.detach()  # at its end the command would remove the parent's directories
    try:
        files = (
            (os.open(stdin or os.devnull, os.O_RDONLY), 0),
            (os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), 1),
            (os.open(said, os.O_WRONLY), 2),
        )
        for source, target in files:
            os.dup2(source, target)
        sys.stdin = os.fdopen(0, "r", closefd=False)
        sys.argv = ["utilgen", *words]
        if before is not None:
            before()
        runs._warm[0]()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(bool(end.code))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        code = _flushed(code)
        os._exit(code)


def _flushed(code: int) -> int:
    """What the interpreter does at its end: flush, and complain where that fails."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError as error:
            os.write(2, f"Traceback: flush at exit: {error}\n".encode())
            code = code or 120
    return code


def _wait(pid: int, deadline: float) -> tuple[int, int, float]:
    while True:
        found, status, usage = os.wait4(pid, os.WNOHANG)
        if found:
            cpu = usage.ru_utime + usage.ru_stime
            return os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024, cpu
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise TimeoutError("still there")
        time.sleep(0.01)


class Kept:
    """Rows of a campaign by name, in a file of its work directory: it can be run in slices."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, list[object]] = json.loads(path.read_text()) if path.exists() else {}

    def add(self, name: str, row: Sequence[object]) -> None:
        """Add or replace a row."""
        self.rows[name] = list(row)
        self.path.write_text(json.dumps(self.rows))


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])
