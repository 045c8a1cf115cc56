"""The short form of the campaigns in tests/faults/: hurt a run, run it again, compare bytes."""

from __future__ import annotations

import random
import signal

import pytest

from .faults.outputs import torn
from .faults.runs import Runs, started


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize(
    ("name", "hits"),
    [("generate", (signal.SIGTERM, signal.SIGKILL)), ("lora", (signal.SIGKILL,))],
    ids=["generate", "lora"],
)
def test_a_run_that_was_hit_goes_on_to_the_same_bytes(
    name: str, hits: tuple[signal.Signals, ...], runs: Runs
) -> None:
    seconds, out = runs.ready(name), runs.fresh(name)
    words, errors, rng = runs.words(name, out), runs.errors, random.Random(name)
    for shards, number in enumerate(hits, 1):
        run = started(words, errors)
        if name == "generate":  # most of its time it only starts
            assert run.until(lambda n=shards: len(list(out.glob("*.tar"))) >= n)
        else:
            assert run.work_until(rng.uniform(0.6, 0.9) * seconds)
        run.send(number)
        code = run.wait(60)
        assert code == (-signal.SIGKILL if number == signal.SIGKILL else 75), run.said
        assert torn(out) == []
    last = started(words, errors)
    assert last.wait(120) == 0, last.said
    assert runs.same(name, out) == ""
