"""The figures of README.md: `python plots.py DIR [--out .]` draws what the studies left in DIR.

arms.svg: every arm of ablation.sh, alone and with real images; longer.svg: those trained four times
as long; volume.svg: accuracy against the number of generated images; shots.svg: against that of
labelled ones. Dots are seeds, bars 95 % intervals of the mean over the seeds (Student's t).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from table import Row, half_width, read_seed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Seeds = Sequence[dict[str, Row]]
PANELS = {"alone": "generated images only", "joint": "with real images"}
NAMES = {
    "base": "class prompts", "tokens": "a token a class", "lora": "DataDream (LoRA)",
    "gap-held": "GAP", "filter": "filtering", "round-1": "LoRA, a round of DPO",
    "inverted": "inverted prompts", "prompt": "+ prompt", "prompt-noise": "+ prompt, + noise",
    "full": "full", "further-real": "as many real images", "real": "real only",
}  # fmt: skip
HUES = {"base": "#b04a3a", "lora": "#c08a1e", "prompt": "#2f6f9f", "full": "#2f6f9f"}
REAL = "#444444"


def seeds_of(study: Path, part: str) -> list[dict[str, Row]]:
    """The rows of every seed that has finished the part."""
    return [read_seed(found.parent) for found in sorted(study.glob(f"seed-*/{part}/eval.json"))]


def accuracies(seeds: Seeds, arm: str, column: str) -> list[float]:
    """Of one arm, a seed each, in percent."""
    return [seed[arm][column] for seed in seeds if column in seed.get(arm, {})]


def draw_arms(panel: Axes, seeds: Seeds, column: str) -> None:
    """A row an arm; the line is the mean of real only."""
    rows = [(arm, found) for arm in seeds[0] if (found := accuracies(seeds, arm, column))]
    rows = [row for row in rows if row[0] != "real"]
    for y, (arm, found) in enumerate(rows):
        hue = REAL if arm == "further-real" else HUES["full"]
        panel.plot(found, [y] * len(found), "o", color=hue, alpha=0.35, ms=4, mew=0)
        panel.errorbar(fmean(found), y, xerr=half_width(found), color=hue, marker="o", ms=6, lw=1.2)
    panel.axvline(fmean(accuracies(seeds, "real", "joint")), color=REAL, lw=1, ls=":")
    panel.set_yticks(range(len(rows)), [NAMES.get(arm, arm) for arm, _ in rows])
    panel.set_ylim(len(rows) - 0.5, -0.5)


def draw_lines(panel: Axes, at: dict[float, Seeds], arms: dict[str, str], column: str) -> None:
    """A line an arm over the values of `at`; `arms` maps its name to a pattern with {x:g}."""
    for arm, pattern in arms.items():
        points = {x: accuracies(seeds, pattern.format(x=x), column) for x, seeds in at.items()}
        points = {x: found for x, found in points.items() if found}
        means, halves = ([f(found) for found in points.values()] for f in (fmean, half_width))
        panel.errorbar(list(points), means, halves, color=HUES.get(arm, REAL), marker="o", ms=4,
                       lw=1.6, elinewidth=1, label=NAMES[arm])  # fmt: skip
    real = {x: accuracies(seeds, "real", "joint") for x, seeds in at.items()}
    panel.plot(list(real), [fmean(found) for found in real.values()], color=REAL, ls=":",
               marker="s", ms=4, label=NAMES["real"])  # fmt: skip
    panel.set_xscale("log", base=2)
    panel.set_xticks(list(at), [f"{x:g}" for x in at], minor=False)
    panel.grid(alpha=0.3)


def figure(width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Two panels side by side: generated images only, and with real ones."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "utilgen"
    drawn = Figure(figsize=(width, height), layout="constrained")
    panels = list(drawn.subplots(1, 2))
    for panel, title in zip(panels, PANELS.values(), strict=True):
        panel.set_title(title, fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    return drawn, panels


def save(drawn: Figure, path: Path) -> None:
    drawn.savefig(path, metadata={"Date": None})
    print(path)


def rows(seeds: Seeds, path: Path) -> None:
    """The arms of one table."""
    drawn, panels = figure(9, 0.8 + 0.3 * len(seeds[0]))
    for panel, column in zip(panels, PANELS, strict=True):
        draw_arms(panel, seeds, column)
        panel.set_xlabel("test accuracy, %")
    panels[1].set_yticklabels([])
    save(drawn, path)


def lines(at: dict[float, Seeds], arms: dict[str, str], label: str, path: Path) -> None:
    """One of the two line plots."""
    drawn, panels = figure(9, 3.4)
    for panel, column in zip(panels, PANELS, strict=True):
        draw_lines(panel, at, arms, column)
        panel.set_xlabel(label)
    panels[0].set_ylabel("test accuracy, %")
    panels[0].legend(frameon=False, loc="lower right")
    save(drawn, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path)
    parser.add_argument("--out", type=Path, default=Path())
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    table = seeds_of(args.study, "ablation")
    if not table:
        parser.error(f"no finished seed of ablation in {args.study}: run ablation.sh first")
    rows(table, args.out / "arms.svg")
    if longer := seeds_of(args.study, "longer"):
        rows(longer, args.out / "longer.svg")

    if volumes := seeds_of(args.study, "volume"):
        counts = sorted({float(arm.rpartition(" x")[2]) for arm in volumes[0] if " x" in arm})
        at: dict[float, Seeds] = dict.fromkeys(counts, volumes)
        arms = {arm: f"{arm} x{{x:g}}" for arm in ("base", "full")}
        lines(at, arms, "generated images a labelled one", args.out / "volume.svg")

    parts = {path.parents[1].name for path in args.study.glob("seed-*/shots-*/few/eval.json")}
    few = {float(p.removeprefix("shots-")): seeds_of(args.study, f"{p}/few") for p in parts}
    if few:
        at = dict(sorted(few.items())) | {16.0: table}
        arms = {arm: arm for arm in ("base", "lora", "prompt")}
        lines(at, arms, "labelled images a class", args.out / "shots.svg")


if __name__ == "__main__":
    main()
