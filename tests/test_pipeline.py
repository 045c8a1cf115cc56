"""The commands joined by pipes, as a user joins them, on the shipped model in --smoke size."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from utilgen_cli.shards.operands import open_source
from utilgen_cli.shards.writer import write_shard

from .conftest import DATA, Run


@pytest.fixture(scope="module")
def run(commands: Path) -> Run:
    """Run a script in a directory, with `utilgen` on the PATH and the shipped model for default."""
    path = f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}"

    def call(script: str, directory: Path, **kwargs: object) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(  # type: ignore[call-overload]
            ["bash", "-o", "pipefail", "-c", script], cwd=directory, capture_output=True,
            env={**os.environ, "UTILGEN_MODEL": "tiny", "PATH": path}, **kwargs,
        )  # fmt: skip

    return call


@pytest.fixture(scope="module")
def loop(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with tokens/, synth/ and value/ made by the commands."""
    directory = tmp_path_factory.mktemp("loop")
    done = run(
        f"""set -e; exec 2>&1
        utilgen invert {DATA}/real -o tokens --smoke
        utilgen generate --tokens tokens/ --per-class 4 --steps 5 -o synth
        utilgen value train --real {DATA}/real --synthetic synth --val {DATA}/val -o value --smoke""",
        directory,
    )
    assert done.returncode == 0, done.stdout.decode()
    return directory


FORCE = "--force"  # a smoke-size value model may miss the canary's bar: the plumbing is tested here


def test_score_pairs_tar(loop: Path, run: Run) -> None:
    done = run(f"utilgen value score synth/ {FORCE} | utilgen pairs | tar tf -", loop)
    assert done.returncode == 0, done.stderr.decode()
    names = done.stdout.decode().split()
    assert names
    assert {name.partition(".")[2] for name in names} == {"win.png", "lose.png", "cls", "json"}


def test_the_same_on_a_terminal_is_a_listing_and_no_tar(loop: Path, run: Run) -> None:
    script = f"script -qec 'utilgen value score synth/ {FORCE} | utilgen pairs' /dev/null"
    done = run(script, loop, stdin=subprocess.DEVNULL)
    text = done.stdout.decode(errors="replace")
    assert "\0" not in text and "ustar" not in text
    assert "-o DIR" in text
    single = run(
        f"script -qec 'utilgen value score synth/ {FORCE}' /dev/null",
        loop,
        stdin=subprocess.DEVNULL,
    )
    assert "utility" in single.stdout.decode() and b"\0" not in single.stdout


def test_generate_score_pairs_dpo(loop: Path, run: Run) -> None:
    done = run(
        f"utilgen generate --tokens tokens/ --per-class 8 --steps 4 | utilgen value score --value value/ {FORCE}"
        " | utilgen pairs | utilgen dpo -m tiny --tokens tokens/ -o round1/ --smoke",
        loop,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode() == "round1\n" or done.stdout.decode() == "round1/\n"
    assert (loop / "round1" / "pytorch_lora_weights.safetensors").exists()
    again = run(
        f"utilgen value score synth {FORCE} | utilgen pairs | utilgen dpo --tokens tokens/"
        " -o round1/ --smoke",
        loop,
    )
    assert again.returncode == 0, "a run that is done lets its upstream end"
    drawn = run(
        "utilgen generate --tokens tokens/ --adapter round1 --per-class 1 --steps 4 -o after", loop
    )
    assert drawn.returncode == 0, drawn.stderr.decode()
    before = {s.key: s.members["png"] for s in open_source([str(loop / "synth")]).samples()}
    after = {s.key: s.members["png"] for s in open_source([str(loop / "after")]).samples()}
    assert set(after) <= set(before)


@pytest.mark.parametrize(
    "stage", ["value score --force", "pairs", "dpo --tokens tokens -o cut-dpo --smoke"]
)
def test_a_cut_stream_ends_the_next_stage_with_65(loop: Path, run: Run, stage: str) -> None:
    upstream = {
        "value score --force": "synth",
        "pairs": "scored",
        "dpo --tokens tokens -o cut-dpo --smoke": "paired",
    }[stage]
    made = run(
        f"set -e; [ -d scored ] || utilgen value score synth {FORCE} -o scored\n"
        "[ -d paired ] || utilgen pairs scored -o paired", loop,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr.decode()
    whole = (loop / upstream / "00000.tar").read_bytes()
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        members = tar.getmembers()
    cut = members[len(members) // 2 // 3 * 3].offset  # between two members: tar sees a clean end
    done = run(f"utilgen {stage} > out", loop, input=whole[:cut])
    assert done.returncode == 65, done.stderr.decode()
    assert b"end mark" in done.stderr
    assert not (loop / "cut-dpo" / "pytorch_lora_weights.safetensors").exists()
    assert not (loop / "out").read_bytes().endswith(bytes(1024)), "the result looks whole"


def test_generate_refuses_a_terminal_before_any_work(loop: Path, run: Run) -> None:
    done = run(
        "script -qec 'utilgen generate --per-class 1' /dev/null", loop, stdin=subprocess.DEVNULL
    )
    assert b"terminal" in done.stdout and b"\0" not in done.stdout
    assert done.returncode == 2


def test_json_summaries_are_json(loop: Path, run: Run) -> None:
    done = run(
        f"utilgen value score synth {FORCE} --json | utilgen pairs --json -o pairs-json", loop
    )
    assert done.returncode == 0, done.stderr.decode()
    summaries = [
        json.loads(line) for line in done.stderr.decode().splitlines() if line.startswith("{")
    ]
    assert len(summaries) == 2


def test_the_loop_script_runs_to_its_report(run: Run, tmp_path: Path) -> None:
    """With classes of one's own, that are not the bundle's."""
    kept = {1: b"0", 6: b"1", 8: b"2"}
    for part in ("real", "val", "test"):
        (tmp_path / part).mkdir()
        samples = open_source([str(DATA / part)]).samples()
        own = [s.with_member("cls", kept[s.label]) for s in samples if s.label in kept]
        write_shard(tmp_path / part / "00000.tar", own[:60])
    script = DATA.parent / "loop.sh"
    settings = 'SMOKE=1 CLASSIFIER="--arch small-cnn --augment shift"'
    done = run(f"{settings} bash {script} real val test tiny 1 4", tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    text = done.stdout.decode()
    for line in ("round 0: validation accuracy", "round 1: validation accuracy", "real + loop"):
        assert line in text
    assert (tmp_path / "report.html").exists()
    judged = json.loads((tmp_path / "round0" / "eval.json").read_text())
    assert judged["data"]["test"]["images"] == len(list(open_source([f"{tmp_path}/val"]).samples()))
    assert len(judged["classes"]) == 3
    assert judged["protocol"]["train"]["augmentation"] == "shift"
