"""The images that a tiny bundle is trained on: shifted, captioned, drawn in seeded batches.

`--pool SHARDS` takes any labelled shards of `utilgen pack`; without it Fashion-MNIST is used. The
shift makes the bundle's domain another one than the task's, as a generator from the web would be.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

SIZE = 32
FINE_SHARE = 0.8  # captions that name the fine class; the rest have the coarse noun
MENTION_SHARE = 0.5  # captions that mention a visible trait of the shift
TEMPLATES = ("a photo of a {}", "a {}", "a picture of a {}", "{}")


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

    def apply(self, images: torch.Tensor, beyond: str = "zeros") -> torch.Tensor:
        """Shift uint8 images [B, C, 32, 32]; float [B, C, 32, 32] in [0, 1] comes back.

        `beyond` the edges of an image there is black (zeros) or what its edge shows (border).
        """
        x = images.float() / 255
        a = torch.deg2rad(self.degrees)
        cos, sin = torch.cos(a) / self.scale, torch.sin(a) / self.scale
        theta = torch.stack(
            [cos, -sin, -2 * self.dx, sin, cos, -2 * self.dy], dim=1
        ).view(-1, 2, 3)  # fmt: skip
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        x = F.grid_sample(x, grid, padding_mode=beyond, align_corners=False).clamp(0, 1)
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


@dataclass
class Pool:
    """Labelled images: uint8 [N, C, 32, 32], labels [N], the names of the classes."""

    images: torch.Tensor
    labels: torch.Tensor
    classes: Sequence[str]
    coarse: Sequence[str]  # a vaguer noun a class; the class itself where there is none
    beyond: str  # what a shifted image shows beyond its edges (`Shift.apply`)

    def captions(self, labels: torch.Tensor, shift: Shift, draws: torch.Generator) -> list[str]:
        """A caption an image: fine class in 80 %, coarse noun in 20 %; half name a trait."""
        u = torch.rand(4, len(labels), generator=draws)
        out = []
        for i, c in enumerate(labels.tolist()):
            noun = self.classes[c] if u[0, i] < FINE_SHARE else self.coarse[c]
            words = shift.traits(i) if u[1, i] < MENTION_SHARE else []
            if len(words) > 2:  # people mention one or two things
                first = int(u[2, i] * len(words))
                words = [words[first], words[(first + 1) % len(words)]]
            out.append(TEMPLATES[int(u[3, i] * len(TEMPLATES))].format(" ".join([*words, noun])))
        return out

    def batch(
        self, n: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, list[str], torch.Tensor]:
        """Draw n shifted images: float [n, 3, 32, 32] in [-1, 1], captions, labels [n]."""
        index = torch.randint(len(self.images), (n,), generator=generator)
        shift = Shift.draw(n, generator)
        x = shift.apply(self.images[index], self.beyond).expand(-1, 3, -1, -1) * 2 - 1
        return x, self.captions(self.labels[index], shift, generator), self.labels[index]


def arguments(doc: str | None, steps: int, batch: int) -> argparse.ArgumentParser:
    """What every training script of this directory takes."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("out", type=Path)
    parser.add_argument("--pool", type=Path, help="shards to learn from, not Fashion-MNIST")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--threads", type=int, default=1)
    return parser


def open_pool(shards: Path | None) -> Pool:
    """The images of `shards`, or the 50,000 of Fashion-MNIST that the shipped bundle is made of."""
    if shards is None:
        import fashion

        images, labels = fashion.load("train")
        index, _ = fashion.split(labels)
        images = images[index][:, None]
        return Pool(images, labels[index], fashion.CLASSES, fashion.COARSE, "zeros")
    from utilgen_cli.classification.data import load_images
    from utilgen_cli.shards.operands import open_source

    found = load_images(open_source([str(shards)]), SIZE)
    return Pool(found.images, found.labels, found.classes, found.classes, "border")
