"""Batches for training: seeded, real and synthetic mixed, augmented here or in worker processes.

What a batch holds depends on the seed and the step alone: not on the number of workers, nor on
where a stopped run went on, nor on how many processes share a batch.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..runtime.device import cores, sent
from ..runtime.errors import UsageError, UtilgenError
from ..runtime.ranks import processes_here
from ..runtime.seeds import derive_seed
from ..runtime.signals import NUMBERS
from .data import LabelledImages, augment, distort, shuffled_batches, to_float

if TYPE_CHECKING:
    from .train import TrainConfig

WHOLE_BATCH = ("none", "shift", "pad", "affine")  # on the device, all images of a batch at once
CROPPING = ("crop", "trivial", "rand")  # torchvision's, image by image, from more pixels than asked
AUGMENTATIONS = (*WHOLE_BATCH, *CROPPING)
MARGIN = 8 / 7  # stored over trained side, where crops are taken: 256 for 224

Batch = tuple[Tensor, Tensor]  # images, labels
Index = list[Tensor]  # the samples of a batch in the real and in the synthetic set
Transform = Callable[[Tensor], Tensor]


def stored_side(augmentation: str, size: int) -> int:
    """The side at which images are kept for training at `size`. UsageError: unknown name."""
    if augmentation not in AUGMENTATIONS:
        advice = f"Use one of {', '.join(AUGMENTATIONS)}."
        raise UsageError(f"--augment {augmentation}", "unknown", advice)
    return round(MARGIN * size) if augmentation in CROPPING else size


def workers_for(augmentation: str, device: torch.device, asked: int | None = None) -> int:
    """How many processes crop: those that are asked for, or on a GPU as many as there are cores for
    each process of torchrun here, up to 8: one core crops some hundred images of 224 px a
    second (tests/benchmarks/RESULTS.md)."""
    if asked is not None:
        return asked
    if augmentation not in CROPPING or device.type != "cuda":
        return 0
    return max(1, min(8, cores() // processes_here()))


def augment_batch(
    augmentation: str, images_bchw: Tensor, draws: torch.Generator,
    share: tuple[int, int, int] | None = None,
) -> Tensor:  # fmt: skip
    """Images in [0, 1] as one of `WHOLE_BATCH` alters them (see `augment`, `distort`); as they are
    where they come altered."""
    if augmentation == "affine":
        return distort(images_bchw, draws, share)
    if augmentation in ("shift", "pad"):
        return augment(images_bchw, draws, augmentation == "pad", share=share)
    return images_bchw


def make_transform(augmentation: str, size: int) -> Transform | None:
    """torchvision's augmentation of one uint8 image [3, S, S] to [3, size, size].

    crop: RandomResizedCrop (Szegedy et al. 2015) and mirror; trivial, rand: after it
    TrivialAugmentWide (Müller and Hutter 2021) or RandAugment (Cubuk et al. 2020).
    """
    if augmentation not in CROPPING:
        return None
    from torchvision.transforms import v2

    steps: list[Transform] = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
    if augmentation == "trivial":
        steps.append(v2.TrivialAugmentWide())
    elif augmentation == "rand":
        steps.append(v2.RandAugment())
    composed: Transform = v2.Compose(steps)
    return composed


@dataclass
class Batches:
    """Endless batches of (images in [0, 1], labels).

    With `mix`, round(real_share * batch_size) samples of every batch come from `data`, the rest
    from `mix`; each of the two is walked in its own shuffled epochs. Of `processes` that share a
    batch, this one takes every so many-th sample from `rank` on. See `loader_errors` for workers.
    """

    data: LabelledImages
    config: TrainConfig
    seed: int
    mix: LabelledImages | None = None

    start: int = 0  # batches that were had before
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    size: int | None = None  # pixels a side of a crop; default: the images'
    workers: int = 0
    rank: int = 0
    processes: int = 1

    def __post_init__(self) -> None:
        self.fetch = _Fetch(
            [self.data, *([] if self.mix is None else [self.mix])],
            make_transform(self.config.augmentation, self.size or self.data.images.shape[-1]),
            self.seed,
            (self.rank, self.processes),
        )

    def __iter__(self) -> Iterator[Batch]:
        share = (self.rank, self.processes, self.config.batch_size)
        for step, (x, y) in enumerate(self._fetched(), self.start):
            images, labels = to_float(sent(x, self.device)), sent(y, self.device)
            draws = torch.Generator().manual_seed(derive_seed("augment", self.seed, step))
            yield augment_batch(self.config.augmentation, images, draws, share), labels

    def _indices(self) -> Iterator[tuple[int, Index]]:
        size = self.config.batch_size
        n_data = size if self.mix is None else round(self.config.real_share * size)
        parts = [self._walk(len(self.data), n_data, "data")]
        if self.mix is not None:
            parts.append(self._walk(len(self.mix), size - n_data, "mix"))
        batches = enumerate(zip(*parts, strict=True))
        for step, index in islice(batches, self.start, None):
            yield step, list(index)

    def _walk(self, length: int, count: int, name: str) -> Iterator[Tensor]:
        order = torch.Generator().manual_seed(derive_seed("order", name, self.seed))
        return shuffled_batches(length, count, order)

    def _fetched(self) -> Iterator[Batch]:
        if not self.workers:
            yield from map(self.fetch.__getitem__, self._indices())
            return
        loader = DataLoader(
            self.fetch, batch_size=None, sampler=self._indices(), num_workers=self.workers,
            worker_init_fn=_unattended, pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # torch's own is the model's
        )  # fmt: skip
        try:
            yield from loader
        except (EOFError, OSError) as error:  # a dead worker hands over no memory
            raise RuntimeError(f"DataLoader worker is gone: {error!r}") from error


@contextmanager
def loader_errors() -> Iterator[None]:
    """A worker that died as UtilgenError: torch raises wherever the main thread is just then."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        why = "one of them died (out of memory?)"
        advice = "Run the same command again to go on; fewer --workers (or 0) need less memory."
        raise UtilgenError("loader workers", why, advice) from None


class _Fetch(Dataset[Batch]):
    """A batch by its step and indices, on the CPU: uint8 images and labels."""

    def __init__(
        self, sets: list[LabelledImages], transform: Transform | None, seed: int,
        place: tuple[int, int],
    ) -> None:  # fmt: skip
        self.sets, self.transform, self.seed, self.place = sets, transform, seed, place

    def __getitem__(self, at: tuple[int, Index]) -> Batch:
        step, index = at
        x = torch.cat([s.images[i] for s, i in zip(self.sets, index, strict=True)])
        y = torch.cat([s.labels[i] for s, i in zip(self.sets, index, strict=True)])
        rank, processes = self.place
        mine = range(rank, len(y), processes)
        x, y = x[rank::processes], y[rank::processes]
        if self.transform is not None:
            x = torch.stack([self._transformed(i, step, n) for i, n in zip(x, mine, strict=True)])
        return x, y

    def _transformed(self, image: Tensor, step: int, number: int) -> Tensor:
        """The image under the draws of its place: torchvision's come from torch's own generator."""
        assert self.transform is not None
        with torch.random.fork_rng([]):
            # not torch.manual_seed: that would touch the GPUs' generators, which are the model's
            torch.default_generator.manual_seed(derive_seed("transform", self.seed, step, number))
            return self.transform(image)


def _unattended(worker: int) -> None:
    """A worker leaves when its parent does: signals to the group are the parent's to heed."""
    signal.set_wakeup_fd(-1)  # it leads to the parent's watch
    for number in NUMBERS:
        signal.signal(number, signal.SIG_IGN)
