"""Verify shards: the end mark, the checksums of their statistics, and keys unique in the set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..runtime.errors import BadInput
from ..runtime.progress import Progress, silent
from .operands import open_source, read_path
from .writer import sample_bytes, stats_path


@dataclass
class CheckResult:
    """Counts, and for each broken shard its file and what is wrong."""

    shards: int = 0
    samples: int = 0
    broken: list[dict[str, str]] = field(default_factory=list)


def check_shards(
    operands: Sequence[Path], progress: Progress = silent, remove: bool = False
) -> CheckResult:
    """Read every shard to its end. With `remove` broken ones are deleted, for a rerun to remake."""
    shards = open_source([str(operand) for operand in operands]).shards()
    result, keys = CheckResult(len(shards)), {}  # type: tuple[CheckResult, dict[bytes, str]]
    with progress("check", len(shards)) as task:
        for shard in shards:
            try:
                result.samples += _check_shard(shard, keys)
            except BadInput as error:
                result.broken.append({"shard": str(shard), "why": f"{error.what}: {error.why}"})
                if remove:
                    shard.unlink()
                    stats_path(shard).unlink(missing_ok=True)
            task.advance(broken=str(len(result.broken)))
    return result


def _check_shard(shard: Path, keys: dict[bytes, str]) -> int:
    digests = {}
    for sample in read_path(shard):
        digests[sample.key] = hashlib.sha256(sample_bytes(sample)).hexdigest()
        short = hashlib.blake2b(sample.key.encode(), digest_size=12).digest()
        if short in keys:
            raise sample.bad(f"its key stands in {keys[short]} too")
        keys[short] = shard.name
    if not stats_path(shard).exists():  # a shard of somebody else's
        return len(digests)
    try:
        stats = json.loads(stats_path(shard).read_bytes())
        expected = stats["sample_sha256"]
    except (ValueError, KeyError, TypeError):
        raise BadInput(str(stats_path(shard)), "not readable statistics") from None
    changed = [k for k in {**expected, **digests} if expected.get(k) != digests.get(k)]
    if changed:
        raise BadInput(str(shard), f"sample {changed[0]} is not as it was written")
    with shard.open("rb") as f:
        if hashlib.file_digest(f, "sha256").hexdigest() != stats["sha256"]:
            raise BadInput(str(shard), "bytes outside the samples are not as they were written")
    return len(digests)
