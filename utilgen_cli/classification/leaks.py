"""Is the test set in the training data? Same keys, same pixels, nearly the same pixels."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import LabelledImages, to_float

THUMB = 16  # pixels a side of the compared grey thumbnails
NEAR = 0.06  # distance of unit-norm thumbnails; see `thumbnails`
SHOWN = 10


def pixel_digests(images: Tensor) -> list[str]:
    """SHA-256 of each image's uint8 pixels."""
    return [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in images]


def thumbnails(images: Tensor) -> Tensor:
    """Grey THUMB x THUMB thumbnails less their mean, at unit norm: [N, THUMB * THUMB].

    Distances between them do not see brightness, contrast, size or re-encoding.
    """
    parts = []
    for part in images.split(1024):
        grey = to_float(part).mean(1, keepdim=True)
        small = F.interpolate(grey, (THUMB, THUMB), mode="bilinear", antialias=True).flatten(1)
        small = small - small.mean(1, keepdim=True)
        parts.append(F.normalize(small, dim=1, eps=1e-3))
    return torch.cat(parts)


@dataclass
class Prints:
    """Keys, pixel digests and thumbnails (and mirrored ones) of a test set."""

    keys: list[str]
    digests: dict[str, str]
    thumbs: Tensor
    mirrored: Tensor

    @classmethod
    def of(cls, test: LabelledImages) -> Prints:
        """Take the prints of a test set once."""
        digests = dict(zip(pixel_digests(test.images), test.keys, strict=True))
        return cls(test.keys, digests, thumbnails(test.images), thumbnails(test.images.flip(-1)))


def find_leaks(data: LabelledImages, test: Prints, near: float = NEAR) -> dict[str, Any]:
    """Overlap of `data` with the test set.

    `same_key`, `same_pixels`, `near`: how many samples of `data`; `pairs`: the closest few, as
    {key, test_key, distance}. A sample with the same pixels counts as near, too.
    """
    keys = set(test.keys)
    same_key = [key for key in data.keys if key in keys]
    same_pixels = [d for d in pixel_digests(data.images) if d in test.digests]
    distance, index = nearest(thumbnails(data.images), test)
    order = distance.argsort()[:SHOWN].tolist()
    pairs = [
        {"key": data.keys[i], "test_key": test.keys[int(index[i])],
         "distance": round(distance[i].item(), 4)}
        for i in order if distance[i] < near
    ]  # fmt: skip
    return {
        "n": len(data),
        "same_key": len(same_key),
        "same_pixels": len(same_pixels),
        "near": int((distance < near).sum()),
        "closest": round(distance.min().item(), 4),
        "pairs": pairs,
    }


def nearest(thumbs: Tensor, test: Prints) -> tuple[Tensor, Tensor]:
    """Distance [N] and index [N] of the nearest test image, mirrored ones included."""
    distances, indices = [], []
    for part in thumbs.split(512):
        both = torch.minimum(torch.cdist(part, test.thumbs), torch.cdist(part, test.mirrored))
        least = both.min(1)
        distances.append(least.values)
        indices.append(least.indices)
    return torch.cat(distances), torch.cat(indices)
