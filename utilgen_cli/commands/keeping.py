"""Which commands keep nothing of a run that is stopped, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..runtime.signals import AGAIN

DIRECTORY = "Add -o DIR, and a stopped run goes on there."
NAMED = "Name shards and -o DIR, and a stopped run goes on there."


def nothing_kept(command: str, options: Mapping[str, Any]) -> str | None:
    """What to do where a stopped run leaves nothing to go on from; None where it does."""
    if command in ("pairs", "view", "check") or options.get("select"):
        return AGAIN  # their result depends on all of the input
    if command == "value score" and options.get("shards") in (None, [], ["-"]):
        return NAMED
    alone = options.get("output", "-") in (None, "-") and options.get("save_policy") is None
    return DIRECTORY if alone else None
