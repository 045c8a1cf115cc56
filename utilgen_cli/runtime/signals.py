"""INT, TERM, USR1 and USR2 end a run cleanly: at once, or where work is being kept, when it is.

A signal raises where it meets the run (files appear whole or not at all, so any place will do),
except inside `deferred()`: there the work looks at `stop_requested()`, saves, and calls `check()`.
A second signal leaves at once, and so does the end of the grace time, whatever the run is doing:
what was saved last is whole.
"""

from __future__ import annotations

import atexit
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from .errors import ExitCode, Stopped
from .ranks import world

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
NUMBERS = (signal.SIGINT, *STOP_SIGNALS)
GRACE = 8.0  # seconds from the first signal to the end of the process
AGAIN = "Run it again: it begins anew."  # where nothing of a run is kept, and it needs no more
BURST = 0.3  # seconds in which several signals count as one: launchers pass on what a group got
_received: list[int] = []
_command: list[str] = []
_unkept: list[str | None] = []  # of the command: what to do where a stopped run keeps nothing
_deferrals: list[None] = []
_saving: list[None] = []
_raised: list[int] = []  # signals that met the run where they raise


class Interrupted(BaseException):
    """Raised where a stop signal met the run: no `except Exception` of a library holds it up."""


def install() -> None:
    """Take over the signals."""
    for number in NUMBERS:
        signal.signal(number, _on_signal)


def end(code: object) -> None:
    """All is done: a signal can stop nothing any more, and must not change the exit code.

    A run that succeeded or was stopped leaves here, without the seconds that taking down its
    libraries costs. Nothing may be open that is closed when it is forgotten.
    """
    for number in NUMBERS:
        signal.signal(number, signal.SIG_IGN)
    if isinstance(code, int) and (code == 0 or _received):
        atexit._run_exitfuncs()
        try:
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    stream.flush()
        except OSError:  # the interpreter's own end tells of it
            return
        os._exit(code)


def watch() -> None:
    """Keep the promise on time, also while the main thread is inside a long native call."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reading,), daemon=True).start()


def _watch(descriptor: int) -> None:
    first = None
    while True:
        wait = None if first is None else max(0.1, first + GRACE - time.monotonic())
        if select.select([descriptor], [], [], wait)[0]:
            received = os.read(descriptor, 1)[0]
            if received not in NUMBERS:  # torch listens for the end of its children
                continue
            number = received
            if first is None:
                first = time.monotonic()
            elif time.monotonic() - first > BURST:
                leave(number, "left at once")
        elif not _saving:
            leave(number, "left in the middle of a long step")


def leave(number: int, how: str) -> None:
    """End the process now, as a kill would. Of several under torchrun the first one tells."""
    name = ": ".join(["utilgen", *_command, signal.Signals(number).name])
    lost = _unkept[-1] if _unkept else None
    whole = "" if lost else "What was saved last is whole. "
    more = f" {whole}{advice(lost)}" if _command else ""
    if world()[0] == 0:
        os.write(2, f"{name}: {how}.{more}\n".encode())
    os._exit(ExitCode.INTERRUPTED if number == signal.SIGINT else code_of(lost))


def advice(lost: str | None) -> str:
    """What to do after a stop; `lost` is that where nothing is kept."""
    return f"Nothing is kept. {lost}" if lost else "Run the same command again to go on."


def code_of(lost: str | None) -> ExitCode:
    """Of a stopped run: `STOPPED` asks for the same command again, to go on or to begin anew."""
    return ExitCode.STOPPED if lost in (None, AGAIN) else ExitCode.FAILED


def _on_signal(number: int, frame: FrameType | None) -> None:
    _received.append(number)
    if not _command:
        leave(number, "nothing was under way")
    if not _deferrals and len(_received) == 1:
        _raised.append(number)
        raise Interrupted


@contextmanager
def running(command: str, lost: str | None = None) -> Iterator[None]:
    """While `command` runs; a signal becomes KeyboardInterrupt (INT) or `Stopped`.

    `lost` says what to do, where nothing is kept of a run that is stopped. What a library makes of
    a signal that met it (compiled code turns it into an error of its own) is the stop as well.
    """
    _command.append(command)
    _unkept.append(lost)
    try:
        yield
    except Interrupted:
        check()
    except Exception:
        if _raised:
            check()
        raise
    finally:
        _raised.clear()
        _command.remove(command)
        _unkept.pop()


@contextmanager
def deferred() -> Iterator[None]:
    """Inside, a signal waits until the work calls `check()`."""
    _deferrals.append(None)
    try:
        yield
    finally:
        _deferrals.pop()


@contextmanager
def saving() -> Iterator[None]:
    """Inside, the end of the grace time waits for the file that is being written."""
    _saving.append(None)
    try:
        yield
    finally:
        _saving.pop()


def stop_requested() -> bool:
    """True once one of the signals arrived."""
    return bool(_received)


def check() -> None:
    """Raise `Stopped`, or KeyboardInterrupt for INT, if a stop was asked for. Call it where what
    is to be kept is saved; where nothing is, `Stopped` says so, and its code is `code_of`."""
    if signal.SIGINT in _received:
        raise KeyboardInterrupt
    if _received:
        name = signal.Signals(_received[-1]).name
        if lost := _unkept[-1] if _unkept else None:
            raise Stopped(name, "stopped, and nothing is kept", lost, code_of(lost))
        raise Stopped(name, "stopped with its state saved", "Run the same command again to go on.")
