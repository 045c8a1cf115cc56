"""Fashion-MNIST as the tiny test bed sees it: splits, the domain shift, and captions.

The 60,000 training images are split once (seed 0, stratified): 50,000 pre-train the bundle,
*shifted*; the other 10,000 hold the few shots and the validation images, unshifted. The 10,000
official test images are only ever tested on.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

SOURCE = Path("/usr/share/datasets/fashion-mnist")  # Debian package dataset-fashion-mnist
SIZE = 32  # 28 x 28 images, padded by two black pixels a side

CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
COARSE = ("top", "bottoms", "top", "garment", "top", "shoe", "top", "shoe", "accessory", "shoe")
FINE_SHARE = 0.8  # captions that name the fine class; the rest have the coarse noun
MENTION_SHARE = 0.5  # captions that mention a visible trait of the shift
TEMPLATES = ("a photo of a {}", "a {}", "a picture of a {}", "{}")


def read_idx(path: Path) -> np.ndarray:
    """Read one gzipped IDX file into a uint8 array."""
    with gzip.open(path) as f:
        data = f.read()
    rank = data[3]
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(rank)]
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def load(part: str, source: Path = SOURCE) -> tuple[torch.Tensor, torch.Tensor]:
    """Images uint8 [N, 32, 32] (padded) and labels int64 [N] of `train` or `t10k`."""
    images = torch.from_numpy(read_idx(source / f"{part}-images-idx3-ubyte.gz").copy())
    labels = torch.from_numpy(read_idx(source / f"{part}-labels-idx1-ubyte.gz").astype(np.int64))
    return F.pad(images, (2, 2, 2, 2)), labels


def split(labels: torch.Tensor, n_pretrain: int = 50_000) -> tuple[torch.Tensor, torch.Tensor]:
    """Stratified, seeded split of the training set into (pre-training, task) indices."""
    generator = torch.Generator().manual_seed(0)
    pretrain, task = [], []
    for c in range(len(CLASSES)):
        index = torch.nonzero(labels == c).flatten()
        index = index[torch.randperm(len(index), generator=generator)]
        cut = n_pretrain // len(CLASSES)
        pretrain.append(index[:cut])
        task.append(index[cut:])
    return torch.cat(pretrain), torch.cat(task)


@dataclass
class Shift:
    """One draw of the domain shift for a batch; every field is [B]."""

    degrees: torch.Tensor
    scale: torch.Tensor
    dx: torch.Tensor
    dy: torch.Tensor
    gamma: torch.Tensor

    @classmethod
    def draw(cls, n: int, generator: torch.Generator) -> Shift:
        """Rotation +-20 degrees, scale .7-1.05, shift +-15 % of the side, log2 gamma +-.7."""
        u = torch.rand(5, n, generator=generator)
        return cls(
            degrees=40 * u[0] - 20,
            scale=0.7 + 0.35 * u[1],
            dx=0.3 * u[2] - 0.15,
            dy=0.3 * u[3] - 0.15,
            gamma=2 ** (1.4 * u[4] - 0.7),
        )

    def apply(self, images: torch.Tensor) -> torch.Tensor:
        """Shift uint8 images [B, 32, 32]; float [B, 1, 32, 32] in [0, 1] comes back."""
        x = images[:, None].float() / 255
        a = torch.deg2rad(self.degrees)
        cos, sin = torch.cos(a) / self.scale, torch.sin(a) / self.scale
        theta = torch.stack(
            [cos, -sin, -2 * self.dx, sin, cos, -2 * self.dy], dim=1
        ).view(-1, 2, 3)  # fmt: skip
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        x = F.grid_sample(x, grid, align_corners=False).clamp(0, 1)
        return x ** self.gamma.view(-1, 1, 1, 1)

    def traits(self, i: int) -> list[str]:
        """The words that a caption may use for sample i."""
        words = []
        if abs(self.degrees[i]) > 12:
            words.append("tilted")
        elif abs(self.degrees[i]) < 5:
            words.append("upright")
        if self.scale[i] < 0.79:
            words.append("small")
        elif self.scale[i] > 0.96:
            words.append("large")
        if self.gamma[i] > 1.35:
            words.append("dark")
        elif self.gamma[i] < 0.74:
            words.append("bright")
        if max(abs(self.dx[i]), abs(self.dy[i])) < 0.05:
            words.append("centered")
        elif max(abs(self.dx[i]), abs(self.dy[i])) > 0.12:
            words.append("shifted")
        return words


def captions(labels: torch.Tensor, shift: Shift, generator: torch.Generator) -> list[str]:
    """A caption an image: fine class in 80 %, coarse noun in 20 %; half name a trait."""
    u = torch.rand(4, len(labels), generator=generator)
    out = []
    for i, c in enumerate(labels.tolist()):
        noun = CLASSES[c] if u[0, i] < FINE_SHARE else COARSE[c]
        words = shift.traits(i) if u[1, i] < MENTION_SHARE else []
        if len(words) > 2:  # people mention one or two things
            first = int(u[2, i] * len(words))
            words = [words[first], words[(first + 1) % len(words)]]
        out.append(TEMPLATES[int(u[3, i] * len(TEMPLATES))].format(" ".join([*words, noun])))
    return out


def pretraining_batch(
    images: torch.Tensor, labels: torch.Tensor, n: int, generator: torch.Generator
) -> tuple[torch.Tensor, list[str], torch.Tensor]:
    """Draw n shifted images: float [n, 3, 32, 32] in [-1, 1], their captions, their labels [n]."""
    index = torch.randint(len(images), (n,), generator=generator)
    shift = Shift.draw(n, generator)
    x = shift.apply(images[index]).expand(-1, 3, -1, -1) * 2 - 1
    return x, captions(labels[index], shift, generator), labels[index]
