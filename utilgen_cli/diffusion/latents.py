"""VAE latents, computed once and kept in a file that is mapped into memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..runtime.device import sent
from ..shards.images import decode_rgb
from ..shards.sample import Sample
from .render import to_host

if TYPE_CHECKING:
    from .load import LatentDiffusion

MAX_BATCH, MAX_PIXELS = 32, 1 << 20  # of images that are encoded at once: 4 of 512 px


class LatentCache:
    """Latents of images and, if wanted, of their mirror images; memory does not grow with them.

    A GPU encodes a batch while the images of the next are decoded here.
    """

    def __init__(self, model: LatentDiffusion, flip: bool = False) -> None:
        self.model, self.variants = model, 2 if flip else 1
        self._file = tempfile.TemporaryFile(prefix="utilgen-latents-")  # noqa: SIM115
        self._waiting: list[np.ndarray] = []
        self._under_way: Callable[[], np.ndarray] | None = None
        self.count = 0

    def add(self, sample: Sample) -> None:
        """Queue the image of `sample`; images are encoded in batches."""
        self._waiting.append(decode_rgb(sample, self.model.size))
        self.count += 1
        if len(self._waiting) == min(MAX_BATCH, max(1, MAX_PIXELS // self.model.size**2)):
            self._encode()

    @torch.no_grad()
    def _encode(self) -> None:
        pixels = sent(torch.from_numpy(np.stack(self._waiting)), self.model.device)
        images = pixels.permute(0, 3, 1, 2).float() / 255
        sides = (images, images.flip(-1))[: self.variants]
        latents = torch.stack([self.model.encode_images(x) for x in sides], 1)
        self._write()
        self._under_way = to_host(latents)
        self._waiting.clear()

    def _write(self) -> None:
        """The last batch that was encoded, to the file."""
        if self._under_way is not None:
            self._file.write(self._under_way().tobytes())
            self._under_way = None

    def finish(self) -> Tensor:
        """All latents, float32 [N, variants, C, h, w], backed by the file."""
        if self._waiting:
            self._encode()
        self._write()
        self._file.flush()
        shape = (self.count, self.variants, *self.model.latent_shape)
        mapped = np.memmap(self._file, np.float32, "r+", shape=shape)
        return torch.from_numpy(mapped)


def index_prompts(prompts: Iterable[str]) -> tuple[list[str], Tensor]:
    """(distinct prompts in order of appearance, index of each prompt int64 [N])."""
    known: dict[str, int] = {}
    index = [known.setdefault(prompt, len(known)) for prompt in prompts]
    return list(known), torch.tensor(index)
