"""Labelled images for training: each shard is read once, each image decoded once into uint8."""

from __future__ import annotations

import itertools
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime.device import sent
from ..runtime.errors import BadInput, NoInput
from ..runtime.progress import Progress, silent
from ..shards.classes import note_class, two_names

if TYPE_CHECKING:
    from ..shards.operands import Source

AT_ONCE = 64  # images that are decoded together
IN_MEMORY = 1 << 30  # bytes of pixels; beyond it they live in an unlinked temporary file


class Named(Protocol):
    """What knows classes by their number; `unnamed` ones stand in `classes` by it."""

    @property
    def classes(self) -> list[str]: ...
    @property
    def unnamed(self) -> frozenset[int]: ...


@dataclass
class LabelledImages:
    """A labelled set: images uint8 [N, 3, S, S], labels int64 [N], keys [N], class names.

    Where a head alone is trained, `images` are their features, float [N, D] (`tower_features`).
    `unnamed` classes have no name in their shards, and stand in `classes` by their number.
    """

    images: Tensor
    labels: Tensor
    keys: list[str]
    classes: list[str]
    unnamed: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: Tensor | Sequence[int]) -> LabelledImages:
        """The samples at `index`, in that order."""
        at = torch.as_tensor(index, dtype=torch.long)
        keys = [self.keys[i] for i in at.tolist()]
        images = gathered((self.images[part] for part in at.split(AT_ONCE)), self.images, len(at))
        return replace(self, images=images, labels=self.labels[at], keys=keys)


def concatenate(sets: Sequence[LabelledImages]) -> LabelledImages:
    """Join sets of the same image size and classes, in order."""
    first = sets[0]
    if any(s.classes != first.classes for s in sets):
        raise BadInput("data", "the sets have different classes", "Use shards of one task.")
    parts = (part for s in sets for part in s.images.split(AT_ONCE))
    return LabelledImages(
        gathered(parts, first.images, sum(map(len, sets))),
        torch.cat([s.labels for s in sets]),
        [key for s in sets for key in s.keys],
        first.classes,
        first.unnamed,
    )


def agree(sets: Sequence[LabelledImages], known: Mapping[int, str] = MappingProxyType({})) -> None:
    """Give the classes of all sets the names that any of them knows, or `known`. BadInput: one has
    two."""
    names = dict(known)
    for data in sets:
        for label in sorted(set(range(len(data.classes))) - data.unnamed):
            name = data.classes[label]
            if names.setdefault(label, name) != name:
                raise two_names("data", label, name, names[label])
    for data in sets:
        data.classes, data.unnamed = _all_names(names, len(data.classes))


def _all_names(names: dict[int, str], count: int) -> tuple[list[str], frozenset[int]]:
    return [names.get(i, str(i)) for i in range(count)], frozenset(range(count)) - set(names)


def load_images(
    source: Source,
    size: int,
    like: Named | Sequence[str] | None = None,
    progress: Progress = silent,
) -> LabelledImages:
    """Read every sample of `source`, its image resized to [3, size, size].

    Without `like` the names come from the samples' `json` (the label as text where it is silent).
    With a set or with class names a label or a name that disagrees raises BadInput. No samples at
    all: NoInput.
    """
    from ..shards.images import decode_many

    pixels, labels, keys = _Pixels(size), [], []
    names, count = _known(like)
    samples = iter(source.samples())
    with progress("read", None) as task:
        while some := list(itertools.islice(samples, AT_ONCE)):
            for sample in some:
                labels.append(note_class(names, sample, count))
                keys.append(sample.key)
            for rgb in decode_many(some, size, torch.get_num_threads()):
                pixels.append(rgb)
            task.advance(len(some))
    if not labels:
        raise _empty(source)
    _refuse_gaps(source, labels)
    return LabelledImages(
        pixels.tensor(),
        torch.tensor(labels, dtype=torch.int64),
        keys,
        *_all_names(names, max([*names, *labels]) + 1 if count is None else count),
    )


def _refuse_gaps(source: Source, labels: list[int]) -> None:
    """A model has an output for every number up to the highest: a stray one must not cost the
    machine's memory."""
    highest, classes = max(labels), len(set(labels))
    if highest >= 10 * classes + 1000:
        what, why = str(source.paths[0]), f"class {highest} is the highest of {classes} classes"
        raise BadInput(what, why, "Number the classes from 0.")


def check_labels(source: Source, like: Named) -> dict[int, str]:
    """What `load_images` says of labels and names, without a look at any pixel; the names of all
    classes that have one."""
    names, count = _known(like)
    seen = 0
    for sample in source.samples():
        note_class(names, sample, count)
        seen += 1
    if not seen:
        raise _empty(source)
    return names


def _known(like: Named | Sequence[str] | None) -> tuple[dict[int, str], int | None]:
    """The names of classes by their number, and how many classes there are if that is settled."""
    if like is None:
        return {}, None
    if isinstance(like, Sequence):
        return dict(enumerate(like)), len(like)
    names = {i: name for i, name in enumerate(like.classes) if i not in like.unnamed}
    return names, len(like.classes)


def _empty(source: Source) -> NoInput:
    what = ", ".join(str(path) for path in source.paths[:3])
    return NoInput(what, "no samples in it", "Name shards made by utilgen pack.")


