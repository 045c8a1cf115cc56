"""`utilgen eval` at the command line: table, JSON, report, stopping and going on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from utilgen_cli.classification.models import load_classifier
from utilgen_cli.classification.team import Team
from utilgen_cli.commands.evaluate_options import named, open_inputs, read_value
from utilgen_cli.runtime.errors import BadInput, NoInput, UsageError

from .classification_toys import colour_images, shards_of
from .conftest import ROOT, TORCHRUN, Run

CLIP = ROOT / "utilgen_cli" / "tiny" / "open_clip"


@pytest.fixture
def sets(tmp_path: Path) -> list[str]:
    for name, n, seed in (("real", 4, 0), ("synth", 8, 3), ("val", 6, 5), ("test", 10, 8)):
        shards_of(tmp_path / name, colour_images(n, seed=seed))
    return ["--real", "real", "--synthetic", "base=synth", "--val", "val", "--test", "test",
            "--size", "16", "-q"]  # fmt: skip


def test_json_table_and_report_tell_the_same(utilgen: Run, sets: list[str], tmp_path: Path) -> None:
    options = [*sets, "--steps", "3", "--seeds", "2", "-o", "runs"]
    found = json.loads(utilgen("eval", *options, "--json", "--report", "r.html").stdout)
    assert found["schema"] == "utilgen.eval/1"
    assert found["protocol"]["train"]["steps"] == 3
    assert [arm["name"] for arm in found["arms"]] == ["real", "base", "real + base"]
    best = f"{100 * found['arms'][2]['accuracy']['mean']:.1f}"
    assert best in (tmp_path / "r.html").read_text()
    done = utilgen("eval", *options)  # all runs are there
    assert best in done.stdout.decode()
    assert b"\x1b" not in done.stdout
    assert done.stderr == b""


def test_a_smoke_run_looks_at_validation_too(utilgen: Run, sets: list[str]) -> None:
    options = [*sets, "--smoke", "--validate-every", "200", "--seeds", "1", "--json"]
    found = json.loads(utilgen("eval", *options).stdout)
    assert found["protocol"]["selection"] == "best of every 10 steps on validation"
    assert found["protocol"]["train"]["steps"] == 10


def test_a_stopped_evaluation_exits_75_and_goes_on(
    commands: Path, sets: list[str], tmp_path: Path
) -> None:
    command = [commands / "utilgen", "eval", *sets, "--steps", "5", "--seeds", "40",
               "-o", "runs"]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/*.trained.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (75, b"")
    assert err.startswith(b"utilgen: eval: SIGTERM: stopped with its state saved.")
    trained = len(list(tmp_path.glob("runs/*.trained.json")))
    assert 0 < trained < 120
    again = [*command[:-4], "--seeds", "1", "-o", "runs", "--json"]
    done = subprocess.run(again, cwd=tmp_path, capture_output=True, check=True)
    assert len(json.loads(done.stdout)["arms"]) == 3


def test_two_processes_share_the_runs_and_make_the_same_table(
    utilgen: Run, commands: Path, sets: list[str], tmp_path: Path
) -> None:
    options = ["eval", *sets, "--steps", "3", "--seeds", "3", "--json", "-o"]
    command = [*TORCHRUN, "--no-python", commands / "utilgen", *options, "two"]
    both = subprocess.run(command, cwd=tmp_path, capture_output=True)
    assert both.returncode == 0, both.stderr.decode()
    one, two = json.loads(utilgen(*options, "one").stdout), json.loads(both.stdout)
    for found in (one, two):
        for arm in found["arms"]:
            arm.pop("train_seconds")
            for run in arm["runs"]:
                run.pop("seconds")
    assert one == two


def test_two_processes_train_one_classifier_as_one_does(
    utilgen: Run, commands: Path, sets: list[str], tmp_path: Path
) -> None:
    """With --data-parallel each takes half of every batch; no batch norm here, which sees parts."""
    options = ["eval", *sets, "--arch", f"open_clip-lora:{CLIP}", "--batch-size", "9",
               "--augment", "crop", "--steps", "4", "--seeds", "1", "--json", "-o"]  # fmt: skip
    program = [commands / "utilgen", *options, "two", "--data-parallel"]
    command = [*TORCHRUN, "--no-python", *program]
    both = subprocess.run(command, cwd=tmp_path, capture_output=True)
    assert both.returncode == 0, both.stderr.decode()
    utilgen(*options, "one", "--workers", "1")
    [one], [two] = ([*tmp_path.glob(f"{name}/*.safetensors")] for name in ("one", "two"))
    trained = [load_classifier(path).state_dict() for path in (one, two)]
    for name, weight in trained[0].items():  # where a gradient is nearly 0, Adam moves by its noise
        assert (trained[1][name] - weight).norm() <= 2e-4 * weight.norm(), name
        assert "lora_B" not in name or weight.any()  # it started at 0


def test_several_processes_need_a_directory_to_meet_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="2 processes: they meet in a directory"):
        Team.join(None)


def test_sets_are_named_once_and_properly() -> None:
    assert named(["a=x", "b=y=z"], "--synthetic") == {"a": "x", "b": "y=z"}
    for wrong in (["x/"], ["=x"], ["a=x", "a=y"], ["real=x"]):
        with pytest.raises(UsageError, match="--synthetic"):
            named(wrong, "--synthetic")


def test_an_unknown_architecture_is_refused_before_anything_is_read(
    utilgen: Run, tmp_path: Path
) -> None:
    (tmp_path / "torn.tar").write_bytes(b"x" * 600)
    done = utilgen(
        "eval", "--real", "torn.tar", "--test", "torn.tar", "--arch", "resnet-50", check=False
    )
    assert (done.returncode, b"--arch resnet-50: unknown" in done.stderr) == (2, True)


def test_inputs_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    shards_of(tmp_path / "real", colour_images(1))
    real = str(tmp_path / "real")
    with pytest.raises(NoInput, match="nowhere"):
        open_inputs(real, None, None, "nowhere", None)
    with pytest.raises(UsageError, match="more than once"):
        open_inputs("-", None, None, real, None)
    with pytest.raises(UsageError, match="--scored x"):
        open_inputs(real, [f"a={real}"], None, real, [f"x={real}"])
    with pytest.raises(NoInput, match="utilgen value train"):
        read_value(tmp_path)
    for broken in ("{", "[]", '{"format": 1, "canary": {"auroc": "high"}}'):
        (tmp_path / "value.json").write_text(broken)
        with pytest.raises(BadInput, match="not a value model"):
            read_value(tmp_path)
