"""The test bed: the shift, the captions, the splits, and the shards that the repository ships."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from utilgen_cli.shards.images import decode_rgb
from utilgen_cli.shards.operands import open_source

from .conftest import DATA, ROOT

sys.path += [str(ROOT / "examples" / name) for name in ("tiny", "study")]
import fashion
import judge
import pool

needs_images = pytest.mark.skipif(
    not fashion.SOURCE.exists(), reason="needs the Debian package dataset-fashion-mnist"
)


def test_the_shift_is_seeded_and_moves_what_it_says() -> None:
    images = torch.zeros(64, 1, 32, 32, dtype=torch.uint8)
    images[..., 12:20, 12:20] = 200
    first, again = (
        pool.Shift.draw(64, torch.Generator().manual_seed(5)).apply(images) for _ in range(2)
    )
    assert torch.equal(first, again)
    still = pool.Shift(*(torch.full((64,), v) for v in (0.0, 1.0, 0.0, 0.0, 1.0)))
    torch.testing.assert_close(still.apply(images), images / 255, atol=1e-5, rtol=0)
    right = pool.Shift(*(torch.full((64,), v) for v in (0.0, 1.0, 4 / 32, 0.0, 1.0)))
    torch.testing.assert_close(right.apply(images), images.roll(4, 3) / 255, atol=1e-4, rtol=0)


def test_captions_name_the_fine_class_as_often_as_the_card_says() -> None:
    draws = torch.Generator().manual_seed(0)
    shift = pool.Shift.draw(4000, draws)
    shown = pool.Pool(torch.empty(0), torch.empty(0), fashion.CLASSES, fashion.COARSE, "zeros")
    texts = shown.captions(torch.full((4000,), 5), shift, draws)
    fine = sum("sandal" in text for text in texts) / len(texts)
    assert all("sandal" in text or "shoe" in text for text in texts)
    assert abs(fine - pool.FINE_SHARE) < 0.03
    tilted = [("tilted" in t, abs(d) > 12) for t, d in zip(texts, shift.degrees, strict=True)]
    assert all(is_tilted for said, is_tilted in tilted if said)


def test_a_bundle_is_made_of_any_shards(commands: Path, tmp_path: Path) -> None:
    """Digits in a folder, packed, one step of each part: the bundle draws its own classes."""

    def run(*command: str | Path) -> None:
        done = subprocess.run(list(command), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    images, shards, out = tmp_path / "images", tmp_path / "shards", tmp_path / "model"
    run(sys.executable, ROOT / "examples" / "second" / "images.py", "digits", images)
    assert {p.name for p in images.iterdir()} == {"pool", "real", "val", "test"}
    run(commands / "utilgen", "pack", images / "pool", "-o", shards)
    for part, more in (("clip", ()), ("vae", ()), ("unet", ("--latents", "500"))):
        script = ROOT / "examples" / "tiny" / f"train_{part}.py"
        run(sys.executable, script, out, "--pool", shards, "--steps", "1", "--batch", "8", *more)
    drawn = tmp_path / "drawn"
    run(
        commands / "utilgen", "generate", "-m", out, "--per-class", "1", "--steps", "1", "-o", drawn
    )
    found = [s.facts["class_name"] for s in open_source([str(drawn)]).samples()]
    assert found == sorted(path.name for path in (images / "pool").iterdir())


def test_the_judge_learns_every_image_as_it_is_and_shifted() -> None:
    """Of shards of any size; the labels and the order are those of the pool."""
    shown = pool.open_pool(DATA / "val")
    found = judge.as_seen(DATA / "val")
    n = len(shown.images)
    assert found.images.shape == (2 * n, 3, 32, 32) and found.classes == list(shown.classes)
    assert torch.equal(found.images[:n], shown.images.expand(-1, 3, -1, -1))
    assert torch.equal(found.labels, shown.labels.repeat(2))
    moved = (found.images[n:].float() - found.images[:n].float()).abs().mean((1, 2, 3))
    assert (moved > 2).all() and moved.mean() < 80  # of 255: others, and no noise


@needs_images
def test_further_real_images_are_no_shots_and_none_of_the_others(tmp_path: Path) -> None:
    script = ROOT / "examples" / "tiny" / "make_shards.py"
    options = ["--shots", "0", "--val", "0", "--test", "0", "--further", "3", "--start", "500"]
    subprocess.run([sys.executable, script, tmp_path, *options], check=True, capture_output=True)
    assert [path.name for path in tmp_path.iterdir()] == ["further-real"]
    keys = {s.key for s in open_source([str(tmp_path / "further-real")]).samples()}
    known = {s.key for p in ("real", "val") for s in open_source([str(DATA / p)]).samples()}
    assert len(keys) == 30 and not keys & known


@needs_images
def test_the_task_shares_no_image_with_pre_training() -> None:
    _, labels = fashion.load("train")
    pretrain, task = fashion.split(labels)
    assert (len(pretrain), len(task)) == (50_000, 10_000)
    seen = set(pretrain.tolist())
    for part in ("real", "val"):
        index = [s.facts["index"] for s in open_source([str(DATA / part)]).samples()]
        assert len(index) == 160 and not seen & set(index)


@needs_images
@pytest.mark.parametrize(
    ("part", "source"), [("real", "train"), ("val", "train"), ("test", "t10k")]
)
def test_the_shipped_shards_are_the_images_that_they_name(part: str, source: str) -> None:
    images, labels = fashion.load(source)
    for sample in open_source([str(DATA / part)]).samples():
        i = sample.facts["index"]
        assert sample.label == labels[i]
        assert np.array_equal(decode_rgb(sample)[..., 0], images[i].numpy())


def test_no_test_key_is_among_the_shots_or_the_validation_images() -> None:
    keys = {
        p: {s.key for s in open_source([str(DATA / p)]).samples()} for p in ("real", "val", "test")
    }
    assert not keys["real"] & keys["val"]
    assert not keys["test"] & (keys["real"] | keys["val"])
    assert len(keys["test"]) == 2000
