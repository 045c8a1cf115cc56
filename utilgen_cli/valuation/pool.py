"""What TODV sees: real, synthetic and validation images, planted canaries, and who holds out whom.

Every image belongs to one fold, and classifier k never trains on fold k: whatever is scored by the
classifier of its own fold is scored by one that has not seen it. Identical pixels share a fold.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..classification.data import AT_ONCE, LabelledImages, gathered
from ..runtime.errors import UsageError
from ..runtime.seeds import derive_seed

REAL, VALIDATION, SYNTHETIC, PLANTED = range(4)


@dataclass
class Pool:
    """uint8 images [N, 3, S, S], and for each its label, role, fold (-1: held out by none)."""

    images: Tensor
    labels: Tensor
    roles: Tensor
    folds: Tensor
    classes: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def trained_on(self, fold: int) -> tuple[Tensor, Tensor]:
        """Where the (real, other) training images of classifier `fold` stand.

        With cross-fitting --real and --val images take both roles in turn; without it (one fold)
        validation images never train.
        """
        cross = bool((self.folds >= 0).any())
        real = (self.roles == REAL) | ((self.roles == VALIDATION) & cross)
        kept = self.folds != fold
        other = (self.roles == SYNTHETIC) | (self.roles == PLANTED)
        return torch.nonzero(real & kept)[:, 0], torch.nonzero(other & kept)[:, 0]

    def validated_on(self, fold: int) -> Tensor:
        """Where the images of the outer loss of classifier `fold` stand."""
        if bool((self.folds >= 0).any()):
            held = (self.folds == fold) & ((self.roles == REAL) | (self.roles == VALIDATION))
        else:
            held = self.roles == VALIDATION
        return torch.nonzero(held)[:, 0]


def pixel_hash(images: Tensor) -> list[int]:
    """A 63-bit fingerprint of each uint8 image, the same on every machine."""
    arrays = images.cpu().numpy()
    return [_digest(np.ascontiguousarray(a).tobytes()) for a in arrays]


def _digest(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 1


def assign_folds(labels: Tensor, hashes: list[int], folds: int, known: dict[int, int]) -> Tensor:
    """Deal images to folds class by class in the order of their hashes; `known` ones keep theirs.

    `known` (hash -> fold) grows by the new ones. [N]
    """
    dealt: dict[int, int] = {}
    for h, label in sorted(set(zip(hashes, labels.tolist(), strict=True))):
        if h not in known:
            turn = dealt.get(label, label)  # starting by class, so that small classes spread
            known[h], dealt[label] = turn % folds, turn + 1
    return torch.tensor([known[h] for h in hashes])


def make_pool(
    real: LabelledImages,
    synthetic: LabelledImages | None,
    validation: LabelledImages | None,
    *,
    folds: int,
    canaries: float,
    seed: int,
) -> tuple[Pool, dict[int, int]]:
    """Put everything together; also the fold of every known image, by its pixel hash.

    `canaries` is the share of the pool that is planted: copies of real images whose label is wrong.
    """
    if folds < 2 and validation is None:
        raise UsageError("--folds 1", "there is nothing to validate on", "Add --val or more folds.")
    parts = [(real, REAL), (validation, VALIDATION), (synthetic, SYNTHETIC)]
    sets = [(data, role) for data, role in parts if data is not None]
    known: dict[int, int] = {}
    fold_parts = [_folds(data, folds, known) for data, _ in sets]
    labels = torch.cat([data.labels for data, _ in sets])
    roles = torch.cat([torch.full((len(data),), role) for data, role in sets])
    originals, wrong = plant(real.labels, len(real.classes), round(canaries * len(labels)), seed)
    all_folds = torch.cat(fold_parts)
    pixels = itertools.chain(
        *(data.images.split(AT_ONCE) for data, _ in sets),
        (real.images[at] for at in originals.split(AT_ONCE)),
    )
    return Pool(
        gathered(pixels, real.images, len(labels) + len(wrong)),
        torch.cat([labels, wrong]),
        torch.cat([roles, torch.full((len(wrong),), PLANTED)]),
        torch.cat([all_folds, all_folds[originals]]),
        real.classes,
    ), known


def _folds(data: LabelledImages, folds: int, known: dict[int, int]) -> Tensor:
    if folds < 2:
        return torch.full((len(data),), -1)
    return assign_folds(data.labels, pixel_hash(data.images), folds, known)


def plant(labels: Tensor, num_classes: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Which images are copied ([m], m <= N), and the wrong labels that the copies get."""
    if num_classes < 2:
        return torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long)
    generator = torch.Generator().manual_seed(derive_seed("canary", seed))
    chosen = torch.randperm(len(labels), generator=generator)[: max(1, count)]
    shift = torch.randint(1, num_classes, (len(chosen),), generator=generator)
    return chosen, (labels[chosen] + shift) % num_classes
