"""Reading and writing shards of 100 KB images beside copying them with Python's tarfile."""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
from pathlib import Path

from utilgen_cli.shards.operands import read_path
from utilgen_cli.shards.sample import Sample
from utilgen_cli.shards.writer import write_shard, write_tar

from .harness import interleaved, record, table


def main(samples: int = 2000, size: int = 100_000) -> None:
    with tempfile.TemporaryDirectory() as name:
        shard, out = Path(name) / "in.tar", Path(name) / "out.tar"
        data = [os.urandom(size) for _ in range(16)]
        write_shard(
            shard,
            (
                Sample(f"{i:06d}", {"jpg": data[i % 16], "cls": b"0", "json": b'{"class_name": "a"}'})
                for i in range(samples)
            ),
        )  # fmt: skip

        def ours() -> None:
            with out.open("wb") as f:
                write_tar(read_path(shard), f)

        def ours_checked() -> None:
            write_shard(out, read_path(shard))

        def theirs() -> None:
            with tarfile.open(shard) as source, tarfile.open(out, "w") as sink:
                for member in source:
                    sink.addfile(member, io.BytesIO(source.extractfile(member).read()))  # type: ignore[union-attr]

        sides = {
            "tarfile copy": theirs,
            "utilgen stream": ours,
            "utilgen shard with checksums": ours_checked,
        }
        timings = interleaved(sides)
        megabytes = shard.stat().st_size / 1e6
        speeds = ", ".join(f"{n}: {megabytes / t.median:.0f} MB/s" for n, t in timings.items())
        record(
            "Streams: read and write 100 KB images", f"{table(timings, 'tarfile copy')}\n\n{speeds}"
        )


if __name__ == "__main__":
    main()
