"""From single runs to the rows of the table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from .evaluation import Run
from .metrics import holm, mean_std, paired_difference

Result = tuple[Run, dict[str, Any]]


def summarise(found: Iterable[Result], classes: Sequence[str], baseline: str) -> dict[str, Any]:
    """`classes` and `arms`: one row an arm and architecture, in the order of the runs."""
    rows: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for run, result in found:
        rows[run.arch, run.arm.name].append((run, result))
    ordered = sorted(rows, key=lambda row: row[0] != next(iter(rows))[0])  # first arch first
    arms = [_row(rows[key], rows[key[0], baseline], classes, baseline) for key in ordered]
    compared = [arm["difference"] for arm in arms if "difference" in arm]
    for difference, p in zip(compared, holm([d["p"] for d in compared]), strict=True):
        difference["p_holm"] = p
    return {"classes": list(classes), "arms": arms}


def _row(
    own: Sequence[Result], reference: Sequence[Result], classes: Sequence[str], baseline: str
) -> dict[str, Any]:
    run, arm = own[0][0], own[0][0].arm
    accuracy = {r.seed: result["accuracy"] for r, result in own}
    base = {r.seed: result["accuracy"] for r, result in reference}
    row: dict[str, Any] = {
        "name": arm.name,
        "kind": arm.kind,
        "arch": run.arch,
        "synthetic": arm.synthetic,
        "times": arm.times,
        "n_real": arm.n_real,
        "n_synthetic": arm.n_synthetic,
        "accuracy": mean_std(list(accuracy.values())),
        "per_class": _per_class([result for _, result in own], classes),
        "worst_class": mean_std([result["worst_class"] for _, result in own]),
        "ece": mean_std([result["ece"] for _, result in own]),
        "nll": mean_std([result["nll"] for _, result in own]),
        "train_seconds": mean_std([result["seconds"] for _, result in own]),
        "runs": [{"seed": r.seed, **result} for r, result in own],
    }
    if arm.name != baseline:
        pairs = sorted(accuracy.keys() & base.keys())
        row["difference"] = {
            "baseline": baseline,
            **paired_difference([accuracy[s] for s in pairs], [base[s] for s in pairs]),
        }
    return row


def _per_class(results: Sequence[dict[str, Any]], classes: Sequence[str]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for label, name in enumerate(classes):
        values = [r["per_class"][label] for r in results if r["per_class"][label] is not None]
        row: dict[str, Any] = {"class": name, "mean": None, "std": None}
        rows.append(row | mean_std(values) if values else row)
    return rows
