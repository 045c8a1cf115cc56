"""Planted copies of test images are found however they were disguised; other images are not."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image

from utilgen_cli.classification.data import LabelledImages, load_images
from utilgen_cli.classification.leaks import Prints, find_leaks
from utilgen_cli.shards.operands import open_source

from .conftest import DATA


def jpeg(image: torch.Tensor) -> torch.Tensor:
    out = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(out, "JPEG", quality=80)
    return torch.from_numpy(np.array(Image.open(out))).permute(2, 0, 1)


def fashion(part: str) -> LabelledImages:
    return load_images(open_source([str(DATA / part)]), 32)


def test_the_example_data_has_no_leak() -> None:
    prints = Prints.of(fashion("test"))
    for part in ("real", "val"):
        found = find_leaks(fashion(part), prints)
        assert (found["same_key"], found["same_pixels"], found["near"]) == (0, 0, 0)
        assert found["pairs"] == []


def test_disguised_copies_are_found() -> None:
    test, real = fashion("test").subset(range(200)), fashion("real").subset(range(40))
    planted = [
        test.images[3],  # as it is
        jpeg(test.images[50]),  # re-encoded
        test.images[90].flip(-1),  # mirrored
        (test.images[120] * 0.6).byte(),  # darker
    ]
    real.images[:4] = torch.stack(planted)
    real.keys[7] = test.keys[11]
    found = find_leaks(real, Prints.of(test))
    assert (found["same_key"], found["same_pixels"], found["near"]) == (1, 1, 4)
    pairs = {(p["key"], p["test_key"]) for p in found["pairs"]}
    assert pairs == {(real.keys[i], test.keys[j]) for i, j in enumerate((3, 50, 90, 120))}
