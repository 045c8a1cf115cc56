"""The report page and the table: every figure where it belongs, and nothing from outside."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from utilgen_cli.classification.comparison import Comparison, Inputs, Protocol, compare_arms
from utilgen_cli.classification.train import TrainConfig
from utilgen_cli.report import figures as fig
from utilgen_cli.report.evaluation import write_report
from utilgen_cli.report.plots import curve_plot, scatter_plot, shown
from utilgen_cli.report.table import render

from .classification_toys import colour_images, shards_of
from .test_report_sheets import HOSTILE, Page

VALUE = {
    "canary": {"auroc": 0.8123},
    "weight_curve": {"loss": [0.0, 1.0, 2.0], "weight": [0.9, 0.5, 0.1]},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    root = tmp_path_factory.mktemp("sets")
    sets = {}
    for name in ("before", "after"):
        data = colour_images(8, seed=3)
        data.images = data.images.flip(-1) if name == "after" else data.images
        sets[name] = shards_of(root / name, data, [i / 24 for i in range(24)])
    return Inputs(
        shards_of(root / "real", colour_images(4)), sets,
        shards_of(root / "test", colour_images(10, seed=8)),
        shards_of(root / "val", colour_images(6, seed=5)),
    )  # fmt: skip


@pytest.fixture(scope="module")
def found(inputs: Inputs) -> Comparison:
    protocol = Protocol(
        TrainConfig(steps=4, batch_size=8), seeds=2, image_size=16, times=(1, 2), price_per_hour=2
    )
    return compare_arms(inputs, protocol)


@pytest.fixture(scope="module")
def text(inputs: Inputs, found: Comparison, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    assert write_report(path, found, dict(inputs.synthetic), VALUE) == path
    return path.read_text()


def test_the_page_is_whole_and_self_contained(text: str) -> None:
    parsed = Page(text)
    outside = [s for s in parsed.loaded if not s.startswith(("data:", "#"))]
    assert outside == []
    assert not re.search(r"url\((?!#)", text)
    assert "script" not in parsed.seen
    assert parsed.seen.count("svg") == 5  # arms, classes, volume, utility, weight
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    for target in re.findall(r'href="#([^"]+)"', text):
        assert target in ids


def test_the_page_has_every_part(text: str, found: Comparison) -> None:
    titles = re.findall(r"<h2>(.*?)</h2>", text)
    assert titles == [
        "Result", "Classes", "Accuracy against volume", "Why", "The learned weight function",
        "Utility in before", "Utility in after", "Before and after", "Cost", "Leak check", "Protocol",
    ]  # fmt: skip
    for arm in found.summary["arms"]:
        assert fig.mean_std(arm["accuracy"]) in text
    assert found.summary["data"]["test"]["sha256"] in text
    assert "AUROC 0.812" in text


def test_plots_take_their_colours_from_the_page(text: str) -> None:
    for drawing in re.findall(r"<svg.*?</svg>", text, flags=re.S):
        colours = set(re.findall(r"#[0-9a-f]{6}", drawing)) - {"#000000", "#ffffff"}
        assert colours == set()
        assert "var(--c" in drawing


def test_names_of_sets_and_classes_cannot_become_markup(inputs: Inputs, tmp_path: Path) -> None:
    hostile = Inputs(
        inputs.real, {HOSTILE: inputs.synthetic["before"]}, inputs.test, inputs.validation
    )
    found = compare_arms(
        hostile, Protocol(TrainConfig(steps=1, batch_size=4), seeds=1, image_size=16)
    )
    found.summary["arms"][0]["per_class"][0]["class"] = HOSTILE
    text = write_report(tmp_path / "r.html", found, dict(hostile.synthetic)).read_text()
    assert "script" not in Page(text).seen


def test_real_images_alone_make_a_page_too(inputs: Inputs, tmp_path: Path) -> None:
    protocol = Protocol(
        TrainConfig(steps=1, batch_size=4), ("small-cnn", "test_resnet"), seeds=1, image_size=16
    )
    found = compare_arms(Inputs(inputs.real, {}, inputs.test), protocol)
    text = write_report(tmp_path / "r.html", found, {}).read_text()
    assert Page(text).seen.count("svg") == 3  # one plot an architecture, and the classes
    assert "test_resnet" in text
    assert len(re.findall(r'\bid="', text)) == len(set(re.findall(r'\bid="[^"]+"', text)))


def test_a_directory_gets_the_page_and_its_figures(
    inputs: Inputs, found: Comparison, tmp_path: Path
) -> None:
    import json

    assert write_report(tmp_path / "out", found, dict(inputs.synthetic)).name == "report.html"
    assert json.loads((tmp_path / "out" / "eval.json").read_text()) == found.summary


def test_the_same_result_gives_the_same_page(
    inputs: Inputs, found: Comparison, tmp_path: Path, text: str
) -> None:
    again = write_report(tmp_path / "r.html", found, dict(inputs.synthetic), VALUE)
    assert again.read_text() == text


def test_the_table_has_a_row_an_arm_and_no_colour_in_a_pipe(found: Comparison) -> None:
    text = render(found.summary)
    assert "\x1b" not in text
    rows = {line.strip().split("  ")[0].strip(): line for line in text.splitlines() if line.strip()}
    for arm in found.summary["arms"]:
        assert fig.mean_std(arm["accuracy"]) in rows[arm["name"]]
    assert "no test image was found" in text
    assert (
        "price" in text and fig.money(found.summary["synthetic"]["after"]["cost"]["price"]) in text
    )
    shape = found.summary["synthetic"]["after"]["distribution"]
    assert f"features of {shape['extractor']}: 24 images of each set beside 18;" in text
    assert f"{shape['diversity']:.2f}" in rows["after"].split()
    assert "\x1b" in render(found.summary, terminal=True)


def test_figures_are_written_as_people_write_them() -> None:
    d: dict[str, Any] = {"mean": 0.0131, "low": -0.002, "high": 0.03, "p": 0.0342}
    assert fig.difference({"difference": d}) == "+1.3 [−0.2, +3.0]"
    assert fig.p_value({"difference": d}) == ".034"
    assert fig.p_value({"difference": {**d, "p": 1e-5}}) == "<.001"
    assert fig.mean_std({"mean": 0.7312, "std": 0.0081}) == "73.1 ± 0.8"
    assert [fig.duration(s) for s in (0.085, 42, 600, 9000)] == ["85 ms", "42 s", "10 min", "2.5 h"]


def test_names_in_plots_are_all_shown_and_printable() -> None:
    """matplotlib's legend leaves out what begins with an underscore; a name is no colour."""
    assert [shown(name) for name in ("_s", "a", "b\x1b[31m")] == [" _s", "a", "b\\x1b[31m"]
    series = {"_s": ([0.1, 0.2], [0.0, 1.0]), "#0a0a01": ([0.3], [0.5])}
    drawing = scatter_plot(series, {"_s": 1, "#0a0a01": 2})
    assert "_s" in drawing and "#0a0a01" in drawing


def test_a_curve_is_drawn_where_its_points_are() -> None:
    drawing = curve_plot([0, 1, 2], [0.0, 0.5, 1.0], "loss", "weight", "Curve")
    [path] = re.findall(r'<path d="(M[^"]*)" clip-path[^>]*var\(--c1\)', drawing)
    points = [tuple(map(float, p)) for p in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path)]
    (x0, y0), (x2, y2) = points[0], points[-1]
    assert x2 > x0
    assert y2 < y0  # SVG's y points down
