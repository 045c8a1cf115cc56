"""Data: shards become the tensors that their images are; augmentation is what a loop would do."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utilgen_cli.classification import data as data_module
from utilgen_cli.classification.data import (
    agree,
    augment,
    concatenate,
    distort,
    load_images,
    shuffled_batches,
)
from utilgen_cli.runtime.errors import BadInput, NoInput
from utilgen_cli.shards.operands import open_source
from utilgen_cli.shards.writer import write_shard

from .classification_toys import NAMES, colour_images, samples_of, shards_of


def test_shards_come_back_as_the_images_they_hold(tmp_path: Path) -> None:
    data = colour_images(4)
    back = load_images(shards_of(tmp_path / "s", data), 16)
    assert torch.equal(back.images, data.images)
    assert torch.equal(back.labels, data.labels)
    assert back.keys == data.keys
    assert back.classes == NAMES


def test_large_sets_in_a_mapped_file_equal_those_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = colour_images(6)
    source = shards_of(tmp_path / "s", data)
    monkeypatch.setattr(data_module, "IN_MEMORY", 5 * 3 * 16 * 16)
    mapped = load_images(source, 16)
    assert torch.equal(mapped.images, data.images)
    assert torch.equal(mapped.subset([3, 1]).images, data.images[[3, 1]])


def test_cut_and_joined_sets_in_a_mapped_file_equal_those_in_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, other = colour_images(50), colour_images(40, seed=1)
    index = torch.randperm(150, generator=torch.Generator().manual_seed(0))[:130]
    plain = (one.subset(index), concatenate([one, other]))
    monkeypatch.setattr(data_module, "IN_MEMORY", 1)
    for here, there in zip(plain, (one.subset(index), concatenate([one, other])), strict=True):
        assert torch.equal(here.images, there.images) and torch.equal(here.labels, there.labels)
        assert here.keys == there.keys
    assert torch.equal(plain[0].images, one.images[index])


def test_labels_and_names_must_be_those_of_the_task(tmp_path: Path) -> None:
    source = shards_of(tmp_path / "s", colour_images(2))
    with pytest.raises(BadInput, match="not one of the 2 classes"):
        load_images(source, 16, NAMES[:2])
    with pytest.raises(BadInput, match="'green' here and 'verde' before"):
        load_images(source, 16, ["red", "verde", "blue"])


def test_a_stray_number_is_no_class(tmp_path: Path) -> None:
    stray = replace(samples_of(colour_images(1))[0], key="stray")
    stray.members["cls"] = b"100000000"
    write_shard(tmp_path / "0.tar", [*samples_of(colour_images(1)), stray])
    with pytest.raises(BadInput, match="class 100000000 is the highest of 4 classes"):
        load_images(open_source([str(tmp_path / "0.tar")]), 16)


def test_no_samples_is_no_input(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", [])
    with pytest.raises(NoInput):
        load_images(open_source([str(tmp_path / "0.tar")]), 16)


def test_a_sample_without_a_name_takes_that_of_the_others(tmp_path: Path) -> None:
    first, second = samples_of(colour_images(2).subset([0, 1]))
    unnamed = first.with_member("json", b'{"class_name": null}')
    write_shard(tmp_path / "0.tar", [unnamed, second])
    assert first.label == second.label
    found = load_images(open_source([str(tmp_path)]), 16)
    assert found.classes[first.label] == second.facts["class_name"]


def test_samples_without_facts_are_named_by_their_label(tmp_path: Path) -> None:
    samples = samples_of(colour_images(1))
    for sample in samples:
        del sample.members["json"]
    write_shard(tmp_path / "0.tar", samples)
    source = open_source([str(tmp_path / "0.tar")])
    unnamed = load_images(source, 16)
    assert unnamed.classes == ["0", "1", "2"] and unnamed.unnamed == {0, 1, 2}
    named = load_images(shards_of(tmp_path / "named", colour_images(1)), 16, unnamed)
    agree([unnamed, named])
    assert unnamed.classes == named.classes == NAMES and not unnamed.unnamed
    other = replace(named, classes=["red", "verde", "blue"])
    with pytest.raises(BadInput, match="class 1 is 'verde' here and 'green' before"):
        agree([named, other])


@given(seed=st.integers(0, 99), pad=st.integers(0, 4))
@settings(max_examples=20, deadline=None)
def test_augmented_images_are_mirrored_crops_of_the_padded_ones(seed: int, pad: int) -> None:
    images = torch.rand(5, 3, 8, 8)
    out = augment(images, torch.Generator().manual_seed(seed), padding=pad)
    for image, got in zip(images.numpy(), out.numpy(), strict=True):
        padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)))
        crops = [
            padded[:, y : y + 8, x : x + 8] for y in range(2 * pad + 1) for x in range(2 * pad + 1)
        ]
        assert any(np.array_equal(got, c) or np.array_equal(got, c[:, :, ::-1]) for c in crops)


def test_augmentation_moves_and_mirrors_and_follows_its_generator() -> None:
    image = torch.rand(1, 3, 8, 8).expand(512, -1, -1, -1)
    draw = [augment(image, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])
    assert len({d.numpy().tobytes() for d in draw[0]}) == 18  # 3 x 3 shifts, mirrored or not
    plain = augment(image, torch.Generator().manual_seed(0), flip=False)
    assert len({d.numpy().tobytes() for d in plain}) == 9


@pytest.mark.parametrize("change", [augment, distort])
def test_processes_that_share_a_batch_draw_as_one_does(change: Callable[..., torch.Tensor]) -> None:
    images = torch.rand(7, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    whole = change(images, torch.Generator().manual_seed(0))
    for rank in range(2):
        share = (rank, 2, 7)
        part = change(images[rank::2], torch.Generator().manual_seed(0), share=share)
        assert torch.equal(part, whole[rank::2])


def test_half_of_the_images_are_distorted_within_bounds() -> None:
    """A black image with a grey square of 8 pixels in its middle."""
    image = torch.zeros(3, 32, 32)
    image[:, 12:20, 12:20] = 0.5
    out = distort(image.expand(400, -1, -1, -1), torch.Generator().manual_seed(0))
    moved = augment(image.expand(400, -1, -1, -1), torch.Generator().manual_seed(0))
    plain = (out == moved).flatten(1).all(1)
    assert 150 < plain.sum() < 250
    turned = out[~plain]
    gammas = torch.log2(torch.log(turned.flatten(1).amax(1)) / math.log(0.5))
    assert -0.71 < gammas.min() < -0.6 and 0.6 < gammas.max() < 0.71
    sides = (turned[:, 0] > 0.2).float().sum((1, 2)).sqrt() / 8
    assert 0.6 < sides.min() < 0.8 and 1.1 < sides.max() < 1.3
    ys = (turned[:, 0] * torch.arange(32.0)[:, None]).sum((1, 2)) / turned[:, 0].sum((1, 2)) - 15.5
    assert 3 < ys.abs().max() < 6  # four pixels, seen through the scale
    assert torch.equal(
        out, distort(image.expand(400, -1, -1, -1), torch.Generator().manual_seed(0))
    )


def test_distortion_turns_and_mirrors() -> None:
    """The brighter half of an image, on the right, lands on the left in half of the turned ones;
    its edge is slanted by up to 30 degrees."""
    image = torch.zeros(1, 3, 32, 32)
    image[..., 16:] = 1
    out = distort(image.expand(400, -1, -1, -1), torch.Generator().manual_seed(1))[:, 0]
    left = (out[..., :16].sum((1, 2)) > out[..., 16:].sum((1, 2))).float().mean()
    assert 0.4 < left < 0.6
    edge = (out[:, [4, 27]] > 0.5).float().sum(2)  # bright pixels in a high and in a low row
    slant = torch.rad2deg(torch.atan((edge[:, 0] - edge[:, 1]).abs() / 23))
    assert 25 < slant.max() < 33


@given(n=st.integers(1, 20), size=st.integers(1, 30))
@settings(deadline=None)
def test_each_epoch_is_a_permutation(n: int, size: int) -> None:
    batches = shuffled_batches(n, size, torch.Generator().manual_seed(0))
    drawn = torch.cat([next(batches) for _ in range(2 + 3 * n // size)])
    for epoch in drawn[: len(drawn) // n * n].view(-1, n):
        assert sorted(epoch.tolist()) == list(range(n))
