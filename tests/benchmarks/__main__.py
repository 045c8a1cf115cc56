"""`python -m tests.benchmarks NAME... [options]`: run benchmarks and append to RESULTS.md.

Options follow the name of one benchmark that takes any (`valuation --help`).
"""

from __future__ import annotations

import importlib
import sys
from itertools import takewhile
from pathlib import Path

ASIDE = ("__init__", "__main__", "harness", "store")
HERE = Path(__file__).parent
NAMES = sorted(
    p.stem for p in [*HERE.glob("*.py"), *(p.parent for p in HERE.glob("*/__init__.py"))]
    if p.stem not in ASIDE
)  # fmt: skip


def main() -> None:
    names = list(takewhile(lambda word: not word.startswith("-"), sys.argv[1:]))
    options = sys.argv[1 + len(names) :]
    if not names or set(names) - set(NAMES) or (options and len(names) > 1):
        sys.exit(f"usage: python -m tests.benchmarks NAME... [options]   ({', '.join(NAMES)})")
    for name in names:
        found = importlib.import_module(f"tests.benchmarks.{name}").main
        found(options) if options else found()


if __name__ == "__main__":
    main()
