"""A shard in the making that outlives its process: `.NAME.partial`, and `.NAME.journal` beside it.

The journal's first line says what the samples are made with; then comes a line a sample: key, size,
SHA-256, and the CRC-32 of these. What the journal vouches for is kept by the next run, the rest is
cut off.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .. import __version__
from ..runtime.files import encode_json, open_locked
from .sample import Sample
from .writer import end_of_tar, sample_bytes, write_stats


def resume_shard(
    shard: Path,
    draw: Callable[[int], Iterable[Sample]],
    facts: Callable[[], dict[str, Any]] = dict,
) -> int:
    """Write a shard as `write_shard` does, but keep what is finished when the run ends before it.

    `draw(n)` makes the samples from the n-th on; `facts` say what they are made with. How many
    were made comes back.
    """
    start = time.monotonic()
    with PartialShard(shard, {"utilgen": __version__, **facts()}) as partial:
        kept = len(partial.digests)
        for sample in draw(kept):
            partial.add(sample)
        counted = partial.finish(shard)
    write_stats(shard, time.monotonic() - start, counted, facts())
    partial.journal_path.unlink()
    return len(partial.digests) - kept


class PartialShard:
    """The finished samples of SHARD.tar; a context that keeps them whatever happens.

    `made_with` (JSON) must be what it was for samples to be kept. UtilgenError: another process
    writes the shard, or a key stands twice.
    """

    def __init__(self, shard: Path, made_with: dict[str, Any]) -> None:
        self.body_path, self.journal_path = leftovers(shard)
        self.head = encode_json(made_with)
        self.digests: dict[str, str] = {}
        self.hash, self.size = hashlib.sha256(), 0

    def __enter__(self) -> PartialShard:
        self.body: BinaryIO = open_locked(self.body_path, "shard")
        self.journal: BinaryIO = open_locked(self.journal_path, "shard")
        kept = self._verify()
        self.body.seek(self.size)
        self.body.truncate()
        self.journal.seek(kept)
        self.journal.truncate()
        if not kept:
            self.journal.write(self.head)
        return self

    def __exit__(self, *_: object) -> None:
        self.body.close()
        self.journal.close()

    def _verify(self) -> int:
        """Take up what journal and body agree on; the length of that part of the journal."""
        lines = iter(self.journal)
        if next(lines, b"") != self.head:
            return 0
        length = len(self.head)
        for line, key, size, digest in _entries(lines):
            data = self.body.read(size)
            if len(data) != size or hashlib.sha256(data).hexdigest() != digest:
                break
            self._count(key, data, digest)
            length += len(line)
        return length

    def _count(self, key: str, data: bytes, digest: str) -> None:
        self.digests[key] = digest
        self.hash.update(data)
        self.size += len(data)

    def add(self, sample: Sample) -> None:
        """Append a sample. Once this returns, it outlives the process."""
        data = sample_bytes(sample)
        if sample.key in self.digests:
            raise sample.bad("its key stands twice in the shard")
        digest = hashlib.sha256(data).hexdigest()
        self.body.write(data)
        self.body.flush()
        self.journal.write(_line(sample.key, len(data), digest))
        self.journal.flush()
        self._count(sample.key, data, digest)

    def finish(self, shard: Path) -> dict[str, Any]:
        """Write the end mark and give the shard its name; its part of the statistics."""
        end = end_of_tar(self.size)
        self.body.write(end)
        self.body.flush()
        os.fsync(self.body.fileno())
        self.body_path.replace(shard)
        self.hash.update(end)
        return {
            "samples": len(self.digests),
            "bytes": self.size + len(end),
            "sha256": self.hash.hexdigest(),
            "sample_sha256": self.digests,
        }


def leftovers(shard: Path) -> tuple[Path, Path]:
    """Where the unfinished SHARD.tar and its journal lie."""
    return shard.with_name(f".{shard.name}.partial"), shard.with_name(f".{shard.name}.journal")


def clear_leftovers(shard: Path) -> None:
    """Remove what a killed run left of a shard that is whole."""
    for path in leftovers(shard):
        path.unlink(missing_ok=True)


def _line(key: str, size: int, digest: str) -> bytes:
    return b"%s %08x\n" % (text := json.dumps([key, size, digest]).encode(), zlib.crc32(text))


def _entries(lines: Iterator[bytes]) -> Iterator[tuple[bytes, str, int, str]]:
    """(line, key, size, digest) up to the first line that is not as it was written."""
    for line in lines:
        try:
            key, size, digest = json.loads(line.rpartition(b" ")[0])
        except (ValueError, TypeError):
            return
        if line != _line(key, size, digest):
            return
        yield line, key, size, digest
