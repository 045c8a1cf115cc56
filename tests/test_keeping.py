"""A stopped run promises to go on only where something is kept to go on from."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from utilgen_cli.commands.keeping import DIRECTORY, NAMED, nothing_kept
from utilgen_cli.runtime import signals
from utilgen_cli.runtime.errors import Stopped
from utilgen_cli.runtime.signals import AGAIN

from .conftest import ROOT


@pytest.mark.parametrize(
    ("command", "options", "advice"),
    [
        ("generate", {"output": "-"}, DIRECTORY),
        ("generate", {"output": "synth"}, None),
        ("pack", {"output": "-"}, DIRECTORY),
        ("eval", {"output": None}, DIRECTORY),
        ("eval", {"output": Path("runs")}, None),
        ("ilpo", {"output": "-", "save_policy": None}, DIRECTORY),
        ("ilpo", {"output": "-", "save_policy": Path("policy")}, None),
        ("ilpo", {"output": "best", "save_policy": None}, None),
        ("value score", {"output": "scored", "shards": ["synth"], "select": None}, None),
        ("value score", {"output": "scored", "shards": ["synth"], "select": 5}, AGAIN),
        ("value score", {"output": "scored", "shards": None, "select": None}, NAMED),
        ("value score", {"output": "-", "shards": ["synth"], "select": None}, DIRECTORY),
        ("pairs", {"output": "pairs", "shards": ["scored"]}, AGAIN),
        ("pairs", {"output": "pairs.parquet", "shards": ["scored"]}, AGAIN),
        ("check", {"shards": ["synth"]}, AGAIN),
        ("dpo", {"output": Path("dpo"), "shards": None}, None),
    ],
)
def test_what_keeps_nothing(command: str, options: dict[str, Any], advice: str | None) -> None:
    assert nothing_kept(command, options) == advice


def test_where_nothing_is_kept_a_stop_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_received", [signal.SIGTERM])
    for lost, code, says in (
        ("Do this.", 1, "SIGTERM: stopped, and nothing is kept. Do this."),
        (AGAIN, 75, "SIGTERM: stopped, and nothing is kept. Run it again: it begins anew."),
        (None, 75, "SIGTERM: stopped with its state saved. Run the same command again to go on."),
    ):
        with pytest.raises(Stopped) as stopped, signals.running("test", lost):
            raise signals.Interrupted
        assert (stopped.value.exit_code, str(stopped.value)) == (code, says)


@pytest.mark.parametrize(("number", "code"), [(15, 1), (2, 130)])
def test_nor_does_the_end_of_the_grace_time_promise_it(number: int, code: int) -> None:
    words = f"""import os, time
from utilgen_cli.runtime import signals
signals.GRACE = 0.2
signals.install(); signals.watch()
with signals.running("test", "Do this."), signals.deferred():
    os.kill(os.getpid(), {number}); time.sleep(60)"""
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, cwd=ROOT)
    assert done.returncode == code
    assert done.stderr.endswith(b": left in the middle of a long step. Nothing is kept. Do this.\n")


@pytest.mark.parametrize(
    ("number", "code", "says"),
    [(15, 1, "SIGTERM: stopped, and nothing is kept."), (2, 130, "interrupted. Nothing is kept.")],
)
def test_a_stream_that_is_stopped_is_lost(number: int, code: int, says: str) -> None:
    words = [
        "generate",
        "-m",
        "tiny",
        "--per-class",
        "500",
        "--steps",
        "1",
        "--guidance-scale",
        "1",
    ]
    run = subprocess.Popen([sys.executable, "-m", "utilgen_cli", *words], cwd=ROOT,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    assert run.stdout is not None
    assert run.stdout.read(512)
    run.send_signal(number)
    _, said = run.communicate(timeout=60)
    assert run.returncode == code
    last = said.decode().splitlines()[-1]
    assert last == f"utilgen: generate: {says} Add -o DIR, and a stopped run goes on there."
