"""`utilgen pairs` as a stage: streams, directories, a listing on a terminal, exit codes."""

from __future__ import annotations

import io
import json
import shutil
import sys
import tarfile
from pathlib import Path

from utilgen_cli.diffusion.bundle import find_model

from .conftest import DATA, Run, flip_last_byte, make_sample, tar_bytes
from .test_pairing_strategies import picture, scored

TINY = find_model("tiny")


def scored_tar() -> bytes:
    return tar_bytes(
        scored(f"{c}-{i}", i / 8, c, picture(10 * c + i)) for i in range(8) for c in (0, 1)
    )


def test_a_pipe_in_and_a_tar_out(utilgen: Run) -> None:
    done = utilgen("pairs", "-q", input=scored_tar())
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
        assert tar.getnames()[:4] == ["0-7.win.png", "0-7.lose.png", "0-7.cls", "0-7.json"]
        assert len(tar.getnames()) == 16
    assert utilgen("pairs", input=scored_tar()).stdout == done.stdout


def test_a_directory_and_a_summary(utilgen: Run, tmp_path: Path) -> None:
    (tmp_path / "scored.tar").write_bytes(scored_tar() + tar_bytes([scored("alone", 0.5, 2)]))
    done = utilgen("pairs", "scored.tar", "-o", "pairs", "--json")
    summary = json.loads(done.stderr.splitlines()[-1])
    assert summary["pairs"] == 4 and summary["classes"]["2"]["why_none"] == "it has one sample"
    piped = utilgen("pairs", "scored.tar", "-o", "-")
    assert (tmp_path / "pairs" / "00000.tar").read_bytes() == piped.stdout
    assert b"no pair in class 2: it has one sample" in piped.stderr


def test_a_run_that_was_done_tells_what_it_told(utilgen: Run, tmp_path: Path) -> None:
    broken = scored("broken", 0.5, 2)
    broken.members["png"] = broken.members["png"][:20]
    (tmp_path / "scored.tar").write_bytes(scored_tar() + tar_bytes([broken]))
    args = ("pairs", "scored.tar", "-o", "pairs", "--on-error", "skip", "-q", "--json")
    first = utilgen(*args).stderr
    assert json.loads(first.splitlines()[-1])["quarantined"]["samples"] == 1
    made = (tmp_path / "pairs" / "00000.tar").stat().st_mtime_ns
    assert utilgen(*args).stderr == first
    assert (tmp_path / "pairs" / "00000.tar").stat().st_mtime_ns == made
    assert b"4 pairs in 2 of 2 classes" in utilgen(*args[:-2]).stderr


def test_who_reads_a_directory_without_a_pair_is_sent_back(utilgen: Run) -> None:
    utilgen("pairs", "-o", "none", "-q", input=tar_bytes([scored("a", 0.5, 0, picture(0))]))
    done = utilgen("view", "none", "-o", "page.html", check=False)
    advice = b"Name another, or run what made it again to see why it left none."
    assert done.returncode == 66 and advice in done.stderr  # a value model has none to leave


def test_a_pipe_that_was_not_taken_counts_for_nothing(utilgen: Run) -> None:
    args = ("pairs", "-o", "pairs", "-q", "--json")
    first = json.loads(utilgen(*args, input=scored_tar()).stderr)
    other = tar_bytes(scored(f"x-{i}", i / 8, 5, picture(i)) for i in range(8))
    assert json.loads(utilgen(*args, input=other).stderr.splitlines()[-1]) == first


def test_a_terminal_gets_a_listing(bash: Run, tmp_path: Path) -> None:
    (tmp_path / "scored.tar").write_bytes(scored_tar())
    utilgen = f"{sys.executable} -m utilgen_cli"
    done = bash(f"script -qec '{utilgen} pairs scored.tar -q' /dev/null", stdin=-3)
    text = done.stdout.decode()
    assert "\0" not in text and "0.8750" in text and "-o DIR" in text


def test_unscored_samples_are_65_and_one_line(utilgen: Run, tmp_path: Path) -> None:
    done = utilgen("pairs", "-q", "-o", "pairs", input=tar_bytes([make_sample(0)]), check=False)
    assert done.returncode == 65
    assert done.stderr.count(b"\n") == 1 and b"Run `utilgen value score` first." in done.stderr
    assert not list((tmp_path / "pairs").glob("*.tar"))


def test_a_broken_input_is_65_without_an_end_mark(utilgen: Run) -> None:
    whole = scored_tar()
    done = utilgen("pairs", "-q", input=whole[: len(whole) // 2], check=False)
    assert done.returncode == 65 and done.stdout == b""


def test_pairs_does_not_wait_for_torch(utilgen: Run, bash: Run, tmp_path: Path) -> None:
    (tmp_path / "scored.tar").write_bytes(scored_tar())
    code = (
        "import sys; sys.argv = ['utilgen', 'pairs', 'scored.tar', '-q', '-o', 'p'];"
        "from utilgen_cli.app import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    (tmp_path / "run.py").write_text(code)
    assert bash(f"{sys.executable} run.py").returncode == 0
    assert (tmp_path / "p" / "00000.tar").exists()


def test_nearest_by_clip_and_its_refusals(utilgen: Run, tmp_path: Path) -> None:
    (tmp_path / "scored.tar").write_bytes(scored_tar())
    nearest = ["pairs", "scored.tar", "--strategy", "nearest"]
    clip = shutil.copytree(TINY / "open_clip", tmp_path / "clip")
    done = utilgen(*nearest, "--clip", clip, "-o", "p", "--json")
    summary = json.loads(done.stderr.splitlines()[-1])
    assert summary["pairs"] == 4 and summary["matched_by"] == "clip"
    flip_last_byte(clip / "open_clip_model.safetensors")
    other = utilgen(*nearest, "--clip", clip, "-o", "p", check=False)
    assert other.returncode == 2 and b"clip files contents was" in other.stderr
    for options, says in (
        (["--match", "clip"], b"Add --clip"), (["--match", "x"], b"Use one of auto, value"),
        (["--match", "grey", "--clip", "y"], b"Leave it out"),
    ):  # fmt: skip
        failed = utilgen(*nearest, *options, check=False)
        assert failed.returncode == 2 and says in failed.stderr
    for options in (["--clip", clip], ["--match", "grey"]):
        failed = utilgen("pairs", "scored.tar", *options, check=False)
        assert failed.returncode == 2 and b"is for --strategy nearest" in failed.stderr


def test_value_score_writes_what_nearest_compares(utilgen: Run, tmp_path: Path) -> None:
    utilgen("value", "train", "--real", DATA / "real", "--smoke", "-o", "value")
    utilgen("value", "score", DATA / "real", "--force", "-o", "scored")
    done = utilgen("pairs", "scored", "--strategy", "nearest", "-o", "p", "--json")
    summary = json.loads(done.stderr.splitlines()[-1])
    assert summary["pairs"] >= 20 and summary["matched_by"] == "value"
