"""Small labelled sets that a classifier can learn in a few steps."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from utilgen_cli.classification.data import LabelledImages
from utilgen_cli.runtime.files import encode_json
from utilgen_cli.shards.images import encode_image
from utilgen_cli.shards.operands import Source, open_source
from utilgen_cli.shards.sample import Sample
from utilgen_cli.shards.writer import write_shard

NAMES = ["red", "green", "blue"]


def colour_images(n: int, seed: int = 0, size: int = 16) -> LabelledImages:
    """Noise in which the channel of the class is brighter: n images a class, class by class."""
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 120, (3 * n, 3, size, size), generator=g, dtype=torch.uint8)
    labels = torch.arange(3).repeat_interleave(n)
    for i, label in enumerate(labels.tolist()):
        images[i, label] += 60
    keys = [f"{label:04d}-{seed:03d}{i:03d}" for i, label in enumerate(labels.tolist())]
    return LabelledImages(images, labels, keys, list(NAMES))


def samples_of(data: LabelledImages, utility: Iterable[float] | None = None) -> list[Sample]:
    """The set as samples, scored if utilities are given."""
    samples = []
    scores = list(utility) if utility is not None else []
    for i, key in enumerate(data.keys):
        label = int(data.labels[i])
        members = {
            "png": encode_image(np.ascontiguousarray(data.images[i].permute(1, 2, 0).numpy())),
            "cls": str(label).encode(),
            "json": encode_json({"class_name": data.classes[label]}),
        }
        if scores:
            members["utility.json"] = encode_json({"utility": scores[i]})
        samples.append(Sample(key, members))
    return samples


def shards_of(
    directory: Path, data: LabelledImages, utility: Iterable[float] | None = None
) -> Source:
    """The set as one shard in `directory`."""
    directory.mkdir(parents=True)
    write_shard(directory / "00000.tar", samples_of(data, utility))
    return open_source([str(directory)])
