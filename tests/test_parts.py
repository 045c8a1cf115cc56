"""Any division of the work, any batch size and any point of resuming give the same samples."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utilgen_cli.commands.streams import plan_items, run_source
from utilgen_cli.diffusion.generate import GenerateConfig, Generator, Item
from utilgen_cli.runtime.errors import UsageError
from utilgen_cli.shards.sample import Sample

from .random_bundle import CLASSES, make_bundle

PLAN = plan_items(len(CLASSES), 4)
SHARD_SIZE = 5


class Died(BaseException):
    """What a kill does to a run."""


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    bundle = make_bundle(tmp_path_factory.mktemp("bundle"))
    config = GenerateConfig(str(bundle), steps=2)
    return Generator(config, device=torch.device("cpu"), dtype=torch.float32)


def run(generator: Generator, out: Path, part: str | None, die_after: int | None = None) -> None:
    """A run, or one that dies when so many samples are made."""
    made = 0

    def draw(items: list[Item]) -> Iterator[Sample]:
        nonlocal made
        for sample in generator.draw(items):
            if made == die_after:
                raise Died
            made += 1
            yield sample

    run_source(draw, PLAN, str(out), "generate", {}, False, SHARD_SIZE, part)


def shards(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in out.glob("[0-9]*.tar")}


@pytest.fixture(scope="module")
def whole(generator: Generator, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "out"
    run(generator, out, None)
    return shards(out)


@settings(max_examples=6, deadline=None)
@given(st.data())
def test_the_samples_do_not_depend_on_how_they_are_made(
    generator: Generator, whole: dict[str, bytes], data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, 4), "parts")
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "out"
        for index in data.draw(st.permutations(range(count)), "order"):
            batch_size = data.draw(st.integers(1, 40), "batch size")
            generator.config = replace(generator.config, batch_size=batch_size)
            part, death = f"{index}/{count}", data.draw(st.integers(0, 12), "dies after")
            try:
                run(generator, out, part, death)
            except Died:
                run(generator, out, part)
        assert shards(out) == whole
        assert not [p for p in out.iterdir() if p.suffix in (".partial", ".journal", ".tmp")]


def test_several_processes_must_share_the_work(
    generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="--part rank"):
        run(generator, tmp_path / "out", None)
    run(generator, tmp_path / "out", "rank")
    assert sorted(shards(tmp_path / "out")) == ["00001.tar"]
