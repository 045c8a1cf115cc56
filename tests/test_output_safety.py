"""Outputs: nothing is lost, mixed or taken for done that is not."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from utilgen_cli.commands.streams import _is_published, _write_all, run_filter, run_reduction
from utilgen_cli.commands.valuing import ScoreRequest
from utilgen_cli.report.evaluation import prepare_report
from utilgen_cli.runtime.contents import contents
from utilgen_cli.runtime.errors import NoInput, UsageError, UtilgenError
from utilgen_cli.runtime.files import open_locked
from utilgen_cli.runtime.output import OutputDirectory
from utilgen_cli.runtime.ranks import world
from utilgen_cli.shards.check import check_shards
from utilgen_cli.shards.folder import list_images
from utilgen_cli.shards.operands import open_source, parse_part
from utilgen_cli.shards.quarantine import Quarantine
from utilgen_cli.shards.sample import Sample
from utilgen_cli.shards.writer import write_shard

from .conftest import Run, make_sample, tar_bytes


def shard(path: Path, *numbers: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_shard(path, [make_sample(n) for n in numbers])
    return path


def same(samples: Iterator[Sample]) -> Iterator[Sample]:
    yield from samples


def run(inputs: list[Path], out: Path, **options: object) -> int:
    source = open_source([str(p) for p in inputs])
    return run_filter(source, same, str(out), "x", {"input": list(source.paths)}, **options)  # type: ignore[arg-type]


def test_overwrite_never_empties_its_own_input(tmp_path: Path) -> None:
    run([shard(tmp_path / "in" / "a.tar", 1, 2)], tmp_path / "out")
    with pytest.raises(UsageError, match="which --overwrite empties"):
        run([tmp_path / "out" / "a.tar"], tmp_path / "out", overwrite=True)
    assert check_shards([tmp_path / "out"]).samples == 2


@pytest.mark.parametrize("removed", range(7))
def test_emptying_may_be_killed(
    removed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left is nobody else's, is not taken for done, and misses no shard unseen."""
    left, unlink = [None] * removed, Path.unlink

    def killed(path: Path, missing_ok: bool = False) -> None:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        unlink(path, missing_ok)

    out = tmp_path / "out"
    run([shard(tmp_path / "in" / f"{name}.tar", n) for n, name in enumerate("ab")], out)
    (out / "done.json").write_text("{}")
    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(Path, "unlink", killed)
        OutputDirectory(out, "x", {}, overwrite=True).__enter__().__exit__(None, None, None)
    assert (out / "done.json").exists() == (removed == 0)
    if removed == 2:
        for operand in (out, tmp_path / "{out,in}"):
            assert [row["why"] for row in check_shards([operand]).broken] == ["it is gone"]
    with OutputDirectory(out, "x", {}, overwrite=True):
        assert [p.name for p in out.iterdir() if p.name[0] != "."] == ["settings.json"]


@pytest.mark.parametrize("settings", ["[]", '{"editor": 1}', '{"command": "pack"}', "torn {"])
def test_what_another_made_is_neither_emptied_nor_mixed_with(tmp_path: Path, settings: str) -> None:
    (tmp_path / "settings.json").write_text(settings)
    (tmp_path / "precious.txt").write_text("x")
    with (
        pytest.raises(UsageError, match="Name an empty or new directory"),
        OutputDirectory(tmp_path, "x", {}, overwrite=True),
    ):
        pass
    assert (tmp_path / "precious.txt").exists()


def test_other_contents_under_the_same_name_are_other_settings(tmp_path: Path) -> None:
    given = shard(tmp_path / "in.tar", 1)
    run([given], tmp_path / "out")
    assert run([given], tmp_path / "out") == 0
    shard(given, 1)  # the same made again
    assert run([given], tmp_path / "out") == 0
    shard(given, 2)
    with pytest.raises(UsageError, match="input contents was"):
        run([given], tmp_path / "out")
    (tmp_path / "tokens").mkdir()
    weights = tmp_path / "tokens" / "a.safetensors"
    for number, data in enumerate((b"one", b"one", b"two")):
        weights.write_bytes(data)
        settings = {"tokens": tmp_path / "tokens"}
        if number < 2:
            with OutputDirectory(tmp_path / "drawn", "x", settings) as out:
                (out.path / "00000.tar").write_bytes(b"drawn")
    with (
        pytest.raises(UsageError, match="tokens contents was"),
        OutputDirectory(tmp_path / "drawn", "x", settings),
    ):
        pass


def test_a_key_in_two_data_sets_is_no_fault(tmp_path: Path) -> None:
    shard(tmp_path / "synth" / "a.tar", 1)
    shard(tmp_path / "scored" / "a.tar", 1)
    assert not check_shards([tmp_path / "synth", tmp_path / "scored"], remove=True).broken
    assert check_shards([tmp_path / "synth", tmp_path / "scored"]).samples == 2
    with pytest.raises(UsageError, match="a pipe cannot be checked"):
        check_shards([Path("-")])


