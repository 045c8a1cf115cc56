"""Valuation beside pyDVL, cleanlab and dattri: `python -m tests.benchmarks valuation [options]`.

The peers run in an environment of their own (see peers.py), named by `--peers PYTHON` or
UTILGEN_PEERS; without it our sides alone run. Results are kept in `--store`, so that a run that was
stopped, or ended by `--limit`, goes on (remove them after a change of the code); the table is
appended to RESULTS.md when all seeds are done.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ..harness import record
from ..store import Enough, Store
from .generated import generated_table
from .lds import lds_table
from .noise import noise_table, removal_table
from .pools import pool_table
from .sides import PEERS

PARTS = {
    "noise": noise_table,
    "removal": removal_table,
    "lds": lds_table,
    "pool": pool_table,
    "generated": generated_table,
}
TITLES = {
    "noise": "finding wrong labels among 2,000 images, AUROC",
    "removal": "accuracy after dropping the lowest of 2,000 images with 20 % wrong labels, %",
    "lds": "linear datamodeling score on minus test loss, 100 halves of 500 images x 2 retrains",
    "pool": "ranking 25 pools of unseen candidates by their true gain",
    "generated": "wrong labels among generated images, AUROC, 16 + 16 shots a class",
}


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser("python -m tests.benchmarks valuation", description=__doc__)
    parser.add_argument("--part", choices=PARTS, action="append", help="default: all")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--peers", help="the Python of the peers' environment")
    parser.add_argument("--store", type=Path, default=Path("build/valuation"))
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds of work")
    options = parser.parse_args(list(arguments))
    torch.set_num_threads(1)
    if options.peers:
        os.environ[PEERS] = options.peers
    stores = {name: Store(options.store, name, options.limit) for name in PARTS}
    for name in options.part or PARTS:
        try:
            body = PARTS[name](stores, options.seeds)
        except Enough as reason:
            sys.exit(f"not finished: {reason}")
        command = f"`python -m tests.benchmarks valuation --part {name} --seeds {options.seeds}`"
        record(f"Valuation: {TITLES[name]}", f"{command}; mean ± standard deviation\n\n{body}")
