"""A shard whose writer died goes on from what its journal vouches for, to the same bytes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utilgen_cli.runtime.errors import BadInput, UtilgenError
from utilgen_cli.shards.partial import PartialShard, leftovers, resume_shard
from utilgen_cli.shards.sample import Sample
from utilgen_cli.shards.sums import read_stats, stats_path
from utilgen_cli.shards.writer import write_shard

from .conftest import make_sample

SAMPLES = [make_sample(i) for i in range(6)]
FACTS = {"device": "cpu"}


class Died(BaseException):
    """What a kill does: nothing after it runs."""


def dying(at: int, start: int = 0) -> Iterator[Sample]:
    yield from SAMPLES[start:at]
    raise Died


def killed(shard: Path, at: int) -> None:
    """A run that dies before sample `at`."""
    with pytest.raises(Died):
        resume_shard(shard, lambda n: dying(at, n), lambda: FACTS)


def rerun(shard: Path, **facts: str) -> int:
    """How many samples the run after it made."""
    return resume_shard(shard, lambda n: iter(SAMPLES[n:]), lambda: {**FACTS, **facts})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "00000.tar"
    write_shard(path, SAMPLES)
    return path.read_bytes()


@given(
    st.lists(st.integers(0, 6), max_size=3),
    st.sampled_from(["body", "journal"]),
    st.sampled_from(["none", "cut", "flip"]),
    st.floats(0, 1, exclude_max=True),
)
def test_any_kills_and_any_damage_end_in_the_same_bytes(
    whole: bytes, kills: list[int], file: str, damage: str, place: float
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        shard = Path(directory) / "00000.tar"
        for at in kills:
            killed(shard, at)
            assert not shard.exists()
        victim = leftovers(shard)[file == "journal"]
        if kills and damage != "none" and victim.stat().st_size:
            data = bytearray(victim.read_bytes())
            at = int(place * len(data))
            if damage == "cut":
                del data[at:]
            else:
                data[at] ^= 1
            victim.write_bytes(data)
        made = rerun(shard)
        assert shard.read_bytes() == whole
        assert {p.name for p in Path(directory).iterdir()} == {"00000.tar", "00000_stats.json"}
        if kills and damage == "none":
            assert made == 6 - max(kills)


def test_a_key_that_changed_in_the_journal_is_not_believed(tmp_path: Path) -> None:
    shard = tmp_path / "a.tar"
    killed(shard, 6)
    journal = leftovers(shard)[1]
    journal.write_bytes(journal.read_bytes().replace(b'"0000-000002"', b'"0000-000009"'))
    assert rerun(shard) == 4
    assert list(read_stats(shard)["sample_sha256"]) == [sample.key for sample in SAMPLES]


def test_the_statistics_are_those_of_an_undisturbed_run(tmp_path: Path) -> None:
    killed(tmp_path / "a.tar", 4)
    rerun(tmp_path / "a.tar")
    rerun(tmp_path / "b.tar")
    a, b = (
        [line for line in stats_path(tmp_path / name).read_text().splitlines() if "sec" not in line]
        for name in ("a.tar", "b.tar")
    )
    assert a == b


def test_samples_made_on_another_device_are_made_again(tmp_path: Path) -> None:
    killed(tmp_path / "a.tar", 4)
    assert rerun(tmp_path / "a.tar", device="cuda") == 6


def test_a_shard_has_one_writer_and_no_key_twice(tmp_path: Path) -> None:
    with PartialShard(tmp_path / "a.tar", {}) as partial:
        partial.add(SAMPLES[0])
        with (
            pytest.raises(UtilgenError, match="another process"),
            PartialShard(tmp_path / "a.tar", {}),
        ):
            pass
        with pytest.raises(BadInput, match="twice"):
            partial.add(SAMPLES[0])