def numbered(count: int, start: int = 0) -> Iterator[Sample]:
    yield from (make_sample(n) for n in range(start, start + count))


def reduce(count: int, out: Path, start: int = 0) -> int:
    return run_reduction(numbered(count, start), str(out), "x", {})


def test_a_reduction_whose_shard_is_gone_is_done_again(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("utilgen_cli.commands.streams.SHARD_SIZE", 2)
    assert reduce(5, tmp_path / "out") == 5
    assert reduce(5, tmp_path / "out") == 0
    whole = {p.name: p.read_bytes() for p in (tmp_path / "out").glob("*.tar")}
    assert len(whole) == 3
    (tmp_path / "out" / "00002.tar").unlink()
    assert reduce(5, tmp_path / "out") == 5
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").glob("*.tar")} == whole


def test_a_shorter_stream_leaves_no_shards_of_a_longer_one(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("utilgen_cli.commands.streams.SHARD_SIZE", 2)
    _write_all(numbered(7), tmp_path)
    (tmp_path / "00003.tar").unlink()
    _write_all(numbered(3, 10), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".counted.json", ".shards.json", "00000.tar", "00000_stats.json", "00001.tar", "00001_stats.json",
    ]  # fmt: skip
    assert _is_published(tmp_path)
    assert json.loads((tmp_path / ".shards.json").read_text()) == ["00000.tar", "00001.tar"]


@pytest.mark.parametrize("names", [("A/a.tar", "B/a.tar"), ("d.x1", "d.x2")])
@pytest.mark.parametrize("part", [None, "0/2"])
def test_two_inputs_never_become_one_output(
    tmp_path: Path, names: tuple[str, str], part: str | None
) -> None:
    inputs = [shard(tmp_path / name, n) for n, name in enumerate(names)]
    with pytest.raises(UsageError, match="two input shards would become"):
        run(inputs, tmp_path / "out", part=part)


def test_one_shard_has_one_writer(tmp_path: Path) -> None:
    def writing() -> Iterator[Sample]:
        yield make_sample(1)
        with pytest.raises(UtilgenError, match="another process writes this shard"):
            write_shard(tmp_path / "a.tar", [make_sample(2)])
        yield make_sample(3)

    assert write_shard(tmp_path / "a.tar", writing()) == 2
    assert check_shards([tmp_path]).samples == 2


def test_a_file_that_got_its_name_in_the_meantime_is_not_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between another's opening of the temporary file and its lock, the writer renames it."""
    temporary, final = tmp_path / "a.tmp", tmp_path / "a"
    temporary.write_bytes(b"whole")
    lock = fcntl.flock

    def late(file: object, kind: int) -> None:
        if temporary.exists() and not final.exists():
            temporary.replace(final)
        lock(file, kind)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "flock", late)
    with open_locked(temporary, "file") as file:
        file.write(b"mine")
    assert (final.read_bytes(), temporary.read_bytes()) == (b"whole", b"mine")


def test_parts_of_arrays_and_pipes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("ID", "6"), ("MIN", "2"), ("STEP", "2"), ("COUNT", "5")):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    assert parse_part("slurm") == (2, 5)
    with pytest.raises(UsageError, match="a pipe has none"):
        open_source(["-"]).part("0/2")
    monkeypatch.setenv("RANK", "abc")
    assert world() == (0, 1)


