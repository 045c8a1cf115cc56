"""Reading and writing shards of 100 KB images beside copying them with Python's tarfile: in one
process, and by the stages `pairs` and `value score --method loss` as they are called.

A stage's rate is of the difference between a long and a short run, so that start-up does not count.
`value score` looks at the images, so it decodes them; `pairs` does not, and writes an image for each
side of a pair.
"""

from __future__ import annotations

import io
import os
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from utilgen_cli.shards.operands import read_path
from utilgen_cli.shards.sample import Sample
from utilgen_cli.shards.writer import write_shard, write_tar

from .harness import interleaved, record, run, table

UTILGEN = [sys.executable, "-m", "utilgen_cli"]
SIDE, QUALITY = 362, 85  # of a noise picture whose JPEG has 100 KB


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
        record("Stages: 100 KB JPEG images", stages(Path(name)))


def pictures(count: int, scored: bool) -> Iterator[Sample]:
    """Samples of two classes, 16 different pictures, with their utility."""
    rng = np.random.default_rng(0)
    files = []
    for _ in range(16):
        out = io.BytesIO()
        picture = rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
        Image.fromarray(picture).save(out, "JPEG", quality=QUALITY)
        files.append(out.getvalue())
    for i in range(count):
        members = {"jpg": files[i % 16], "cls": b"%d" % (i % 2)}
        members["json"] = b'{"class_name": "%s"}' % b"ab"[i % 2 : i % 2 + 1]
        if scored:
            members["utility.json"] = b'{"utility": %.3f}' % rng.random()
        yield Sample(f"{i:06d}", members)


def decode(count: int) -> float:
    """Processor seconds of PIL for `count` of the pictures."""
    files = [sample.members["jpg"] for sample in pictures(16, scored=False)]
    start = time.process_time()
    for i in range(count):
        image = Image.open(io.BytesIO(files[i % 16]))
        image.draft("RGB", (16, 16))
        image.load()
    return time.process_time() - start


def copy(source: Path, out: Path) -> list[str]:
    """The command that copies a tar member by member with Python's tarfile."""
    program = f"""import io, tarfile
with tarfile.open({str(source)!r}) as a, tarfile.open({str(out)!r}, "w") as b:
    for m in a: b.addfile(m, io.BytesIO(a.extractfile(m).read()))"""
    return [sys.executable, "-c", program]


def stages(work: Path, few: int = 100, many: int = 2100, repeats: int = 3) -> str:
    """Processor seconds and MB/s of each stage, the median of some rounds."""
    shards = {n: work / f"{n}.tar" for n in (few, many)}
    for count, shard in shards.items():
        write_shard(shard, pictures(count, scored=True))
    write_shard(work / "real.tar", pictures(40, scored=False))
    value = str(work / "value")
    run([*UTILGEN, "value", "train", "--real", str(work / "real.tar"), "--size", "8", "--smoke", "-q",
         "-o", value], work / "log")  # fmt: skip
    out = ["-q", "--overwrite", "-o"]

    def command(side: str, shard: Path) -> list[str]:
        if side == "tarfile copy":
            return copy(shard, work / "copy.tar")
        if side == "pairs":
            return [*UTILGEN, "pairs", str(shard), "--quantile", "0.5", *out, str(work / "pairs")]
        return [*UTILGEN, "value", "score", str(shard), "--value", value, "--method", "loss",
                "--force", *out, str(work / "scored")]  # fmt: skip

    megabytes = (shards[many].stat().st_size - shards[few].stat().st_size) / 1e6
    found: dict[str, list[float]] = {"tarfile copy": [], "pairs": [], "value score": []}
    for _ in range(repeats):
        for side, seconds in found.items():
            short, long = (run(command(side, s), work / "log")[0] for s in shards.values())
            seconds.append(long - short)
    found["PIL alone, decoding them as small as it can"] = [decode(many - few)]
    lines = ["| stage | processor s | MB/s read | times tarfile |", "|---|---|---|---|"]
    copied = statistics.median(found["tarfile copy"])
    for side, seconds in found.items():
        used = statistics.median(seconds)
        lines.append(f"| {side} | {used:.2f} | {megabytes / used:.0f} | {used / copied:.2f} |")
    size = shards[many].stat().st_size / many / 1e3
    return (
        "\n".join(lines) + f"\n\n{size:.0f} KB an image; the median of {repeats} rounds, one core."
    )


if __name__ == "__main__":
    main()
