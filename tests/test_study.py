"""The table and the plots of the studies, against numbers worked out by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TABLE = Path(__file__).parents[1] / "examples" / "study" / "table.py"


def arm(name: str | None, kind: str, accuracy: float) -> dict[str, object]:
    return {"name": name or "real", "kind": kind, "synthetic": name, "accuracy": {"mean": accuracy}}


def write_seed(directory: Path, base: float, tuned: float) -> None:
    shape = {"coverage": 0.5, "diversity": 1.25, "fid": 20.0}
    facts = {
        "influence": {"share": 0.6},
        "distribution": shape,
        "cost": {"seconds": 40.0, "images": 80},
    }
    arms = [arm(None, "real", 0.75)]
    for name, accuracy in (("base", base), ("tuned", tuned)):
        arms += [arm(name, "alone", accuracy), arm(name, "joint", accuracy + 0.05)]
    directory.mkdir(parents=True)
    found = {"arms": arms, "synthetic": {"base": facts, "tuned": facts}}
    (directory / "eval.json").write_text(json.dumps(found))
    lines = [json.dumps({"shards": name, "fidelity": 0.8}) for name in ("base", "tuned")]
    (directory / "fidelity.jsonl").write_text("\n".join(lines))
    told = {"unet_latents": 100, "sampling_unet_latents": 1600, "samples": 80}
    (directory.parent / "tuned.json").write_text("a warning\n" + json.dumps(told) + "\n")


def run_table(study: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TABLE), str(study), "--part", "part", *options]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    tmp_path = tmp_path_factory.mktemp("study")
    for seed, (base, tuned) in enumerate([(0.60, 0.63), (0.62, 0.64), (0.61, 0.65)]):
        write_seed(tmp_path / f"seed-{seed}" / "part", base, tuned)
    lines = run_table(tmp_path).stdout.splitlines()
    assert lines[0] == "3 seeds"
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines[2:]]
    assert [row[0] for row in cells] == ["arm", "---", "real", "base", "tuned"]
    return {name: [row[i] for row in cells] for i, name in enumerate(cells[0])}


def test_mean_and_standard_deviation_over_the_seeds(rows: dict[str, list[str]]) -> None:
    assert rows["synthetic only"][3:] == ["61.0 ± 1.0", "64.0 ± 1.0"]
    assert rows["with real"][2:] == ["75.0 ± 0.0", "66.0 ± 1.0", "69.0 ± 1.0"]
    assert rows["label fidelity"][4] == "80.0 ± 0.0"
    assert rows["U-Net calls an image"][3:] == ["", "21.2 ± 0.0"]
    assert rows["s an image"][4] == "0.50 ± 0.00"


def test_differences_are_paired_by_seed(rows: dict[str, list[str]]) -> None:
    # Gaps 3, 2, 4: mean 3, sd 1; t(.975, 2) = 4.303; t = 3 sqrt(3) = 5.196, p = .0351.
    assert rows["synthetic only, from base"][4] == "+3.0 [+0.5, +5.5], p 0.035"
    assert rows["synthetic only, from base"][2:4] == ["", ""]
    assert rows["helpful, from base"][2:] == ["", "", "+0.0"]
    assert rows["with real, from real"][3] == "-9.0 [-11.5, -6.5], p 0.004"


def test_a_study_without_results_says_so(tmp_path: Path) -> None:
    done = run_table(tmp_path)
    assert done.returncode == 2
    assert "run the study first" in done.stderr


def test_volumes_and_architectures_are_rows_of_their_own(tmp_path: Path) -> None:
    """Compared with the baseline and the real images of their own architecture."""
    for seed, shift in enumerate((0.0, 0.01)):
        found = [
            arm(name, kind, value + shift) | {"arch": arch, "name": label}
            for arch, gain in (("cnn", 0.0), ("vit", 0.1))
            for name, kind, label, value in (
                (None, "real", "real", 0.7 + gain),
                ("base", "alone", "base x1", 0.5 + gain),
                ("base", "alone", "base x5", 0.6 + 2 * gain),
                ("base", "joint", "real + base x5", 0.75 + 2 * gain),
            )
        ]
        part = tmp_path / f"seed-{seed}" / "part"
        part.mkdir(parents=True)
        (part / "eval.json").write_text(json.dumps({"arms": found, "synthetic": {}}))
    lines = run_table(tmp_path, "--baseline", "base x1").stdout.splitlines()[4:]
    rows = {c[1].strip(): [x.strip() for x in c[2:-1]] for c in (line.split("|") for line in lines)}
    assert list(rows) == [
        f"{n}, {a}" for a in ("cnn", "vit") for n in ("real", "base x1", "base x5")
    ]
    assert rows["base x5, vit"][5:7] == ["80.5 ± 0.7", "95.5 ± 0.7"]
    assert rows["base x5, vit"][-2:] == ["+20.0", "+15.0"]
    assert rows["base x5, cnn"][-2:] == ["+10.0", "+5.0"]


def run_plots(study: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TABLE.with_name("plots.py")), str(study), "--out", str(out)]
    return subprocess.run(command, capture_output=True, text=True)


def test_plots_are_drawn_of_what_there_is(tmp_path: Path) -> None:
    study, out = tmp_path / "study", tmp_path / "plots"
    assert "run ablation.sh first" in run_plots(study, out).stderr
    for seed, base in enumerate((0.60, 0.62)):
        write_seed(study / f"seed-{seed}" / "ablation", base, base + 0.03)
    done = run_plots(study, out)
    assert done.stdout.splitlines() == [str(out / "arms.svg")], done.stderr
    drawn = (out / "arms.svg").read_text()
    assert "<!-- class prompts -->" in drawn and "<!-- tuned -->" in drawn
    for seed, base in enumerate((0.50, 0.53)):
        write_seed(study / f"seed-{seed}" / "shots-4" / "few", base, base)
    done = run_plots(study, out)
    assert done.stdout.splitlines() == [str(out / "arms.svg"), str(out / "shots.svg")], done.stderr
    assert "<!-- real only -->" in (out / "shots.svg").read_text()


def test_intervals_of_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TABLE.parent))
    from table import half_width

    # sd of 60, 62, 61 is 1; t(.975, 2) = 4.303.
    assert half_width([60.0, 62.0, 61.0]) == pytest.approx(4.303 / 3**0.5, rel=1e-3)
    assert half_width([60.0]) == 0
