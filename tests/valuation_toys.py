"""Small worlds for the valuation tests: three colours of noise that a small network can tell."""

from __future__ import annotations

from pathlib import Path

import torch

from utilgen_cli.classification.data import LabelledImages
from utilgen_cli.runtime.files import encode_json
from utilgen_cli.shards.images import encode_image
from utilgen_cli.shards.sample import Sample
from utilgen_cli.shards.writer import write_shard

CLASSES = ["red", "green", "blue"]
SIZE = 16


def colours(per_class: int, seed: int, classes: int = 3) -> LabelledImages:
    """Noise images whose channel `label` is a little brighter."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(per_class * classes) % classes
    images = torch.randint(0, 160, (len(labels), 3, SIZE, SIZE), generator=generator)
    images[torch.arange(len(labels)), labels] += 60
    keys = [f"{seed:02d}-{i:04d}" for i in range(len(labels))]
    return LabelledImages(images.to(torch.uint8), labels, keys, CLASSES[:classes])


def as_samples(data: LabelledImages) -> list[Sample]:
    """The samples that `utilgen pack` would make of them."""
    return [
        Sample(
            key,
            {
                "png": encode_image(image.permute(1, 2, 0).contiguous().numpy()),
                "cls": str(label).encode(),
                "json": encode_json({"class_name": data.classes[label]}),
            },
        )
        for key, image, label in zip(data.keys, data.images, data.labels.tolist(), strict=True)
    ]


def write_shards(directory: Path, data: LabelledImages) -> Path:
    """One shard in a new directory."""
    directory.mkdir(parents=True)
    write_shard(directory / "00000.tar", as_samples(data))
    return directory
