"""`--overwrite`: begun once, gone on with until the run has ended, and safe wherever it is killed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from utilgen_cli.commands.streams import run_filter
from utilgen_cli.runtime.errors import Stopped, UsageError
from utilgen_cli.runtime.output import OutputDirectory, end_run
from utilgen_cli.shards.operands import open_source
from utilgen_cli.shards.sample import Sample
from utilgen_cli.shards.writer import write_shard

from .conftest import make_sample


def run(path: Path, steps: int, stop: bool = False, ends_run: bool = True) -> bool:
    """A run with --overwrite; True if it went on with what lay there."""
    with OutputDirectory(path, "x", {"steps": steps}, overwrite=True) as out:
        out.ends_run = ends_run
        found = (path / "inner" / "made").exists()
        (path / "inner").mkdir(exist_ok=True)
        (path / "inner" / "made").write_text("x")
        if stop:
            raise Stopped("TERM", "stopped")
    return found


def stopped(path: Path, steps: int) -> None:
    with pytest.raises(Stopped):
        run(path, steps, stop=True)


def test_the_same_command_goes_on_until_it_has_ended(tmp_path: Path) -> None:
    assert not run(tmp_path, 1)
    assert not run(tmp_path, 1), "it had ended"
    stopped(tmp_path, 1)
    stopped(tmp_path, 1)
    assert run(tmp_path, 1)
    assert not run(tmp_path, 1)


def test_other_settings_or_processes_begin_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(tmp_path, 1)
    assert not run(tmp_path, 2)
    stopped(tmp_path, 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not run(tmp_path, 1)


def test_a_pipe_may_hold_other_data_and_begins_anew(tmp_path: Path) -> None:
    for _ in range(2):
        with OutputDirectory(tmp_path, "x", {"input": [Path("-")]}, overwrite=True) as out:
            assert not (tmp_path / "made").exists()
            (tmp_path / "made").write_text("x")
            out.ends_run = False  # as where it is stopped


def test_a_run_of_several_directories_ends_once(tmp_path: Path) -> None:
    assert not run(tmp_path, 1, ends_run=False)
    assert run(tmp_path, 1, ends_run=False)
    end_run(tmp_path)
    assert not run(tmp_path, 1)


@pytest.mark.parametrize("at", range(6))
def test_killed_while_it_empties_the_directory_is_nobodys_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    with OutputDirectory(tmp_path, "x", {"steps": 1}) as out:
        for name in ("a", "b", "c", "done.json"):
            (out.path / name).write_text("x")
    unlink, left = Path.unlink, iter(range(at))

    def dying(path: Path, missing_ok: bool = False) -> None:
        if path.parent == tmp_path and not path.name.startswith("."):
            next(left)
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", dying)
        if at < 5:
            with pytest.raises((StopIteration, RuntimeError)):
                run(tmp_path, 1)
        else:
            run(tmp_path, 1)
    if at < 5 and [path for path in tmp_path.iterdir() if path.name in "abc"]:
        with pytest.raises(UsageError, match="add --overwrite"):
            OutputDirectory(tmp_path, "x", {"steps": 1}).__enter__()
    run(tmp_path, 1)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {".lock", ".lock-settings", "settings.json", "inner"}


def test_an_overwritten_stream_that_was_stopped_keeps_its_whole_shards(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(3):
        write_shard(tmp_path / "in" / f"{number}.tar", [make_sample(number)])
    seen: list[str] = []

    def stage(samples: Iterator[Sample]) -> Iterator[Sample]:
        for sample in samples:
            seen.append(sample.key)
            if len(seen) in (2, 3):
                raise Stopped("TERM", "stopped")
            yield sample

    def again() -> None:
        source = open_source([str(tmp_path / "in")])
        run_filter(source, stage, str(tmp_path / "out"), "x", {}, overwrite=True)

    for _ in range(2):
        with pytest.raises(Stopped):
            again()
    again()
    assert [key[-1] for key in seen] == ["0", "1", "1", "1", "2"]
    again()
    assert len(seen) == 8
