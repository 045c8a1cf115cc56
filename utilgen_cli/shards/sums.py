"""The checksums of a shard (NNNNN_stats.json beside it), held against what is read.

A flipped bit inside a picture leaves the tar whole: only these sums show it. What comes through a
pipe has none; there the headers, the order, the end mark and the pictures' own sums are checked.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..runtime.contents import STATS
from ..runtime.errors import BadInput
from ..runtime.files import file_sum
from .sample import BadSample, Sample

MAX_STATS = 1 << 28  # bytes
PUBLISHED = ".shards.json"  # of a directory, written last: the names of all shards of a stream
SUM_REASON = "not as written"


def stats_path(shard: Path) -> Path:
    """Where the statistics of SHARD.tar lie: SHARD_stats.json beside it."""
    return shard.with_name(f"{shard.stem}{STATS}")


def read_stats(shard: Path) -> dict[str, Any] | None:
    """The statistics of a shard, or None where it has none. BadInput: they make no sense."""
    path = stats_path(shard)
    try:
        if path.stat().st_size > MAX_STATS:
            raise BadInput(str(path), "too large for statistics")
        stats = json.loads(path.read_bytes())
        if type(stats) is dict and not {"sample_sha256", "utilgen"} & set(stats):
            return None  # another program's, as img2dataset's
        keys, size, whole = stats["sample_sha256"], stats["bytes"], stats["sha256"]
        if type(keys) is dict and type(size) is int and type(whole) is str:
            return dict(stats)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise BadInput(
        str(path), "not readable statistics", "Make the shard again, or remove this file."
    )


def has_stats(shard: Path) -> bool:
    """True if the shard has statistics that make sense, whether or not it is there itself."""
    with suppress(BadInput, OSError):
        return read_stats(shard) is not None
    return False


def lost_shards(directory: Path) -> list[Path]:
    """Shards that were finished (they have statistics, or stand in the list of their directory)
    and are not there."""
    stems = [path.name.removesuffix(STATS) for path in directory.glob(f"*{STATS}")]
    listed = _published(directory)
    here = {path.name for path in directory.iterdir()}  # last: a shard comes before what names it
    missing = [directory / name for stem in stems if (name := f"{stem}.tar") not in here]
    lost = {shard for shard in missing if has_stats(shard)}
    return sorted(lost | {directory / name for name in listed - here})


def _published(directory: Path) -> set[str]:
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads((directory / PUBLISHED).read_bytes())
        return {name for name in found if type(name) is str} if type(found) is list else set()
    return set()


def is_as_written(shard: Path) -> bool:
    """True if the shard is there and every byte of it is what its statistics say."""
    try:
        stats = read_stats(shard)
        return stats is not None and file_sum(shard) == stats["sha256"]
    except (BadInput, FileNotFoundError):
        return False


class Sums:
    """The expected sums of one shard; each sample is checked once, then the shard's size."""

    def __init__(self, shard: Path, stats: dict[str, Any]) -> None:
        self.shard, self.size = shard, stats["bytes"]
        self.waiting: dict[str, Any] = dict(stats["sample_sha256"])

    @classmethod
    def of(cls, shard: Path) -> Sums | None:
        """What is known of `shard`, if anything."""
        stats = read_stats(shard)
        return None if stats is None else cls(shard, stats)

    def error(self, sample: Sample, digest: str) -> BadSample | None:
        """What is wrong with a sample whose bytes in the tar have this SHA-256, or None."""
        expected = self.waiting.pop(sample.key, None)
        if expected is None:
            why = f"it is not among the samples of {stats_path(self.shard).name}"
        elif expected != digest:
            why = f"its bytes do not match their sum in {stats_path(self.shard).name}"
        else:
            return None
        return sample.bad(why, SUM_REASON)

    def finish(self, size: int) -> None:
        """BadInput if a sample did not come, or bytes outside of the samples are lost or new."""
        if self.waiting:
            lost = min(self.waiting)
            why = f"sample {lost[:80]} is missing at byte {size}, the end"
            raise BadInput(str(self.shard), why, "Make it again, or copy it again.")
        if size != self.size:
            why = f"it ends at byte {size}, and was written with {self.size} bytes"
            raise BadInput(str(self.shard), why, "Make it again, or copy it again.")
