"""Verify shards: the end mark, the sums of their statistics, pictures, and unique keys."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..runtime.errors import BadInput
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

    Pictures are decoded where no sums vouch for them. `quarantine` may count single bad samples
    instead of calling their shard broken.
    """
    shards = open_source([str(operand) for operand in operands]).shards()
    result, keys = CheckResult(len(shards)), {}  # type: tuple[CheckResult, dict[bytes, str]]
    with progress("check", len(shards)) as task:
        for shard in shards:
            try:
                result.samples += _check_shard(shard, keys, quarantine or Quarantine())
            except BadInput as error:
                result.broken.append({"shard": str(shard), "why": f"{error.what}: {error.why}"})
                if remove:
                    shard.unlink()
                    stats_path(shard).unlink(missing_ok=True)
            task.advance(broken=str(len(result.broken)))
    return result


def _check_shard(shard: Path, keys: dict[bytes, str], quarantine: Quarantine) -> int:
    """The number of its good samples. BadInput: what is wrong with it."""
    vouched = read_stats(shard) is not None
    count = 0
    for sample in read_path(shard, quarantine):
        if not vouched and not quarantine.skip:
            check_any(sample)
        short = hashlib.blake2b(sample.key.encode(), digest_size=12).digest()
        if short in keys:
            raise sample.bad(f"its key stands in {keys[short]} too")
        keys[short] = shard.name
        count += 1
    return count
