"""Is the work linear? Seconds against samples, classes and processes; a table and scale.svg.

    python -m tests.benchmarks scale [--most 100000]

Every row is a command of its own in a process of its own; processor seconds of it and its children.
What starting costs is shown as the first row of each part (next to nothing to do).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from utilgen_cli.runtime.files import encode_json
from utilgen_cli.shards.sample import Sample
from utilgen_cli.shards.scores import UTILITY
from utilgen_cli.shards.writer import write_shard

from ..conftest import make_sample
from .harness import RESULTS, record

SHARD = 10_000
PER_SAMPLE = ("check", "pairs", "value score", "value train")
PYTHON = [sys.executable, "-m", "utilgen_cli"]


@dataclass
class Row:
    """One measured command: how much it had to do, and what it took."""

    part: str
    count: int
    processor: float
    clock: float


def run(*command: object, workers: int = 1) -> tuple[float, float]:
    """(processor, clock) seconds of `workers` processes side by side, `{part}` their share."""
    before, start = os.times(), time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [*PYTHON, *(str(c).replace("{part}", f"{i}/{workers}") for c in command), "-q"],
            env=environment, stdout=subprocess.DEVNULL,
        )
        for i in range(workers)
    ]  # fmt: skip
    if any(process.wait() for process in running):
        sys.exit(f"{command} failed")
    after = os.times()
    used = after.children_user + after.children_system
    return used - before.children_user - before.children_system, time.monotonic() - start


def scored(first: int, count: int) -> Iterator[Sample]:
    """Small scored samples of ten classes."""
    pictures = [make_sample(i).members["png"] for i in range(256)]
    for i in range(first, first + count):
        label = i % 10
        members = {
            "png": pictures[i % 256], "cls": b"%d" % label,
            "json": encode_json({"class_name": f"class {label}"}),
            UTILITY: encode_json({"utility": (i * 7919 % 1000) / 1000}),
        }  # fmt: skip
        yield Sample(f"{label:04d}-{i:07d}", members)


def make_shards(directory: Path, count: int) -> Path:
    """`count` samples, SHARD of them in a shard."""
    directory.mkdir(parents=True)
    for number, first in enumerate(range(0, count, SHARD)):
        samples = scored(first, min(SHARD, count - first))
        write_shard(directory / f"{number:05d}.tar", samples)
    return directory


def over_samples(work: Path, most: int) -> Iterator[Row]:
    """`check`, `pairs`, `value score` and a short `value train` of 10 to `most` samples."""
    sizes = [10**k for k in range(1, 8) if 10**k <= most]
    shards = {n: make_shards(work / str(n), n) for n in sizes}
    value, real = work / "value", make_shards(work / "real", 120)
    run("value", "train", "--real", real, "--size", 8, "--smoke", "-o", value)
    for n, path in shards.items():
        yield Row("check", n, *run("check", path))
    for n, path in shards.items():
        yield Row("pairs", n, *run("pairs", path, "-o", work / f"pairs-{n}"))
    for n, path in shards.items():
        command = ("value", "score", path, "--value", value, "--force")
        yield Row("value score", n, *run(*command, "-o", work / f"scored-{n}"))
    for n, path in shards.items():
        command = ("value", "train", "--real", real, "--synthetic", path, "--steps", 100)
        yield Row("value train", n, *run(*command, "-o", work / f"value-{n}"))


def over_classes(work: Path, images: int = 1000) -> Iterator[Row]:
    """As many images of 10, 100 and 1,000 classes, one denoising step each."""
    for n in (10, 100, 1000):
        names = work / f"{n}.txt"
        names.write_text("\n".join(f"thing number {i}" for i in range(n)))
        yield Row(
            "generate, classes", n,
            *run("generate", "-m", "tiny", "--classes", names, "--per-class", images // n,
                 "--steps", 1, "-o", work / f"classes-{n}"),
        )  # fmt: skip


def over_processes(work: Path, images: int = 1000) -> Iterator[Row]:
    """The same images by one process and by several that share the shards."""
    for n in (1, 2, 4):
        command = ("generate", "-m", "tiny", "--per-class", images // 10, "--steps", 10,
                   "--shard-size", 20, "--part", "{part}")  # fmt: skip
        yield Row("generate, processes", n, *run(*command, "-o", work / f"ranks-{n}", workers=n))


def table(rows: Sequence[Row]) -> str:
    """Seconds, and milliseconds a sample above the first row of the part."""
    lines = [
        "| command | count | processor s | clock s | ms each above the first |",
        "|---" * 5 + "|",
    ]
    first: dict[str, Row] = {}
    for row in rows:
        base = first.setdefault(row.part, row)
        more = row.count - base.count
        each = f"{1e3 * (row.processor - base.processor) / more:.3f}" if more else ""
        each = each if row.part in PER_SAMPLE else ""
        lines.append(
            f"| {row.part} | {row.count:,} | {row.processor:.2f} | {row.clock:.2f} | {each} |"
        )
    return "\n".join(lines)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Processor seconds against the number of samples, both axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for part in PER_SAMPLE:
        found = [row for row in rows if row.part == part]
        axes.loglog([r.count for r in found], [r.processor for r in found], marker="o", label=part)
    axes.set(xlabel="samples", ylabel="processor seconds")
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


def main(options: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser("python -m tests.benchmarks scale")
    parser.add_argument("--most", type=int, default=100_000, help="samples")
    chosen = parser.parse_args(options)
    with tempfile.TemporaryDirectory() as name:
        work, rows = Path(name), []
        for part in (over_samples(work, chosen.most), over_classes(work), over_processes(work)):
            for row in part:
                print(json.dumps(row.__dict__), file=sys.stderr, flush=True)
                rows.append(row)
    draw(rows, RESULTS.with_name("scale.svg"))
    record("Scale", f"{table(rows)}\n\n![seconds against samples](scale.svg)")


if __name__ == "__main__":
    main(sys.argv[1:])
