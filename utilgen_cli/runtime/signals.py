"""TERM, USR1 and USR2 ask for a clean stop; the work asks `check()` where it is safe to leave."""

from __future__ import annotations

import signal
from types import FrameType

from .errors import Stopped

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_received: list[int] = []


def install() -> None:
    """Remember a stop signal instead of dying of it."""
    for number in STOP_SIGNALS:
        signal.signal(number, _remember)


def _remember(number: int, frame: FrameType | None) -> None:
    _received.append(number)


def stop_requested() -> bool:
    """True once TERM, USR1 or USR2 arrived."""
    return bool(_received)


def check() -> None:
    """Raise `Stopped` if a stop was asked for. Call it only where the state is saved."""
    if _received:
        name = signal.Signals(_received[-1]).name
        raise Stopped(name, "stopped with its state saved", "Run the same command again to go on.")
