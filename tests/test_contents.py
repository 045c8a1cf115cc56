"""What lies in an input is a setting: all that is read of it, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from utilgen_cli.classification.arms import REAL, Arm
from utilgen_cli.classification.evaluation import plan_runs
from utilgen_cli.classification.train import TrainConfig
from utilgen_cli.runtime.contents import contents, directory_named
from utilgen_cli.runtime.output import OutputDirectory

from .classification_toys import colour_images, shards_of
from .conftest import ROOT, Run, flip_last_byte, make_sample, tar_bytes
from .random_bundle import make_bundle

CLIP = ROOT / "utilgen_cli" / "tiny" / "open_clip"
WEIGHTS = "open_clip_model.safetensors"
FACTS = {"noise": {"mode": "single"}, "summary": {"seconds": 9.9, "unet_calls": 8}}


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "policy.safetensors").write_bytes(b"prompts")
    write(tmp_path / "policy" / "policy.json", FACTS)
    return tmp_path / "policy"


def write(path: Path, facts: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(facts, indent=2))


@pytest.mark.parametrize(
    "name", ["unet/config.json", "scheduler/scheduler_config.json", "utilgen.json",
             "tokenizer/tokenizer.json"],
)  # fmt: skip
def test_a_small_file_of_a_model_is_part_of_it(name: str, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    before = contents([bundle])
    (bundle / name).parent.mkdir(exist_ok=True)
    with (bundle / name).open("a") as file:
        file.write(" ")
    assert contents([bundle]) != before
    assert contents([bundle / "unet"]) is not None


def test_how_a_policy_treats_the_noise_is_part_of_it(policy: Path) -> None:
    before = contents([policy])
    write(policy / "policy.json", {**FACTS, "noise": {"mode": "zigzag"}})
    assert contents([policy]) != before


def test_the_time_that_it_took_and_bookkeeping_are_not(policy: Path) -> None:
    before = contents([policy])
    write(policy / "policy.json", {**FACTS, "summary": {"seconds": 10.25, "unet_calls": 16}})
    for name in ("settings.json", "00000_stats.json", ".shards.json", ".lock", ".lock-turn",
                 "checkpoint.safetensors", "checkpoint.safetensors.previous", "README.md"):  # fmt: skip
        (policy / name).write_text("{}")
    assert contents([policy]) == before


def test_what_is_made_inside_an_input_is_not(policy: Path) -> None:
    before = contents([policy])
    (policy / "deep").mkdir()
    with OutputDirectory(policy / "deep" / "synth", "x", {}) as out:
        (out.path / "a.safetensors").write_bytes(b"mine")
        assert contents([policy]) == before
    (out.path / ".lock").unlink()  # as a copy may lack it
    assert contents([policy]) == before


def test_of_shards_the_ones_that_are_read(tmp_path: Path) -> None:
    (tmp_path / "00000.tar").write_bytes(tar_bytes([make_sample(1)]))
    before = contents([tmp_path])
    assert before == contents([tmp_path / "00000.tar"])
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "00000.tar").write_bytes(tar_bytes([make_sample(2)]))
    write(tmp_path / "report" / "eval.json", {})
    assert contents([tmp_path]) == before
    (tmp_path / "00001.tar").write_bytes(tar_bytes([make_sample(2)]))
    assert contents([tmp_path]) != before


def test_a_model_may_be_put_together_with_links(policy: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "unet").symlink_to(policy)
    (policy / "round").symlink_to(tmp_path / "model")
    before = contents([tmp_path / "model"])
    assert before is not None
    (policy / "policy.safetensors").write_bytes(b"others")
    assert contents([tmp_path / "model"]) != before


def test_a_run_inside_its_adapter_is_found_done(utilgen: Run, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    (tmp_path / "real.tar").write_bytes(tar_bytes([make_sample(n, n % 2, 32) for n in range(4)]))
    quick = ("--steps", 1, "-q")
    utilgen("lora", "real.tar", "-m", bundle, *quick, "-o", "ad")
    drawing = ["generate", "-m", bundle, "--adapter", "ad", *quick, "-o", "ad/synth"]
    for part in ("0/2", "1/2"):
        utilgen(*drawing, "--shard-size", 1, "--part", part)
    again = utilgen(*drawing, "--shard-size", 1, "--json")
    assert json.loads(again.stderr)["samples"] == 0


def test_eval_knows_a_tower_by_its_weights(tmp_path: Path) -> None:
    archs = ["small-cnn", "open_clip:ViT-B-32/openai", f"open_clip:{tmp_path / 'clip'}"]
    arm, config = Arm("real", REAL, colour_images(2)), TrainConfig()

    def names() -> list[str]:
        return [run.name for run in plan_runs([arm], archs, [0], config, {})]

    clip = shutil.copytree(CLIP, tmp_path / "clip")
    before = names()
    assert names() == before
    flip_last_byte(clip / WEIGHTS)
    assert [a == b for a, b in zip(names(), before, strict=True)] == [True, True, False]


def test_value_train_knows_a_tower_by_its_weights(utilgen: Run, tmp_path: Path) -> None:
    shards_of(tmp_path / "real", colour_images(4))
    clip = shutil.copytree(CLIP, tmp_path / "clip")
    train = ["value", "train", "--real", "real", "--smoke", "-q", "-o", "value", "--arch"]
    utilgen(*train, "open_clip:clip")
    utilgen(*train, "open_clip:clip")
    flip_last_byte(clip / WEIGHTS)
    other = utilgen(*train, "open_clip:clip", check=False)
    assert other.returncode == 2 and b"arch files contents was" in other.stderr


def test_a_directory_is_named_in_one_of_two_ways(tmp_path: Path) -> None:
    assert directory_named(f"local-dir:{tmp_path}") == directory_named(str(tmp_path)) == tmp_path
    assert {directory_named(name) for name in (None, "", "ViT-B-32:openai", "x" * 5000)} == {None}


def test_a_lock_alone_makes_no_output_of_a_part(policy: Path) -> None:
    """A run that was refused there leaves one."""
    part = policy / "part"
    part.mkdir()
    (part / "w.safetensors").write_bytes(b"a" * 99)
    before = contents([policy])
    (part / ".lock").touch()
    assert contents([policy]) == before
    (part / "w.safetensors").write_bytes(b"b" * 99)
    assert contents([policy]) != before
