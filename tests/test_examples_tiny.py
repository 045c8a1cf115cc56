"""The test bed: the shift, the captions, the splits, and the shards that the repository ships."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from utilgen_cli.shards.images import decode_rgb
from utilgen_cli.shards.operands import open_source

from .conftest import DATA, ROOT

sys.path.append(str(ROOT / "examples" / "tiny"))
import fashion

needs_images = pytest.mark.skipif(
    not fashion.SOURCE.exists(), reason="needs the Debian package dataset-fashion-mnist"
)


def test_the_shift_is_seeded_and_moves_what_it_says() -> None:
    images = torch.zeros(64, 32, 32, dtype=torch.uint8)
    images[:, 12:20, 12:20] = 200
    first, again = (
        fashion.Shift.draw(64, torch.Generator().manual_seed(5)).apply(images) for _ in range(2)
    )
    assert torch.equal(first, again)
    still = fashion.Shift(*(torch.full((64,), v) for v in (0.0, 1.0, 0.0, 0.0, 1.0)))
    torch.testing.assert_close(still.apply(images)[:, 0], images / 255, atol=1e-5, rtol=0)
    right = fashion.Shift(*(torch.full((64,), v) for v in (0.0, 1.0, 4 / 32, 0.0, 1.0)))
    torch.testing.assert_close(
        right.apply(images)[:, 0], images.roll(4, 2) / 255, atol=1e-4, rtol=0
    )


def test_captions_name_the_fine_class_as_often_as_the_card_says() -> None:
    draws = torch.Generator().manual_seed(0)
    shift = fashion.Shift.draw(4000, draws)
    texts = fashion.captions(torch.full((4000,), 5), shift, draws)
    fine = sum("sandal" in text for text in texts) / len(texts)
    assert all("sandal" in text or "shoe" in text for text in texts)
    assert abs(fine - fashion.FINE_SHARE) < 0.03
    tilted = [("tilted" in t, abs(d) > 12) for t, d in zip(texts, shift.degrees, strict=True)]
    assert all(is_tilted for said, is_tilted in tilted if said)


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
