"""Scale: a million samples through `value score | pairs`, and ten thousand shards in a directory."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from utilgen_cli.runtime.files import encode_json
from utilgen_cli.shards.operands import open_source
from utilgen_cli.shards.sample import Sample
from utilgen_cli.shards.writer import END_MARK, sample_bytes, write_shard

from ..conftest import make_sample
from .registry import Options, campaign, record
from .runs import QUIET
from .shell import table, utilgen

CLASSES = 4
SIZES = (10_000, 100_000, 1_000_000)
SHARDS = (100, 1_000, 10_000)
PYTHON = [sys.executable, "-m", "utilgen_cli"]


def tiny_samples(count: int) -> Iterator[Sample]:
    """Samples with one of 256 pictures of 8 x 8 pixels and a key of their own."""
    pictures = [make_sample(i).members["png"] for i in range(256)]
    facts = [encode_json({"class_name": f"class {c}", "prompt": f"p{c}"}) for c in range(CLASSES)]
    for i in range(count):
        label = i % CLASSES
        members = {"png": pictures[i % 256], "cls": b"%d" % label, "json": facts[label]}
        yield Sample(f"{label:04d}-{i:07d}", members)


def feed(count: int, descriptor: int) -> None:
    """Write the samples as one tar."""
    with os.fdopen(descriptor, "wb", buffering=1 << 20) as out:
        for sample in tiny_samples(count):
            out.write(sample_bytes(sample))
        out.write(END_MARK)


def value_model(work: Path) -> Path:
    """A small value model for pictures of 8 x 8."""
    value = work / "value"
    if not (value / "value.json").exists():
        real = work / "real"
        real.mkdir(exist_ok=True)
        write_shard(real / "00000.tar", list(tiny_samples(128)))
        done = utilgen(
            ["value", "train", "--real", real, "--size", 8, "--smoke", "-q", "-o", value]
        )
        assert done.code == 0, done.said
    return value


def resident(pid: int) -> float:
    """Resident memory in MB (0 for a process that ended)."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    found = [line.split()[1] for line in lines if line.startswith("VmRSS")]
    return int(found[0]) / 1024 if found else 0.0


def pipeline(count: int, value: Path) -> dict[str, object]:
    """Seconds, exit codes, and resident memory over time of both processes."""
    reading, writing = os.pipe()
    quiet = {"env": {**os.environ, **QUIET}, "stderr": subprocess.DEVNULL}
    start = time.monotonic()
    score = subprocess.Popen(
        [*PYTHON, "value", "score", "--value", value, "--force", "--method", "loss", "-q"],
        stdin=reading, stdout=subprocess.PIPE, **quiet,
    )  # type: ignore[call-overload]  # fmt: skip
    pairs = subprocess.Popen(
        [*PYTHON, "pairs", "-q"], stdin=score.stdout, stdout=subprocess.PIPE, **quiet
    )  # type: ignore[call-overload]
    os.close(reading)
    score.stdout.close()
    threading.Thread(target=feed, args=(count, writing), daemon=True).start()
    tail = _Drain(pairs.stdout)
    seen: list[tuple[float, float, float]] = []
    while pairs.poll() is None:
        seen.append((time.monotonic() - start, resident(score.pid), resident(pairs.pid)))
        time.sleep(0.5)
    codes = [score.wait(), pairs.wait()]
    tail.thread.join()
    return {"samples": count, "seconds": time.monotonic() - start, "codes": codes,
            "bytes": tail.size, "memory": seen}  # fmt: skip


class _Drain:
    """Reads a stream to its end and counts its bytes."""

    def __init__(self, file: object) -> None:
        self.file, self.size = file, 0
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while data := self.file.read(1 << 20):  # type: ignore[attr-defined]
            self.size += len(data)


def memory_row(run: dict) -> list[object]:
    """A line of the table: memory when all is loaded, in the middle, at the end of each stage."""
    seen = run["memory"]
    score = [s for _, s, _ in seen if s > 0]
    pairs = [p for _, _, p in seen if p > 0]
    score_at = [f"{score[int(q * (len(score) - 1))]:.0f}" for q in (0.25, 0.5, 0.75, 1)]
    return [f"{run['samples']:,}", f"{run['seconds']:.0f}",
            f"{run['samples'] / run['seconds']:,.0f}", ", ".join(map(str, run["codes"])),
            " / ".join(score_at), f"{max(score):.0f}",
            f"{pairs[len(pairs) // 2]:.0f}", f"{max(pairs):.0f}"]  # fmt: skip


def stream_table(found: list[dict]) -> str:
    """All runs so far."""
    head = ("samples", "seconds", "samples/s", "exit codes", "score, MB at 1/4, 1/2, 3/4, end",
            "score, most MB", "pairs, MB half-way", "pairs, most MB")  # fmt: skip
    about = (
        "`value score --method loss | pairs`, 8 x 8 PNGs in one stream, 4 classes, two processes "
        "that share two cores with others; resident memory twice a second."
    )
    return f"{about}\n\n{table(head, [memory_row(run) for run in found])}"


@campaign("scale", runs=1_000_000)
def scale(options: Options) -> str:
    """A million samples through two processes; kept in WORK, so that slices can be run."""
    log, value = options.work / "scale.jsonl", value_model(options.work)
    found = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = {run["samples"] for run in found}
    for count in (size for size in SIZES if size <= options.runs and size not in done):
        run = pipeline(count, value)
        found.append(run)
        with log.open("a") as f:
            f.write(json.dumps(run) + "\n")
        record("scale", stream_table(found))
    return stream_table(found)


def make_shards(directory: Path, count: int) -> None:
    """`count` shards of 4 samples with their statistics (without fsync: they are thrown away)."""
    directory.mkdir(parents=True, exist_ok=True)
    samples = tiny_samples(4 * count)
    real, os.fsync = os.fsync, lambda _: None
    try:
        for i in range(count):
            if not (directory / f"{i:05d}_stats.json").exists():
                write_shard(directory / f"{i:05d}.tar", list(itertools.islice(samples, 4)))
            else:
                list(itertools.islice(samples, 4))
    finally:
        os.fsync = real


@campaign("shards", runs=10_000)
def shards(options: Options) -> str:
    """Time a shard of `check`, of reading all samples, and of a rerun that finds all done."""
    rows = []
    for count in (n for n in SHARDS if n <= options.runs):
        directory = options.work / str(count)
        make_shards(directory, count)
        start = time.process_time()
        read = sum(1 for _ in open_source([str(directory)]).samples())
        reading = time.process_time() - start
        done = utilgen(["check", directory, "-q"])
        stage = utilgen(["pairs", directory, "-q"])  # unscored: found at the first sample
        assert read == 4 * count and done.code == 0 and stage.code == 65, done.said
        rows.append([f"{count:,}", f"{1e3 * reading / count:.3f}", f"{1e3 * done.cpu / count:.3f}",
                     f"{done.rss / 2**20:.0f}", f"{stage.cpu:.2f}"])  # fmt: skip
    head = ("shards", "ms a shard to read", "ms a shard to check", "check, most MB",
            "s until the first sample is looked at (pairs)")  # fmt: skip
    return f"Shards of 4 samples, with sums, in one directory; CPU times, start-up included.\n\n{table(head, rows)}"
