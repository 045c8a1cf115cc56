"""What a set of shards cost to make: read from the files that every stage leaves beside them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..runtime.contents import SETTINGS
from ..runtime.output import MADE_IN
from ..shards.sums import stats_path


def stage_costs(shards: Sequence[Path]) -> list[dict[str, Any]]:
    """{command, seconds, images} of the stage that wrote `shards`, then of its input's, and so on.

    Followed through the `input` that a stage notes in settings.json, as far as it is still there.
    """
    stages: list[dict[str, Any]] = []
    seen: set[Path] = set()
    while shards and shards[0].resolve() not in seen:
        seen.add(shards[0].resolve())
        stats = [_read(stats_path(shard)) for shard in shards]
        settings = _read(shards[0].parent / SETTINGS)
        if not all(stats):
            break
        seconds = round(sum(float(s.get("seconds", 0)) for s in stats), 3)
        images = sum(int(s.get("samples", 0)) for s in stats)
        stages.append({"command": str(settings.get("command", "unknown")), "seconds": seconds,
                       "images": images})  # fmt: skip
        before = settings.get("input") or []
        names = [Path(str(p)) for p in (before if isinstance(before, list) else [before])]
        base = Path(str(settings.get(MADE_IN, "")))
        moved = any(not (base / name).exists() for name in names)
        shards = names if moved else [base / name for name in names]
    return stages


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def generation_cost(shards: Sequence[Path], price_per_hour: float | None = None) -> dict[str, Any]:
    """Seconds and images of all stages behind `shards`, and money; None where nothing is known."""
    stages = stage_costs(shards)
    if not stages:
        return {"seconds": None, "images": None, "price": None, "stages": []}
    seconds = round(sum(stage["seconds"] for stage in stages), 3)
    price = None if price_per_hour is None else round(seconds / 3600 * price_per_hour, 6)
    return {"seconds": seconds, "images": stages[0]["images"], "price": price, "stages": stages}
