"""stdout carries only the result: everything else that prints there is sent to stderr."""

from __future__ import annotations

import os
import sys
from typing import BinaryIO

from .errors import UtilgenError

_result: BinaryIO | None = None


def claim_stdout() -> BinaryIO:
    """The real stdout, unbuffered by Python; from now on file descriptor 1 is stderr's.

    Libraries (and C code) that print to descriptor 1 then cannot damage a stream.
    """
    global _result
    if _result is None:
        if sys.stdout is None:
            raise UtilgenError("stdout", "is closed", "Let it go to a file, a pipe or /dev/null.")
        sys.stdout.flush()
        _result = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)
    return _result


def say(line: str) -> None:
    """Write one line of result to the real stdout."""
    out = claim_stdout()
    out.write(os.fsencode(line) + b"\n")
    out.flush()


def stdout_is_terminal() -> bool:
    """True if the real stdout is a terminal."""
    return claim_stdout().isatty()
