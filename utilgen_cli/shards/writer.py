"""Write samples as tar: the same samples give the same bytes, and the end mark only at success."""

from __future__ import annotations

import hashlib
import os
import tarfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

from .. import __version__
from ..runtime.files import sync_directory, write_json
from .reader import BLOCK
from .sample import Sample, check_key

RECORD = 20 * BLOCK
END_MARK = bytes(2 * BLOCK)


def tar_member(name: str, data: bytes) -> bytes:
    """A ustar header with nothing of the machine in it, the data, and padding to a block."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o644
    header = info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")
    return b"".join((header, data, bytes(-len(data) % BLOCK)))


def sample_bytes(sample: Sample) -> bytes:
    """One sample as it stands in a tar."""
    check_key(sample.key)
    return b"".join(
        tar_member(f"{sample.key}.{name}", data) for name, data in sample.members.items()
    )


def write_tar(
    samples: Iterable[Sample], file: BinaryIO, seen: Callable[[Sample, bytes], None] | None = None
) -> int:
    """Write a whole tar and return the number of samples. After an error there is no end mark.

    `seen` is told each sample and the bytes it became.
    """
    size = count = 0
    for sample in samples:
        data = sample_bytes(sample)
        if seen is not None:
            seen(sample, data)
        file.write(data)
        size += len(data)
        count += 1
    file.write(END_MARK + bytes(-(size + len(END_MARK)) % RECORD))
    file.flush()
    return count


def stats_path(shard: Path) -> Path:
    """Where the statistics of SHARD.tar lie: SHARD_stats.json beside it."""
    return shard.with_name(f"{shard.stem}_stats.json")


def write_shard(
    path: Path, samples: Iterable[Sample], facts: Callable[[], dict[str, Any]] = dict
) -> int:
    """Write a shard under a temporary name, fsync, rename; then its statistics."""
    start = time.monotonic()
    temporary = path.with_name(path.name + ".tmp")
    digests: dict[str, str] = {}

    def note(sample: Sample, data: bytes) -> None:
        if sample.key in digests:
            raise sample.bad("its key stands twice in the shard")
        digests[sample.key] = hashlib.sha256(data).hexdigest()

    try:
        with temporary.open("wb") as raw:
            file = _Hashing(raw)
            count = write_tar(samples, file, note)  # type: ignore[arg-type]
            os.fsync(raw.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    temporary.replace(path)
    sync_directory(path.parent)
    stats = {
        "samples": count,
        "bytes": file.size,
        "sha256": file.hash.hexdigest(),
        "sample_sha256": digests,
        "seconds": round(time.monotonic() - start, 3),
        "utilgen": __version__,
        **facts(),
    }
    write_json(stats_path(path), stats)
    return count


class _Hashing:
    """A file that counts and hashes what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.hash, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        self.size += len(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()
