"""`utilgen value train` and `utilgen value score` as programs."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile

import pytest

from tests.conftest import tar_bytes
from tests.valuation_toys import as_samples, colours, write_shards
from utilgen_cli.shards.writer import write_shard

TRAIN = ("--steps", "12", "--folds", "2", "--snapshots", "1", "-q")


def train_in(commands, root, *more):
    args = ["--real", "real", "--synthetic", "synth", "--val", "val", "-o", "value", *TRAIN, *more]
    command = [str(commands / "utilgen"), "value", "train", *args]
    return subprocess.run(command, cwd=root, capture_output=True, check=True)


@pytest.fixture(scope="module")
def world(commands, tmp_path_factory):
    """Shards, and a value model trained by the command."""
    root = tmp_path_factory.mktemp("world")
    sets = {"real": colours(8, 1), "synth": colours(10, 2), "val": colours(4, 3)}
    for name, data in sets.items():
        write_shards(root / name, data)
    done = train_in(commands, root)
    assert done.stdout == b"value\n"
    assert b"canary" not in done.stdout
    return root


def test_score_streams_a_tar_that_tarfile_reads(world, utilgen):
    done = utilgen("value", "score", world / "synth", "--value", world / "value", "-q")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
        names = tar.getnames()
        facts = json.load(tar.extractfile(names[3]))
    assert [n.split(".", 1)[1] for n in names[:4]] == ["png", "cls", "json", "utility.json"]
    assert len(names) == 4 * 30
    assert facts["method"] == "weight-net" and 0 <= facts["utility"] <= 1


def test_real_shards_validate_nothing_and_no_model_is_lost_for_it(world, utilgen, tmp_path):
    shutil.copytree(world / "value", tmp_path / "value")
    args = ("value", "train", "--real", world / "real", "--val", world / "real", "-o", "value")
    done = utilgen(*args, "--overwrite", check=False)
    assert done.returncode == 2 and b"is named by --real too. Leave --val out" in done.stderr
    assert (tmp_path / "value" / "value.json").exists()


def test_score_maps_shards_and_resumes(world, utilgen, tmp_path):
    args = ("value", "score", world / "synth", "--value", world / "value", "-o", "scored")
    utilgen(*args)
    first = (tmp_path / "scored" / "00000.tar").stat()
    utilgen(*args)
    assert (tmp_path / "scored" / "00000.tar").stat().st_mtime_ns == first.st_mtime_ns


def test_the_summary_of_a_resumed_run_is_that_of_a_whole_one(world, utilgen, tmp_path):
    data = as_samples(colours(20, 5))
    for name, half in zip("ab", (data[::2], data[1::2]), strict=True):
        (tmp_path / f"{name}.tar").write_bytes(tar_bytes(half))
    args = ("value", "score", "--value", world / "value", "--agreed", "-q", "--json")
    whole = utilgen(*args, "a.tar", "b.tar", "-o", "whole").stderr
    parts = [
        json.loads(utilgen(*args, "a.tar", "b.tar", "-o", "parts", "--part", f"{i}/2").stderr)
        for i in (0, 1)
    ]
    assert sum(p["all"]["samples"] for p in parts) == json.loads(whole)["all"]["samples"] == 60
    assert utilgen(*args, "a.tar", "b.tar", "-o", "parts").stderr == whole
    (tmp_path / "whole" / "b.tar").unlink()
    assert utilgen(*args, "a.tar", "b.tar", "-o", "whole").stderr == whole


def test_the_summary_is_one_json_line_on_stderr(world, utilgen):
    done = utilgen("value", "score", world / "synth", "--value", world / "value", "-q", "--json")
    summary = json.loads(done.stderr.splitlines()[-1])
    assert summary["all"]["samples"] == 30
    assert set(summary["classes"]) == {"red", "green", "blue"}


def test_select_and_lookahead(world, utilgen):
    done = utilgen(
        "value", "score", world / "synth", "--value", world / "value", "--select", 6, "--lookahead",
        "--real", world / "real", "--val", world / "val", "-q", "--json",
    )  # fmt: skip
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
        assert len(tar.getnames()) == 4 * 6
    summary = json.loads(done.stderr.splitlines()[-1])
    assert summary["lookahead"]["samples"] == 30
    assert (summary["all"]["samples"], summary["passed"]) == (30, 6)


def test_what_was_passed_on_is_told(world, utilgen, tmp_path):
    samples = as_samples(colours(5, 9))
    for number, sample in enumerate(samples):
        del sample.members["json"]
        sample.members["cls"] = b"%d" % ((sample.label + number % 2) % 3)
    write_shard(tmp_path / "half.tar", samples)
    options = ["--value", world / "value", "--real", world / "real", "--val", world / "val"]
    done = utilgen("value", "score", "half.tar", *options, "--agreed", "--lookahead")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
        passed = len(tar.getnames()) // 3
    assert 0 < passed < 15 and f"{passed} of 15 passed on" in done.stderr.decode()
    assert b"points of accuracy" in done.stderr


def test_train_prints_json_and_is_done_the_second_time(commands, world):
    again = train_in(commands, world, "--json")
    assert json.loads(again.stdout) == json.loads((world / "value" / "value.json").read_text())


@pytest.mark.parametrize(
    "args, code, line",
    [
        (["score", "SYNTH", "--value", "nowhere"], 66, "Make one with `utilgen value train`"),
        (["score", "SYNTH", "--value", "VALUE", "--method", "data-oob"], 2, "weight-net"),
        (["score", "SYNTH", "--value", "VALUE", "--lookahead"], 2, "Add --real and --val"),
        (["score", "OTHER", "--value", "VALUE"], 65, "the value model knows 3 classes"),
        (["train", "--real", "SYNTH", "-o", "x", "--meta-gradient", "y"], 2, "jvp or exact-double"),
        (["train", "--real", "SYNTH", "-o", "x", "--folds", "1"], 2, "Add --val"),
        (["train", "--real", "SYNTH", "-o", "x", "--pretrained"], 2, "no weights of small-cnn"),
    ],
)  # fmt: skip
def test_errors_are_one_line_that_says_what_to_do(world, utilgen, tmp_path, args, code, line):
    other = as_samples(colours(1, 5))[0].with_member("cls", b"7")
    write_shard(tmp_path / "other.tar", [other])
    names = {"SYNTH": world / "synth", "VALUE": world / "value", "OTHER": "other.tar"}
    done = utilgen("value", *(names.get(a, a) for a in args), "-q", check=False)
    assert done.returncode == code
    errors = done.stderr.decode().splitlines()
    assert errors[-1].startswith(f"utilgen: value {args[0]}: ") and line in errors[-1]
    assert "Traceback" not in done.stderr.decode()
    assert done.stdout == b"" or code == 65
