"""Plots as inline SVG whose colours are the page's CSS variables, so they follow light and dark."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..runtime.errors import printable
from .html import Markup, escape, tag

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, RULE = "#010101", "#020202", "#030303"  # stand-ins, replaced by CSS variables
SERIES = [f"#0a0a{i:02x}" for i in range(8)]
VARIABLES = {INK: "--ink", MUTED: "--muted", RULE: "--rule"} | {
    colour: f"--c{i}" for i, colour in enumerate(SERIES)
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.transparent": True,
    "svg.hashsalt": "utilgen",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.labelcolor": INK,
}


def svg(draw: Callable[[Axes], None], size: tuple[float, float], label: str) -> Markup:
    """Draw on one pair of axes; `size` in inches, `label` for those who cannot see it."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        drawn = inline(figure, FigureCanvasSVG, label)
    return tag("figure", drawn, style=f"max-width: {7.6 * size[0]:.1f}rem")


def inline(figure: Figure, canvas: Any, label: str) -> Markup:
    """The figure's <svg> element with CSS variables for colours and no fixed size."""
    out = io.StringIO()
    canvas(figure).print_svg(out, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    named = f'role="img" aria-label="{escape(label)}"'
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', rf"\1 {named}", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", text)
    for colour, variable in VARIABLES.items():  # in a style, not in a class of that name
        text = re.sub(rf'{colour}(?=[;"])', f"var({variable})", text)
    return Markup(unique_ids(text, label))


def unique_ids(text: str, label: str) -> str:
    """Ids that do not clash with those of another figure of the page."""
    prefix = "p" + hashlib.blake2b(label.encode(), digest_size=5).hexdigest()
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'href="#', f'href="#{prefix}-', text)
    return re.sub(r"url\(#", f"url(#{prefix}-", text)


def shown(name: str) -> str:
    """A name as text of a plot, without control characters. A legend leaves out what begins with
    an underscore: a space goes before it."""
    return " " * name.startswith("_") + printable(name)


def accuracy_plot(arms: Sequence[dict[str, Any]], colours: Sequence[int]) -> Markup:
    """Every seed as a faint dot, the mean as a full one, one standard deviation as a bar."""

    def draw(axes: Axes) -> None:
        for y, (arm, colour) in enumerate(zip(arms, colours, strict=True)):
            values = [100 * run["accuracy"] for run in arm["runs"]]
            mean, std = 100 * arm["accuracy"]["mean"], 100 * (arm["accuracy"]["std"] or 0)
            hue = SERIES[colour]
            axes.plot([mean - std, mean + std], [y, y], color=hue, lw=6, alpha=0.22,
                      solid_capstyle="round")  # fmt: skip
            axes.plot(values, [y] * len(values), "o", color=hue, ms=4, alpha=0.45, mew=0)
            axes.plot([mean], [y], "o", color=hue, ms=8, mew=0)
            axes.annotate(f"{mean:.1f}", (mean, y), (0, 9), textcoords="offset points",
                          ha="center", fontsize=9, color=INK)  # fmt: skip
        axes.set_yticks(range(len(arms)), [shown(arm["name"]) for arm in arms], color=INK)
        axes.set_ylim(len(arms) - 0.5, -0.6)
        axes.margins(x=0.08)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("test accuracy, %")

    return svg(draw, (8.4, 0.8 + 0.46 * len(arms)), f"Test accuracy of the arms {arms[0]['arch']}")


def per_class_plot(arms: Sequence[dict[str, Any]], colours: Sequence[int]) -> Markup:
    """A row a class, a dot an arm; filled where real and synthetic are joined."""
    names = [row["class"] for row in arms[0]["per_class"]]

    def draw(axes: Axes) -> None:
        for arm, colour in zip(arms, colours, strict=True):
            values = [
                None if row["mean"] is None else 100 * row["mean"] for row in arm["per_class"]
            ]
            known = [(v, y) for y, v in enumerate(values) if v is not None]
            axes.plot([v for v, _ in known], [y for _, y in known], marker(arm["kind"]),
                      color=SERIES[colour], ms=7, mew=1.6, label=shown(arm["name"]),
                      mfc=SERIES[colour] if arm["kind"] == "joint" else "none")  # fmt: skip
        axes.set_yticks(range(len(names)), [shown(name) for name in names], color=INK)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("test accuracy, %")
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), borderaxespad=0)

    return svg(draw, (8.4, 1.0 + 0.34 * len(names)), f"Accuracy of each class {arms[0]['arch']}")


def marker(kind: str) -> str:
    """Real: square, synthetic alone: diamond, joined: circle."""
    return {"real": "s", "alone": "D", "joint": "o"}[kind]


def curve_plot(
    x: Sequence[float], y: Sequence[float], x_label: str, y_label: str, label: str
) -> Markup:
    """One line."""

    def draw(axes: Axes) -> None:
        axes.plot(x, y, color=SERIES[1], lw=2.2)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.margins(x=0.02)

    return svg(draw, (6.2, 2.9), label)


def volume_plot(arms: Sequence[dict[str, Any]], colours: dict[str, int]) -> Markup:
    """Mean accuracy against synthetic volume, a line a set; joined sets are solid."""
    lines: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for arm in arms:
        if arm["times"] is not None:
            lines.setdefault((arm["synthetic"], arm["kind"]), []).append(arm)

    def draw(axes: Axes) -> None:
        for (name, kind), own in lines.items():
            hue = SERIES[colours[name]]
            axes.errorbar([a["times"] for a in own], [100 * a["accuracy"]["mean"] for a in own],
                          [100 * (a["accuracy"]["std"] or 0) for a in own], color=hue, marker="o",
                          lw=2, elinewidth=1, ls="-" if kind == "joint" else "--",
                          label=shown(name) + ", with real" * (kind == "joint"))  # fmt: skip
        for arm in (a for a in arms if a["kind"] == "real"):
            axes.axhline(100 * arm["accuracy"]["mean"], color=SERIES[0], lw=1.2, label="real only")
        axes.set_xlabel("synthetic images per real image")
        axes.set_ylabel("test accuracy, %")
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), borderaxespad=0)

    return svg(draw, (8.4, 3.4), f"Accuracy against volume {arms[0]['arch']}")


def scatter_plot(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]], colours: Mapping[str, int]
) -> Markup:
    """Utility against influence, a dot a sample, a colour a set."""

    def draw(axes: Axes) -> None:
        axes.axhline(0, color=MUTED, lw=0.8)
        reach = typical_reach([v for _, y in series.values() for v in y])
        for name, (x, y) in series.items():
            axes.plot(x, y, "o", ms=3, mew=0, alpha=0.45, color=SERIES[colours[name]],
                      label=shown(name))  # fmt: skip
        axes.set_xlabel("utility, as scored")
        axes.set_ylabel("influence on validation")
        axes.set_ylim(-reach, reach)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), borderaxespad=0, markerscale=2)

    return svg(draw, (7.4, 3.2), "Utility against influence")


def typical_reach(values: Sequence[float]) -> float:
    """The size that 95 % of the values stay under: a few outliers must not flatten a plot."""
    sizes = sorted(abs(v) for v in values)
    return 1.05 * sizes[int(0.95 * (len(sizes) - 1))] or 1.0
