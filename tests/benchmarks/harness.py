"""A/B comparisons interleaved in one run: medians, spreads, ratios, peak memory, the machine."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import psutil
import torch

RESULTS = Path(__file__).parent / "RESULTS.md"


@dataclass
class Timing:
    """Seconds of each repeat, by the clock and of the processor (with the children's), the highest
    resident memory above the start, and what torch held on the GPU at its highest, above what it
    held at the start, the weights of all sides (MiB)."""

    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    mebibytes: float = 0.0
    gpu_mebibytes: float = 0.0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the range between the quartiles."""
        if len(self.seconds) < 3:
            return (max(self.seconds) - min(self.seconds)) / 2
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2


def interleaved(
    sides: dict[str, Callable[[], object]], repeats: int = 7, warm: int = 1
) -> dict[str, Timing]:
    """Run every side once a round, in an order that turns, so that drift hits all alike."""
    names = list(sides)
    timings = {name: Timing() for name in names}
    for round_ in range(repeats + warm):
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            gc.collect()
            held = 0
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
                held = torch.cuda.memory_allocated()  # by all sides
            with Peak() as peak:
                start, used = time.perf_counter(), sum(os.times()[:4])
                sides[name]()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                seconds, used = time.perf_counter() - start, sum(os.times()[:4]) - used
            if round_ >= warm:
                timings[name].seconds.append(seconds)
                timings[name].processor.append(used)
                timings[name].mebibytes = max(timings[name].mebibytes, peak.mebibytes)
                if torch.cuda.is_available():
                    above = (torch.cuda.max_memory_allocated() - held) / 2**20
                    timings[name].gpu_mebibytes = max(timings[name].gpu_mebibytes, above)
    return timings


class Peak:
    """The highest resident memory of this process and its children while it is entered."""

    def __enter__(self) -> Peak:
        self.process, self.stop = psutil.Process(), threading.Event()
        self.base = self.highest = self._resident()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()

    @property
    def mebibytes(self) -> float:
        return (self.highest - self.base) / 2**20

    def _resident(self) -> int:
        total = 0
        for process in [self.process, *self.process.children(recursive=True)]:
            try:
                total += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        return total

    def _watch(self) -> None:
        wait = 0.01
        while not self.stop.wait(wait):
            began = time.perf_counter()
            self.highest = max(self.highest, self._resident())
            spent = time.perf_counter() - began  # what is measured runs beside it
            wait = min(0.05, max(0.01, 50 * spent))


class GpuPeak(Peak):
    """The highest memory that is taken on the GPU by anybody: a process that was started cannot be
    asked."""

    def _resident(self) -> int:
        if not torch.cuda.is_available():
            return 0
        free, total = torch.cuda.mem_get_info()
        return total - free


def run(command: list[str], log: Path) -> tuple[float, float, float]:
    """(processor seconds, clock seconds, peak MiB) of a process that must succeed."""
    start = time.monotonic()
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{command} failed:\n{log.read_text()[-3000:]}")
    return usage.ru_utime + usage.ru_stime, time.monotonic() - start, usage.ru_maxrss / 1024


def machine() -> str:
    """What the figures were measured on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    cores = psutil.cpu_count()
    return f"{platform.machine()}, {cores} cores, {torch.get_num_threads()} threads, {gpu}, torch {torch.__version__}"  # fmt: skip


def table(timings: dict[str, Timing], baseline: str, unit: str = "s", scale: float = 1.0) -> str:
    """A Markdown table; ratios are a side's time over the baseline's, by the clock and by the
    processor: the second is the one to read where other programs share the machine."""
    head = ["side", f"median {unit}", "spread", f"ratio to {baseline}", "processor ratio",
            "peak memory, MiB"]  # fmt: skip
    with_gpu = any(t.gpu_mebibytes for t in timings.values())
    head += ["of the GPU above, MiB"] * with_gpu
    rows = [head, ["---"] * len(head)]
    base = timings[baseline]
    for name, t in timings.items():
        used = statistics.median(t.processor) / max(1e-9, statistics.median(base.processor))
        cells = [f"{t.median * scale:.3g}", f"{t.spread * scale:.2g}",
                 f"{t.median / base.median:.2f}", f"{used:.2f}", f"{t.mebibytes:.0f}"]  # fmt: skip
        rows.append([name, *cells, *[f"{t.gpu_mebibytes:.0f}"] * with_gpu])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def record(title: str, body: str) -> None:
    """Print a result and append it to RESULTS.md."""
    text = f"\n## {title}\n\n{date.today()}; {machine()}\n\n{body}\n"
    print(text)
    with RESULTS.open("a") as f:
        f.write(text)
