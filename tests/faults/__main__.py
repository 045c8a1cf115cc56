"""Fault campaigns: hurt runs, data and disks in every way, and count what survives.

    python -m tests.faults NAME [--runs N] [--seed S] [--work DIR] [--only PART ...]

Every module of this package may register campaigns (registry.campaign). The section that a
campaign returns replaces its section in RESULTS.md; `--dry` prints it only.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import tempfile
from pathlib import Path

from . import __path__ as places
from .registry import CAMPAIGNS, DRY, Options, record


def main() -> None:
    for module in pkgutil.iter_modules(places):
        if module.name != "__main__":
            importlib.import_module(f"{__package__}.{module.name}")
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("name", choices=sorted(CAMPAIGNS))
    parser.add_argument("--runs", type=int, help="how often (default: the campaign's own)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="scratch directory, kept between calls")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--dry", action="store_true", help="leave RESULTS.md alone")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    run, runs = CAMPAIGNS[args.name]
    work = args.work or Path(tempfile.gettempdir()) / f"utilgen-faults-{args.name}"
    work.mkdir(parents=True, exist_ok=True)
    if args.dry:  # campaigns write down what they have as they go
        os.environ[DRY] = "1"
    section = run(Options(work, args.runs or runs, args.seed, args.only))
    print(section)
    record(args.name, section)


if __name__ == "__main__":
    main()
