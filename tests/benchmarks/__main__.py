"""`python -m tests.benchmarks NAME...`: run benchmarks and append to RESULTS.md."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

NAMES = sorted(
    p.stem for p in Path(__file__).parent.glob("*.py") if p.stem not in ("__init__", "__main__", "harness")
)  # fmt: skip


def main() -> None:
    if len(sys.argv) < 2 or set(sys.argv[1:]) - set(NAMES):
        sys.exit(f"usage: python -m tests.benchmarks NAME...   ({', '.join(NAMES)})")
    for name in sys.argv[1:]:
        importlib.import_module(f"tests.benchmarks.{name}").main()


if __name__ == "__main__":
    main()