@pytest.mark.parametrize(("first", "last", "step", "count", "task"), [(1, 6, 1, 3, 4), (1, 4, 1, 2, 1), (0, 4, 2, 3, 3)])  # fmt: skip
def test_an_array_that_is_no_range_has_no_parts(
    first: int, last: int, step: int, count: int, task: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--array=1,4,6`: each task would take a share that others take too, or none at all."""
    variables = {"MIN": first, "MAX": last, "STEP": step, "COUNT": count, "ID": task}
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    with pytest.raises(UsageError, match=r"not a range.*--part I/N"):
        parse_part("slurm")


def test_what_another_program_made_is_read_and_never_removed(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    whole = tar_bytes([make_sample(1), make_sample(2)])
    (foreign / "00000.tar").write_bytes(whole)
    (foreign / "00000_stats.json").write_text('{"count": 2, "successes": 2}')  # img2dataset's
    assert check_shards([foreign], remove=True).samples == 2
    (foreign / "00001.tar").write_bytes(whole[:2048])
    assert len(check_shards([foreign], remove=True).broken) == 1
    assert (foreign / "00001.tar").exists()
    (foreign / "settings.json").write_text('{"command": "pack"}')
    check_shards([foreign], remove=True)
    assert not (foreign / "00001.tar").exists()


def test_a_key_that_stands_twice_in_a_shard_and_a_shard_that_is_gone_are_told(
    tmp_path: Path,
) -> None:
    (tmp_path / "00000.tar").write_bytes(
        tar_bytes([make_sample(1), make_sample(2), make_sample(1)])
    )
    shard(tmp_path / "00001.tar", 5).unlink()
    broken = check_shards([tmp_path]).broken
    assert [row["why"].split(": ")[-1] for row in broken] == ["its key stands twice", "it is gone"]


def test_a_directory_that_lacks_a_finished_shard_is_not_read(utilgen: Run, tmp_path: Path) -> None:
    drawn, listed = tmp_path / "drawn", tmp_path / "listed"
    for directory in (drawn, listed):
        for number in range(3):
            shard(directory / f"{number:05d}.tar", number)
    (listed / ".shards.json").write_text('["00000.tar", "00001.tar", "00002.tar"]')
    (listed / "00001_stats.json").unlink()
    for directory in (drawn, listed):
        (directory / "00001.tar").unlink()
        failed = utilgen("view", directory, check=False)
        assert failed.returncode == 65
        assert b"00001.tar: was finished, and is gone. Run" in failed.stderr
        checked = utilgen("check", directory, "--json", check=False)
        broken = json.loads(checked.stdout)["broken"]
        assert [row["why"] for row in broken] == ["it is gone"] and checked.returncode == 65
        left = [str(directory / f"0000{n}.tar") for n in (0, 2)]
        assert len(list(open_source(left).samples())) == 2


def test_what_was_not_finished_is_not_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unfinished parts, a stream that was killed as it got its names, another program's figures."""
    parts = tmp_path / "parts"
    shard(parts / "00000.tar", 1)
    for name in (".00001.tar.partial", ".00001.tar.journal", "00002.tar.tmp"):
        (parts / name).write_text("x")
    (parts / "00003_stats.json").write_text('{"count": 2, "successes": 2}')
    (parts / "00004_stats.json").write_text("torn {")
    (parts / ".shards.json").write_text('{"of": "another program"}')
    assert len(open_source([str(parts)]).paths) == 1
    stream, replace, left = tmp_path / "stream", Path.replace, [None] * 10

    def killed(path: Path, target: Path) -> None:
        if path.parent.name == ".incoming" and not path.name.endswith(".tmp"):
            if not left:
                raise KeyboardInterrupt
            left.pop()
        replace(path, target)

    monkeypatch.setattr("utilgen_cli.commands.streams.SHARD_SIZE", 2)
    monkeypatch.setattr(Path, "replace", killed)
    for renamed in range(1, 6):
        left[:] = [None] * renamed
        stream.mkdir()
        with pytest.raises(KeyboardInterrupt):
            _write_all(numbered(5), stream)
        assert len(open_source([str(stream)]).paths) == (renamed + 1) // 2
        shutil.rmtree(stream)


def test_a_shard_that_is_removed_is_told_once(tmp_path: Path) -> None:
    broken = shard(tmp_path / "00000.tar", 1)
    broken.write_bytes(broken.read_bytes()[:2048])
    (tmp_path / ".shards.json").write_text('["00000.tar"]')
    assert len(check_shards([tmp_path], remove=True).broken) == 1
    assert not broken.exists()


def test_other_contents_of_shards_without_statistics_are_other_contents(tmp_path: Path) -> None:
    """Of the same size, since a tar is padded."""
    found = []
    for label in (0, 1):
        (tmp_path / "a.tar").write_bytes(tar_bytes([make_sample(1, label)]))
        found.append((contents([tmp_path]), (tmp_path / "a.tar").stat().st_size))
    assert found[0][0] != found[1][0] and found[0][1] == found[1][1]


def test_packed_again_from_other_images_is_refused(utilgen: Run, tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        (tmp_path / "photos" / name / "1.png").write_bytes(make_sample(1).members["png"])
    first = utilgen("pack", "photos", "-o", "real")
    assert b"packed 2 images of 2 classes" in first.stderr
    assert utilgen("pack", "photos", "-o", "real").stderr == first.stderr
    (tmp_path / "photos" / "dog").rename(tmp_path / "photos" / "wolf")
    done = utilgen("pack", "photos", "-o", "real", check=False)
    assert done.returncode == 2 and b"other settings" in done.stderr


def test_a_list_from_a_spreadsheet_may_begin_with_a_mark(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("path,label\nmissing.png,cat\n", encoding="utf-8-sig")
    with pytest.raises(NoInput, match=r"missing\.png"):
        list_images(tmp_path / "a.csv")


def test_a_report_that_cannot_be_written_is_told_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "dir.html").mkdir()
    for name in ("file.txt", "dir.html", "none.txt"):
        with pytest.raises(UsageError, match="--report"):
            prepare_report(tmp_path / name)
    prepare_report(tmp_path / "new" / "page.html")
    assert (tmp_path / "new").is_dir()


def test_shards_that_only_lookahead_reads_are_refused_without_it() -> None:
    aside = Quarantine()
    with pytest.raises(UsageError, match="Add --lookahead"):
        ScoreRequest("-", "loss", None, False, ["real"], [], False, None, aside).check()
    ScoreRequest("-", "loss", None, True, ["real"], ["val"], False, None, aside).check()
