"""What each command imports on its way to its first image or step, by package (-X importtime)."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from ..faults.runs import CASES, QUIET, Runs
from .harness import record

HEAVY = ("torch", "torchvision", "diffusers", "transformers", "peft", "open_clip", "timm",
         "torchmetrics", "scipy", "numpy", "PIL", "safetensors", "utilgen_cli")  # fmt: skip
SHOWN = 0.005  # seconds below which a package is not shown


def import_seconds(words: list[str]) -> Counter[str]:
    """Seconds that `utilgen WORDS` spends in the modules of each package, on its way through."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "utilgen_cli", *words], check=True,
        capture_output=True, text=True, stdin=subprocess.DEVNULL, env={**os.environ, **QUIET},
    )  # fmt: skip
    found: Counter[str] = Counter()
    for line in done.stderr.splitlines():
        if line.startswith("import time:") and "self [us]" not in line:
            own, _, module = line.removeprefix("import time:").split("|")
            found[module.strip().partition(".")[0]] += int(own) * 1e-6
    return found


def main() -> None:
    """One row a command; a dot: never imported."""
    with tempfile.TemporaryDirectory() as name:
        runs = Runs(Path(name).resolve())
        rows = [f"| command | all, s | {' | '.join(HEAVY)} |", "|---" * (len(HEAVY) + 2) + "|"]
        for command in ("--help", *CASES):
            if command in CASES:
                runs.ready(command)
            words = runs.words(command, runs.fresh(command)) if command in CASES else [command]
            found = import_seconds(words)
            cells = [f"{found[p]:.2f}" if found[p] > SHOWN else "." for p in HEAVY]
            rows.append(f"| {command} | {sum(found.values()):.2f} | {' | '.join(cells)} |")
    record("Seconds of import, by package", "\n".join(rows))


if __name__ == "__main__":
    main()
