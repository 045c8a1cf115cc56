"""Write samples as tar: the same samples give the same bytes, and the end mark only at success."""

from __future__ import annotations

import hashlib
import tarfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

from .. import __version__
from ..runtime.files import appearing_whole, sync_directory, write_json
from .reader import BLOCK
from .sample import Sample, check_key
from .sums import stats_path

RECORD = 20 * BLOCK
END_MARK = bytes(2 * BLOCK)


def tar_member(name: str, data: bytes) -> bytes:
    """A ustar header with nothing of the machine in it, the data, and padding to a block."""
    return b"".join((tar_header(name, len(data)), data, bytes(-len(data) % BLOCK)))


def tar_header(name: str, size: int) -> bytes:
    """The bytes that tarfile writes, by filling in name, size and sum: a tenth of its time."""
    field = name.encode("ascii")
    if len(field) >= 100 or size >= 8**11:
        return _tarfile_header(name, size)
    digits = b"%011o" % size
    total = EMPTY_SUM + sum(field) + sum(digits) - 11 * ord("0")
    head = (field.ljust(100, b"\0"), EMPTY[100:124], digits, EMPTY[135:148], b"%06o" % total)
    return b"".join((*head, EMPTY[154:]))


def _tarfile_header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    return info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")


EMPTY = _tarfile_header("", 0)
EMPTY_SUM = int(EMPTY[148:154], 8)


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
    file.write(end_of_tar(size))
    file.flush()
    return count


def end_of_tar(size: int) -> bytes:
    """The end mark after `size` bytes of samples, and zeros up to a record."""
    return END_MARK + bytes(-(size + len(END_MARK)) % RECORD)


def write_shard(
    path: Path, samples: Iterable[Sample], facts: Callable[[], dict[str, Any]] = dict
) -> int:
    """Write a shard under a temporary name, fsync, rename; then its statistics.

    UtilgenError: another process writes the same shard.
    """
    start = time.monotonic()
    digests: dict[str, str] = {}

    def note(sample: Sample, data: bytes) -> None:
        if sample.key in digests:
            raise sample.bad("its key stands twice in the shard")
        digests[sample.key] = hashlib.sha256(data).hexdigest()

    with appearing_whole(path, path.with_name(path.name + ".tmp"), "shard") as raw:
        file = _Hashing(raw)
        count = write_tar(samples, file, note)  # type: ignore[arg-type]
    counted = {
        "samples": count,
        "bytes": file.size,
        "sha256": file.hash.hexdigest(),
        "sample_sha256": digests,
    }
    write_stats(path, time.monotonic() - start, counted, facts())
    return count


def write_stats(
    shard: Path, seconds: float, counted: dict[str, Any], facts: dict[str, Any]
) -> None:
    """Make the renamed shard durable, then write what marks it as whole: its statistics."""
    sync_directory(shard.parent)
    about = {"seconds": round(seconds, 3), "utilgen": __version__}
    write_json(stats_path(shard), {**counted, **about, **facts})


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
