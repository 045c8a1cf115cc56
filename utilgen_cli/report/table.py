"""The result of `utilgen eval` as text, through Rich."""

from __future__ import annotations

import io
from typing import Any

from ..runtime.errors import printable
from .figures import (
    comparisons_line,
    difference,
    duration,
    images,
    leak_lines,
    mean_std,
    money,
    null_share,
    p_value,
    percent,
    protocol_line,
    share,
)

WIDTH = 126  # columns where the output is no terminal


def render(summary: dict[str, Any], terminal: bool = False) -> str:
    """The tables and notes as one text, coloured and fitted for a terminal if it is one."""
    from rich.console import Console
    from rich.text import Text

    out = io.StringIO()
    width = None if terminal else WIDTH
    console = Console(file=out, force_terminal=terminal, width=width, highlight=False)
    console.print(arm_table(summary))
    console.print(Text(protocol_line(summary), style="dim"), soft_wrap=True)
    if line := comparisons_line(summary):
        console.print(Text(line, style="dim"), soft_wrap=True)
    if summary["synthetic"]:
        console.print()
        console.print(synthetic_table(summary))
        for line in feature_lines(summary):
            console.print(Text(line, style="dim"), soft_wrap=True)
    for line in leak_lines(summary) or ["no test image was found in any other set"]:
        console.print(Text(f"leak check: {printable(line)}"), soft_wrap=True)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def arm_table(summary: dict[str, Any]) -> Any:
    """A row an arm and architecture."""
    several = len(summary["protocol"]["archs"]) > 1
    baseline = summary["protocol"]["baseline"]
    columns = ["arm", "images", "accuracy", f"against {baseline}", "p", "worst class", "ECE"]
    rows = [
        [a["name"], images(a), mean_std(a["accuracy"]), difference(a), p_value(a),
         mean_std(a["worst_class"]), percent(a["ece"]["mean"])]
        for a in summary["arms"]
    ]  # fmt: skip
    if several:
        columns.insert(0, "architecture")
        rows = [[a["arch"], *row] for a, row in zip(summary["arms"], rows, strict=True)]
    return rich_table(columns, rows, texts=2 if several else 1, title="Test accuracy, %")


def synthetic_table(summary: dict[str, Any]) -> Any:
    """A row a synthetic set: why it helps, and what it cost."""
    priced = summary["protocol"]["price_per_hour"] is not None
    columns = ["set", "helpful, %", "null, %", "agree, %", "prec.", "recall", "dens.",
               "cover.", "div.", "KID", "FID", "time", *["price"] * priced]  # fmt: skip
    rows = []
    for name, s in summary["synthetic"].items():
        d = s.get("distribution")
        figures = ["–"] * 7 if d is None else [
            *(f"{d[k]:.2f}" for k in ("precision", "recall", "density", "coverage")),
            "–" if d["diversity"] is None else f"{d['diversity']:.2f}",
            f"{d['kid']['mean']:.3f}", f"{d['fid']:.1f}",
        ]  # fmt: skip
        influence = s.get("influence")
        rows.append([name, share(influence), null_share(influence), percent(s.get("agreement")),
                     *figures, duration(s["cost"]["seconds"]),
                     *[money(s["cost"]["price"])] * priced])  # fmt: skip
    return rich_table(
        columns,
        rows,
        title="Synthetic sets beside the validation images "
        "(helpful: positive influence; null: labels shuffled)",
    )


def feature_lines(summary: dict[str, Any]) -> list[str]:
    """Whose features the figures are of, and of how many images: one line, or none."""
    found = [d for s in summary["synthetic"].values() if (d := s.get("distribution"))]
    if not found:
        return []
    return [
        f"precision to FID in the features of {found[0]['extractor']}: {found[0]['n_synthetic']:,} "
        f"images of each set beside {found[0]['n_real']:,}; to compare sets with, not papers; "
        "div.: diversity over real"
    ]


def rich_table(columns: list[str], rows: list[list[str]], title: str, texts: int = 1) -> Any:
    """A plain Rich table; the first `texts` columns are names, the others figures."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD,
                  pad_edge=False, header_style="dim")  # fmt: skip
    for i, column in enumerate(columns):
        table.add_column(Text(printable(column)), justify="left" if i < texts else "right")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table
