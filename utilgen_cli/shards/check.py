"""Verify shards: the end mark, the sums of their statistics, pictures, and unique keys."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..runtime.errors import BadInput, UsageError
from ..runtime.progress import Progress, silent
from .operands import open_source, read_path
from .quarantine import Quarantine, check_any
from .sums import read_stats, stats_path


@dataclass
class CheckResult:
    """Counts, and for each broken shard its file and what is wrong."""

    shards: int = 0
    samples: int = 0
    broken: list[dict[str, str]] = field(default_factory=list)


def check_shards(
    operands: Sequence[Path],
    progress: Progress = silent,
    remove: bool = False,
    quarantine: Quarantine | None = None,
) -> CheckResult:
    """Read every shard to its end. With `remove` broken ones are deleted, for a rerun to remake.

    A key that stands in two shards of a directory is told, and nothing is deleted for it. Pictures
    are decoded where no sums vouch for them. `quarantine` may count single bad samples
    instead of calling their shard broken.
    """
    shards = open_source([str(operand) for operand in operands]).shards()
    if not shards:
        raise UsageError("-", "a pipe cannot be checked", "Name directories or shard files.")
    result = CheckResult(len(shards))
    known: dict[Path, dict[bytes, str]] = defaultdict(dict)  # keys are unique in a data set
    with progress("check", len(shards)) as task:
        for shard in shards:
            try:
                keys = _check_shard(shard, quarantine or Quarantine())
            except BadInput as error:
                result.broken.append({"shard": str(shard), "why": f"{error.what}: {error.why}"})
                if remove:
                    shard.unlink()
                    stats_path(shard).unlink(missing_ok=True)
            else:
                result.samples += len(keys)
                if why := _twice(keys, known[shard.parent]):
                    result.broken.append({"shard": str(shard), "why": why})
                known[shard.parent].update(dict.fromkeys(keys, shard.name))
            task.advance(broken=str(len(result.broken)))
    return result


def _check_shard(shard: Path, quarantine: Quarantine) -> dict[bytes, str]:
    """The keys of its good samples, by their digests. BadInput: what is wrong with it."""
    vouched = read_stats(shard) is not None
    keys = {}
    for sample in read_path(shard, quarantine):
        if not vouched and not quarantine.skip:
            check_any(sample)
        keys[hashlib.blake2b(sample.key.encode(), digest_size=12).digest()] = sample.key
    return keys


def _twice(keys: dict[bytes, str], known: dict[bytes, str]) -> str:
    """What is wrong if a key of the shard stands in another of its directory; else empty."""
    short = next((short for short in keys if short in known), None)
    return "" if short is None else f"sample {keys[short]}: its key stands in {known[short]} too"
