"""The short form of the fault campaign (tests/faults/): hit a run, run it again, compare bytes."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

from .faults.campaign import disturb


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.mark.parametrize("name", ["generate", "dpo"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda n: n.name)
def test_a_run_that_was_hit_goes_on_to_the_same_bytes(
    name: str, number: signal.Signals, work: Path
) -> None:
    row = disturb(name, work, number, random.Random(f"{name}{number}"))
    assert row["same"], row
    assert not row["partial"], row
    if row["hit"] and number == signal.SIGTERM:
        assert row["code"] in (0, 75, -signal.SIGTERM), row  # -15: before it could listen
    assert "why" not in row, row
