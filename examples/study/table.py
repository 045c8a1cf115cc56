"""One table over the seeds of a study: mean and standard deviation, and paired differences.

`python table.py DIR --part model-level --baseline base` reads DIR/seed-*/model-level/eval.json and
fidelity.jsonl beside it, if it is there. Differences from the baseline (of the architecture) are
paired by seed: mean, 95 % interval and p by Student's t.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from scipy import stats

Row = dict[str, float]  # what one arm came to under one seed, in percent where it is a share
COLUMNS = {
    "fidelity": "label fidelity",
    "influence": "helpful",
    "coverage": "coverage",
    "diversity": "diversity",
    "fid": "FID",
    "alone": "synthetic only",
    "joint": "with real",
    "calls": "U-Net calls an image",
    "seconds": "s an image",
}


def read_seed(directory: Path) -> dict[str, Row]:
    """Every arm of a seed, of every volume and architecture; `real` has an accuracy with real."""
    found = json.loads((directory / "eval.json").read_text())
    rows: dict[str, Row] = {}
    several = len({arm.get("arch") for arm in found["arms"]}) > 1
    for arm in found["arms"]:  # a set at several volumes is several rows
        name = arm["name"].removeprefix("real + ") + (f", {arm['arch']}" if several else "")
        column = "alone" if arm["kind"] == "alone" else "joint"
        rows.setdefault(name, {})[column] = 100 * arm["accuracy"]["mean"]
    for name, facts in found["synthetic"].items():
        if name in rows:
            rows[name] |= describe(facts) | cost(facts, directory.parent / f"{name}.json")
    fidelity = directory / "fidelity.jsonl"
    for line in fidelity.read_text().splitlines() if fidelity.exists() else []:
        judged = json.loads(line)
        rows[judged["shards"]]["fidelity"] = 100 * judged["fidelity"]
    return rows


def describe(facts: dict[str, Any]) -> Row:
    """Share with positive influence, coverage, diversity, FID (in the probe's features)."""
    shape = facts["distribution"]
    return {
        "influence": 100 * facts["influence"]["share"],
        "coverage": 100 * shape["coverage"],
        "diversity": shape["diversity"],
        "fid": shape["fid"],
    }


def cost(facts: dict[str, Any], summary: Path) -> Row:
    """Seconds an image over all stages, and of `ilpo` the U-Net's calls, learning included."""
    spent = facts["cost"]
    row = {"seconds": spent["seconds"] / spent["images"]}
    if summary.exists():
        told = json.loads(summary.read_text().splitlines()[-1])
        calls = told["unet_latents"] + told["sampling_unet_latents"]
        row["calls"] = calls / told["samples"]
    return row


def cell(values: Sequence[float]) -> str:
    """`mean +- standard deviation`."""
    if not values:
        return ""
    digits = 2 if max(map(abs, values)) < 10 else 1
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def half_width(values: Sequence[float]) -> float:
    """Of the 95 % interval of the mean, by Student's t; 0 for one value."""
    n = len(values)
    return stats.t.ppf(0.975, n - 1) * statistics.stdev(values) / n**0.5 if n > 1 else 0.0


def difference(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Paired by seed: mean, 95 % interval, p."""
    gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean = statistics.fmean(gaps)
    if len(gaps) < 2 or statistics.stdev(gaps) == 0:
        return f"{mean:+.1f}"
    half, p = half_width(gaps), stats.ttest_rel(ours, theirs).pvalue
    told = f"p {p:.3f}" if p >= 0.001 else "p < 0.001"
    return f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}], {told}"


def table(seeds: Sequence[dict[str, Row]], baseline: str) -> Iterable[str]:
    """Markdown, line by line."""
    compared = (("influence", baseline), ("alone", baseline), ("joint", "real"))
    heads = ["arm", *COLUMNS.values(), *(f"{COLUMNS[c]}, from {name}" for c, name in compared)]
    yield "| " + " | ".join(heads) + " |"
    yield "|---" * len(heads) + "|"

    def values(arm: str, column: str) -> list[float]:
        return [seed[arm][column] for seed in seeds if column in seed[arm]]

    for arm in seeds[0]:
        cells = [arm, *(cell(values(arm, column)) for column in COLUMNS)]
        _, comma, arch = arm.partition(", ")
        for column, name in compared:
            ours, theirs = values(arm, column), values(other := name + comma + arch, column)
            cells.append(difference(ours, theirs) if ours and theirs and arm != other else "")
        yield "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path)
    parser.add_argument("--part", required=True, help="directory of the results inside a seed's")
    parser.add_argument("--baseline", default="base", help="arm that the others are compared with")
    args = parser.parse_args()
    found = sorted(args.study.glob(f"seed-*/{args.part}/eval.json"))
    if not found:
        parser.error(f"no finished seed of {args.part} in {args.study}: run the study first")
    seeds = [read_seed(path.parent) for path in found]
    print(f"{len(seeds)} seeds\n")
    print("\n".join(table(seeds, args.baseline)))


if __name__ == "__main__":
    main()
