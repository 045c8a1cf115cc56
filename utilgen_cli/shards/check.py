"""Verify shards: the end mark, the sums of their statistics, pictures, and unique keys."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ..runtime.contents import SETTINGS
from ..runtime.errors import BadInput, UsageError
from ..runtime.progress import Progress, silent
from .operands import expand_braces, open_source, read_path
from .quarantine import Quarantine, check_any
from .sums import has_stats, lost_shards, read_stats, stats_path


@dataclass
class CheckResult:
    """Counts, and for each broken shard its file and what is wrong."""

    shards: int = 0
    samples: int = 0
    broken: list[dict[str, str]] = field(default_factory=list)
    removed: int = 0


def check_shards(
    operands: Sequence[Path],
    progress: Progress = silent,
    remove: bool = False,
    quarantine: Quarantine | None = None,
) -> CheckResult:
    """Read every shard to its end. With `remove` broken ones are deleted, for a rerun to remake,
    where utilgen made them: they have its statistics, or lie beside its settings.

    A key that stands twice in a directory is told, and nothing is deleted for it; a shard that is
    gone while its directory knows of it, too. Pictures are decoded where no sums vouch for them.
    `quarantine` may count single bad samples instead of calling their shard broken.
    """
    shards = open_source([str(operand) for operand in operands], whole=False).shards()
    if not shards:
        raise UsageError("-", "a pipe cannot be checked", "Name directories or shard files.")
    result = CheckResult(len(shards))
    named = [Path(name) for operand in operands for name in expand_braces(str(operand))]
    lost = [path for each in named if each.is_dir() for path in lost_shards(each)]
    known: dict[Path, dict[bytes, str]] = defaultdict(dict)  # keys are unique in a data set
    with progress("check", len(shards)) as task:
        for shard in shards:
            try:
                keys, doubled = _check_shard(shard, quarantine or Quarantine())
            except BadInput as error:
                result.broken.append({"shard": str(shard), "why": f"{error.what}: {error.why}"})
                if remove and _is_ours(shard):
                    shard.unlink()
                    result.removed += 1
                    stats_path(shard).unlink(missing_ok=True)
            else:
                result.samples += len(keys)
                if why := doubled or _twice(keys, known[shard.parent]):
                    result.broken.append({"shard": str(shard), "why": why})
                known[shard.parent].update(dict.fromkeys(keys, shard.name))
            task.advance(broken=str(len(result.broken)))
    result.broken += [{"shard": str(path), "why": "it is gone"} for path in lost]
    return result


def _is_ours(shard: Path) -> bool:
    with suppress(OSError, ValueError, TypeError):
        if "command" in json.loads((shard.parent / SETTINGS).read_text()):
            return True
    return has_stats(shard)


def _check_shard(shard: Path, quarantine: Quarantine) -> tuple[dict[bytes, str], str]:
    """The keys of its good samples, by their digests, and what is wrong if one stands twice.

    BadInput: what is wrong with the shard.
    """
    vouched = read_stats(shard) is not None
    keys: dict[bytes, str] = {}
    doubled = ""
    for sample in read_path(shard, quarantine):
        if not vouched and not quarantine.skip:
            check_any(sample)
        short = hashlib.blake2b(sample.key.encode(), digest_size=12).digest()
        if short in keys:
            doubled = f"sample {sample.key}: its key stands twice"
        keys[short] = sample.key
    return keys, doubled


def _twice(keys: dict[bytes, str], known: dict[bytes, str]) -> str:
    """What is wrong if a key of the shard stands in another of its directory; else empty."""
    short = next((short for short in keys if short in known), None)
    return "" if short is None else f"sample {keys[short]}: its key stands in {known[short]} too"
