"""`--on-error`: what a command does with single bad samples, and what it says of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..shards.quarantine import Quarantine
    from ..shards.sample import Sample


def quarantine_of(on_error: str, *checks: Callable[[Sample], object]) -> Quarantine:
    """The quarantine of a run. UsageError: neither stop nor skip."""
    from ..runtime.errors import UsageError
    from ..shards.quarantine import Quarantine, check_labelled

    if on_error not in ("stop", "skip"):
        raise UsageError(f"--on-error {on_error}", "unknown", "Use stop or skip.")
    return Quarantine(on_error == "skip", checks or (check_labelled,))


def check_scored(sample: Sample) -> None:
    """BadSample unless image, label and facts can be read, and the utility if there is one."""
    from ..shards.quarantine import check_labelled
    from ..shards.scores import check_utility

    check_labelled(sample)
    check_utility(sample)


def tell(quarantine: Quarantine, command: str) -> None:
    """One line on stderr where samples were left out, with -q too: data is missing."""
    from .streams import report

    if line := quarantine.line():
        report({}, False, f"{command}: warning: {line}")
