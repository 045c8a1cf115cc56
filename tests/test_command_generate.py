"""`utilgen generate` on a command line: streams, shards, parts, signals and errors."""

from __future__ import annotations

import hashlib
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import webdataset as wds

from utilgen_cli.commands.generate import generate

from .conftest import Run
from .random_bundle import make_bundle

KEYS = [f"{c:04d}-{i:06d}" for i in range(4) for c in range(3)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle"))


def digests(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.glob("*.tar")}


def test_a_stream_is_the_shard_and_tar_and_webdataset_read_it(
    utilgen: Run, bash: Run, bundle: Path, tmp_path: Path
) -> None:
    utilgen("generate", "-m", bundle, "--per-class", 4, "--seed", 5, "-o", "whole")
    done = bash(
        f"utilgen generate -m {bundle} --per-class 4 --seed 5 -q | tee stream.tar | tar tf - | "
        "sed -n 's/.png$//p'"
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode().split() == KEYS
    stream = tmp_path / "stream.tar"
    assert stream.read_bytes() == (tmp_path / "whole" / "00000.tar").read_bytes()
    samples = list(wds.WebDataset(str(stream), shardshuffle=False).decode("rgb8"))
    assert [s["__key__"] for s in samples] == KEYS
    assert [s["cls"] for s in samples] == [0, 1, 2] * 4
    assert samples[1]["json"]["class_name"] == "bag"


def test_parts_and_a_rerun_make_the_shards_of_one_run(bundle: Path, tmp_path: Path) -> None:
    def run(out: str, **more: Any) -> None:
        output = str(tmp_path / out)
        generate(str(bundle), per_class=4, shard_size=5, output=output, quiet=True, **more)

    run("whole")
    whole = digests(tmp_path / "whole")
    assert sorted(whole) == ["00000.tar", "00001.tar", "00002.tar"]
    run("parts", part="1/2")
    assert sorted(digests(tmp_path / "parts")) == ["00001.tar"]
    run("parts", part="0/2")
    assert digests(tmp_path / "parts") == whole
    kept, lost = (tmp_path / "whole" / f"0000{i}.tar" for i in (0, 1))
    before = kept.stat().st_mtime_ns
    lost.unlink()
    run("whole")
    assert digests(tmp_path / "whole") == whole
    assert kept.stat().st_mtime_ns == before


def test_term_stops_after_a_shard_and_the_next_run_goes_on(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"per_class": 40, "shard_size": 10}
    options = [f"--{name.replace('_', '-')}={size}" for name, size in sizes.items()]
    command = [sys.executable, "-m", "utilgen_cli", "generate", "-m", str(bundle), *options]
    command += ["-o", "stopped"]
    running = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE)
    first = tmp_path / "stopped" / "00000_stats.json"
    deadline = time.monotonic() + 120
    while not first.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    running.send_signal(signal.SIGTERM)
    _, errors = running.communicate(timeout=120)
    assert running.returncode == 75, errors.decode()
    assert 0 < len(digests(tmp_path / "stopped")) < 12
    assert not list((tmp_path / "stopped").glob("*.tmp"))
    monkeypatch.chdir(tmp_path)
    for name in ("stopped", "whole"):
        generate(str(bundle), output=name, quiet=True, **sizes)
    assert digests(tmp_path / "stopped") == digests(tmp_path / "whole")


def test_a_terminal_gets_no_tar_and_no_waiting(bundle: Path, tmp_path: Path) -> None:
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "utilgen_cli", "generate", "-m", str(bundle)]
    done = subprocess.run(
        command, stdout=follower, stderr=subprocess.PIPE, cwd=tmp_path, check=False
    )
    os.close(follower)
    try:
        shown = os.read(leader, 1000)
    except OSError:  # nothing was written, and the other side is closed
        shown = b""
    os.close(leader)
    assert (done.returncode, shown) == (2, b"")
    assert b"-o DIR" in done.stderr


def test_a_reader_that_leaves_is_141_and_silence(bash: Run, bundle: Path) -> None:
    done = bash(
        f"utilgen generate -q -m {bundle} --per-class 200 --shard-size 10 | head -c 100 >/dev/null;"
        " echo ${PIPESTATUS[0]}"
    )
    assert (done.stdout.strip(), done.stderr) == (b"141", b"")


LONG = ["-m", "tiny", "--prompt", "a very detailed photo " * 25 + "of a {}"]


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["-m", "tiny", "--per-class", "0"], 2, "--per-class"),
        ([], 2, "-m"),
        (["-m", "tiny", "--sampler", "euler"], 2, "ddim"),
        (["-m", "no/such"], 66, "no/such"),
        (["-m", "tiny", "--tokens", "none/"], 66, "utilgen invert"),
        (["-m", "tiny", "--prompt", "hello", "--classes", "a"], 2, "{}"),
        (LONG, 2, "comes to no class within 16 tokens. Shorten --prompt"),
        ([*LONG, "--classes", "dress"], 2, "comes to no class within 16 tokens. Shorten --prompt"),
        (
            ["-m", "tiny", "--classes", ",".join("dress " * 25 + end for end in ("one", "two"))],
            2,
            "is the same for two classes within 16 tokens. Shorten --prompt",
        ),
    ],
)
def test_errors_say_what_to_do(utilgen: Run, args: list[str], code: int, says: str) -> None:
    done = utilgen("generate", *args, "-o", "out", check=False)
    assert (done.returncode, done.stdout) == (code, b"")
    assert says in done.stderr.decode()
    assert b"Traceback" not in done.stderr
