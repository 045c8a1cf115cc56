"""Bad input gets one line that says what to do, the right exit code, and nothing is lost."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import typer

from utilgen_cli.app import guard

from .conftest import Run, make_sample, tar_bytes


def one_line(stderr: bytes, command: str) -> str:
    lines = stderr.decode().strip().splitlines()
    assert "Traceback" not in stderr.decode()
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"utilgen: {command}: ")
    assert lines[0].endswith((".", '"')), "it says what to do"
    return lines[0]


def value_dir(path: Path, classes: list[str]) -> Path:
    """Enough of a value model for its class list to be looked at."""
    path.mkdir()
    (path / "value.json").write_text(json.dumps({"classes": classes, "format": 1}))
    return path


CASES = [
    ("pairs", ["pairs", "missing/"], 66, "no such file or directory"),
    ("pairs", ["pairs", "empty/"], 66, "no .tar shard"),
    ("pairs", ["pairs", "text.tar"], 65, "text.tar"),
    ("pairs", ["pairs", "unscored.tar"], 65, "value score"),
    ("value score", ["value", "score", "unscored.tar", "--value", "missing/"], 66, "value train"),
    ("pack", ["pack", "missing/"], 66, "no such file"),
    ("pack", ["pack", "hollow/", "-o", "out"], 65, "class without images"),
    ("view", ["view", "missing/", "-o", "page.html"], 66, "no such file"),
    ("invert", ["invert", "missing/", "-m", "tiny", "-o", "t"], 66, "no such file"),
    ("invert", ["invert", "unscored.tar", "-m", "nobody/nothing", "-o", "t"], 66, "nobody/nothing"),
    ("generate", ["generate", "-m", "nobody/nothing", "--classes", "a", "--per-class", "1"], 66, "nobody/nothing"),
    ("generate", ["generate", "-m", "tiny", "--tokens", "missing", "--per-class", "1"], 66, "missing"),
    ("check", ["check", "text.tar"], 65, "text.tar"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "words", "code", "part"), CASES)
def test_bad_input_is_one_line_and_a_code(
    command: str, words: list[str], code: int, part: str, utilgen: Run, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "hollow" / "cat").mkdir(parents=True)
    (tmp_path / "text.tar").write_text("hello\n" * 200)
    (tmp_path / "unscored.tar").write_bytes(tar_bytes([make_sample(1), make_sample(2, 1)]))
    done = utilgen(*words, "-q", check=False)
    said = [line for line in done.stderr.splitlines() if line.startswith(b"utilgen: ")]
    line = one_line(b"\n".join(said), command)
    assert part in line
    assert done.returncode == code, done.stderr
    assert not list(tmp_path.glob("out/*.tar"))


@pytest.mark.parametrize(("options", "advice"), [
    (["batch_size", "chunk"], "Lower --batch-size or --chunk."), (["chunk"], "Lower --chunk."),
    (["seed"], "Give the process more."),
    (["batch_size", "accumulation", "checkpointing"], "Add --gradient-checkpointing, or lower "
     "--batch-size and raise --gradient-accumulation by as much.")])  # fmt: skip
@pytest.mark.parametrize("error", [
    MemoryError(), RuntimeError("CUDA out of memory. Tried 2 GiB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")])  # fmt: skip
def test_memory_that_ran_out_names_the_options_that_there_are(
    error: Exception, options: list[str], advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(**_: int) -> None:
        raise error

    with pytest.raises(typer.Exit) as end:
        guard("ilpo", command)(**dict.fromkeys(options, 1))
    assert end.value.exit_code == 1
    assert capsys.readouterr().err == f"utilgen: ilpo: memory: not enough of it. {advice}\n"


def test_per_class_zero_is_a_usage_error(utilgen: Run) -> None:
    done = utilgen("generate", "-m", "tiny", "--per-class", "0", check=False)
    assert done.returncode == 2
    assert b"--per-class" in done.stderr


def test_a_help_that_cannot_be_written_is_one_line(bash: Run) -> None:
    done = bash("utilgen pairs --help > /dev/full")
    assert done.returncode == 1
    assert "no space left" in one_line(done.stderr, "help")


def test_nothing_named_and_nothing_piped_is_a_usage_error(bash: Run) -> None:
    done = bash("script -qec 'utilgen pairs' /dev/null; echo code $?", stdin=None)
    assert b"code 2" in done.stdout


def test_a_read_only_output_is_one_line(utilgen: Run, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        target = Path("/proc/utilgen-test")  # nobody, not even root, can make a directory there
    else:
        target = tmp_path / "closed" / "out"
        target.parent.mkdir(mode=0o500)
    (tmp_path / "photos" / "a").mkdir(parents=True)
    (tmp_path / "photos" / "a" / "1.png").write_bytes(make_sample(1).members["png"])
    done = utilgen("pack", "photos", "-o", target, check=False)
    assert done.returncode == 1
    assert target.name in one_line(done.stderr, "pack") or "closed" in done.stderr.decode()


def test_a_full_disk_keeps_what_was_finished(bash: Run, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a").mkdir()
    for i in range(9):
        picture = make_sample(i, size=64).members["png"]
        (tmp_path / "photos" / "a" / f"{i}.png").write_bytes(picture)
    script = "ulimit -f 20; utilgen pack photos -o out --shard-size 1"  # blocks of 1,024 bytes
    done = bash(script)
    assert done.returncode == 0, done.stderr
    done = bash("ulimit -f 20; trap '' XFSZ; utilgen pack photos -o big --shard-size 9")
    assert done.returncode == 1
    one_line(done.stderr, "pack")
    assert b"no space left" in done.stderr
    assert not list((tmp_path / "big").glob("[0-9]*"))
    done = bash("utilgen pack photos -o big --shard-size 9 && utilgen check big")
    assert done.returncode == 0, done.stderr


def test_an_upstream_that_fails_gives_65_and_no_result(bash: Run, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes([make_sample(i) for i in range(4)]))
    done = bash("head -c 4096 a.tar | utilgen pairs -o pairs; echo $? > code; ls pairs/*.tar")
    assert (tmp_path / "code").read_text() == "65\n"
    assert done.returncode != 0


def test_a_reader_that_leaves_gives_141_and_no_message(bash: Run, tmp_path: Path) -> None:
    many = [
        make_sample(i, size=64).with_member("utility.json", b'{"utility": %f}' % (i / 400))
        for i in range(400)
    ]
    (tmp_path / "scored.tar").write_bytes(tar_bytes(many))
    done = bash(
        "set +o pipefail; utilgen pairs -q scored.tar | head -c 10 > few; echo ${PIPESTATUS[0]}"
    )
    assert done.stdout == b"141\n"
    assert done.stderr == b""
