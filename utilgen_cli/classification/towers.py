"""Towers that are never trained: one for all classifiers on it, and a set of images seen once.

Every arm and seed of an evaluation has the same tower where its weights are named; what differs are
the heads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..runtime.progress import Progress, silent
from .clip import has_named_weights
from .models import Classifier, build_classifier, load_classifier
from .train import FEATURES, predict, tower_features


@dataclass
class Towers:
    """The towers that are held, by architecture, and what they said."""

    device: torch.device
    _first: dict[str, Classifier] = field(default_factory=dict)
    # by tower, images and precision; what the ids are of is held, so that they stay theirs
    _seen: dict[tuple[int, int, str], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def build(
        self, arch: str, num_classes: int, image_size: int, pretrained: bool = False, seed: int = 0
    ) -> Classifier:
        """`build_classifier`, on the device and on the tower of those before it."""
        like = self._first.get(arch)
        model = build_classifier(arch, num_classes, image_size, pretrained, seed, like)
        model.to(self.device)
        if has_named_weights(arch):
            self._first.setdefault(arch, model)
        return model

    def load(self, path: Path, arch: str, num_classes: int, image_size: int) -> Classifier:
        """`load_classifier`, likewise; the file may lack the tower."""
        if has_named_weights(arch) and arch not in self._first:
            self.build(arch, num_classes, image_size)
        like = self._first.get(arch)
        return load_classifier(path, like, share=like is not None).to(self.device)

    def features(
        self, model: Classifier, images: Tensor, precision: str = "fp32",
        progress: Progress = silent,
    ) -> Tensor:  # fmt: skip
        """`tower_features`; those of a tower that is held are asked for once, up to `FEATURES`."""
        first = self._first.get(model.arch)
        if first is None or first.tower is not model.tower:
            return tower_features(model, images, precision, progress)
        key = id(model.tower), id(images), precision
        if key not in self._seen:
            found = tower_features(model, images, precision, progress)
            if sum(kept.nbytes for _, kept in self._seen.values()) + found.nbytes > FEATURES:
                return found
            self._seen[key] = images, found
        return self._seen[key][1]

    def predict(self, model: Classifier, images: Tensor) -> Tensor:
        """`train.predict`: logits [N, C] (CPU, fp32) of uint8 images."""
        if model.arch not in self._first:
            return predict(model, images)
        return predict(model.head, self.features(model, images))