def gathered(parts: Iterable[Tensor], like: Tensor, count: int) -> Tensor:
    """`count` images that come in parts, of the size of those in `like`, held as `_Pixels` are."""
    if count * like[:1].numel() <= IN_MEMORY:
        return torch.cat([like[:0], *parts])
    pixels = _Pixels(like.shape[-1])
    for part in parts:
        pixels.write(part.numpy())
    return pixels.tensor()


class _Pixels:
    """uint8 pixels that grow in memory up to IN_MEMORY bytes, then in a temporary file."""

    def __init__(self, size: int) -> None:
        self.size, self.bytes = size, 0
        self.memory = bytearray()
        self.file: tempfile._TemporaryFileWrapper[bytes] | None = None

    def append(self, rgb_hwc: np.ndarray) -> None:
        """One image, [S, S, 3]."""
        self.write(rgb_hwc.transpose(2, 0, 1))

    def write(self, pixels: np.ndarray) -> None:
        """Images as they shall lie, [..., 3, S, S]."""
        data = pixels.ravel().data
        self.bytes += data.nbytes
        if self.file is None and self.bytes > IN_MEMORY:
            self.file = tempfile.NamedTemporaryFile(prefix="utilgen-", suffix=".pixels")  # noqa: SIM115
            self.file.write(self.memory)
            self.memory = bytearray()
        if self.file is None:
            self.memory += data
        else:
            self.file.write(data)

    def tensor(self) -> Tensor:
        shape = (-1, 3, self.size, self.size)
        if self.file is None:
            return torch.frombuffer(self.memory, dtype=torch.uint8).view(shape)
        self.file.flush()
        os.fsync(self.file.fileno())
        name = self.file.name
        mapped = torch.from_file(name, shared=False, size=self.bytes, dtype=torch.uint8)
        self.file.close()  # the mapping keeps the unlinked file alive
        return mapped.view(shape)


def to_float(images: Tensor) -> Tensor:
    """uint8 [B, 3, S, S] to float in [0, 1], channels last in memory, as convolutions like it.
    Features, which are float, pass as they are."""
    if images.is_floating_point():
        return images
    return images.to(torch.float32, memory_format=torch.channels_last).div_(255)


def augment(
    images_bchw: Tensor, generator: torch.Generator, flip: bool = True, padding: int | None = None,
    share: tuple[int, int, int] | None = None,
) -> Tensor:  # fmt: skip
    """Random crop of zero-padded images and random mirror, one draw an image.

    `padding` is in pixels a side (default an eighth of the side). The draws come from the CPU
    `generator`, so that a batch looks the same on every device. `share` (rank, processes, images
    of the whole batch): these are every so many-th of them, and are drawn for as in the whole.
    """
    b, _, h, w = images_bchw.shape
    pad = h // 8 if padding is None else padding
    rank, processes, whole = share or (0, 1, b)
    dy, dx = torch.randint(2 * pad + 1, (2, whole, 1), generator=generator)[:, rank::processes]
    mirrored = (torch.rand(whole, 1, generator=generator) < 0.5)[rank::processes]
    rows, cols = dy + torch.arange(h), dx + torch.arange(w)  # [B, H], [B, W]
    if flip:
        cols = torch.where(mirrored, cols.flip(1), cols)
    rows, cols = (sent(t, images_bchw.device) for t in (rows, cols))
    padded = F.pad(images_bchw, (pad,) * 4)
    image = torch.arange(b, device=padded.device)[:, None, None]
    return padded[image, :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)


def distort(
    images_bchw: Tensor, generator: torch.Generator, share: tuple[int, int, int] | None = None
) -> Tensor:
    """Half of the images as by `augment`; the others turned by up to 30 degrees, scaled to .7 to
    1.2, moved by up to an eighth of the side and of another gamma (up to .7 octaves), and mirrored.

    A generator draws objects at angles, sizes and exposures that a few shots do not show. Images
    are in [0, 1]; `generator` and `share` as in `augment`.
    """
    rank, processes, whole = share or (0, 1, len(images_bchw))
    moved = augment(images_bchw, generator, share=share)
    u = torch.rand(7, whole, generator=generator)[:, rank::processes]
    angle, zoom = (u[0] - 0.5) * math.pi / 3, 1 / (0.7 + 0.5 * u[1])
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    mirror = torch.where(u[2] < 0.5, -1.0, 1.0)
    dx, dy = (u[3:5] - 0.5) / 2  # of half a side
    theta = torch.stack([mirror * cos, -sin, dx, mirror * sin, cos, dy], 1).view(-1, 2, 3)
    theta = sent(theta, images_bchw.device).to(images_bchw.dtype)
    grid = F.affine_grid(theta, list(images_bchw.shape), align_corners=False)
    turned = F.grid_sample(images_bchw, grid, padding_mode="border", align_corners=False)
    gamma, plain = 2 ** (1.4 * u[5] - 0.7), u[6] < 0.5
    gamma, plain = (sent(t, images_bchw.device)[:, None, None, None] for t in (gamma, plain))
    return torch.where(plain, moved, turned.clamp(0, 1) ** gamma)


def shuffled_batches(n: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless index batches [batch_size]: epoch after epoch, each a permutation of range(n)."""
    if not n:
        raise ValueError("no images to draw batches of")
    pool = torch.empty(0, dtype=torch.long)
    while True:
        while len(pool) < batch_size:
            pool = torch.cat([pool, torch.randperm(n, generator=generator)])
        yield pool[:batch_size]
        pool = pool[batch_size:]
