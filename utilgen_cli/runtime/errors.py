"""The one error that people see, and the exit codes it carries."""

from __future__ import annotations

from enum import IntEnum

LONGEST = 2000  # characters of a line for people


class ExitCode(IntEnum):
    """Exit codes of every command (sysexits.h where it has one)."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    BAD_INPUT = 65
    NO_INPUT = 66
    STOPPED = 75
    INTERRUPTED = 130
    READER_LEFT = 141


class UtilgenError(Exception):
    """WHAT failed, WHY, and WHAT TO DO about it: one line for people, and an exit code."""

    exit_code = ExitCode.FAILED

    def __init__(
        self, what: str, why: str, what_to_do: str = "", exit_code: ExitCode | None = None
    ) -> None:
        super().__init__(what, why, what_to_do)
        self.what, self.why, self.what_to_do = what, why, what_to_do
        if exit_code is not None:
            self.exit_code = exit_code

    def __str__(self) -> str:
        line = f"{printable(self.what)}: {printable(self.why).rstrip('.')}."
        return f"{line} {printable(self.what_to_do)}".strip()


class UsageError(UtilgenError):
    """The command line makes no sense (2)."""

    exit_code = ExitCode.USAGE


class BadInput(UtilgenError):
    """The input stream is damaged or is not what the stage needs (65)."""

    exit_code = ExitCode.BAD_INPUT


class NoInput(UtilgenError):
    """A named input does not exist or cannot be reached (66)."""

    exit_code = ExitCode.NO_INPUT


class Stopped(UtilgenError):
    """A signal asked the run to stop, and its state is saved (75) or lost (1)."""

    exit_code = ExitCode.STOPPED


def is_text(text: str) -> bool:
    """False where bytes that are no UTF-8 were taken for a name: it could not be written again."""
    return text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text)


def printable(text: str, longest: int = LONGEST) -> str:
    """One terminal-safe line: control characters are escaped, so that no name can run anything.

    Beyond `longest` characters it is cut.
    """
    if len(text) > longest:
        text = f"{text[: longest - 3]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def no_memory(error: BaseException) -> bool:
    """True if memory ran out: Python's, torch's, or as cuBLAS and cuDNN say it."""
    said = str(error)
    return isinstance(error, MemoryError) or "out of memory" in said or "ALLOC_FAILED" in said


def first_line(error: BaseException, otherwise: str = "") -> str:
    """What a library said, as one line; `otherwise`, or the error's name, where that is nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else otherwise or type(error).__name__
