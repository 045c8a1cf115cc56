"""Latents to encoded images, off the critical path, with one number of rows in every call.

Matrix and convolution kernels round differently for different shapes, so the last batch is filled
up: an image's bytes depend on its own seed, and not on what is drawn beside it, in which part, or
after which restart. On a GPU a run of few images has fewer rows, so that last bits may be others
than in a run of many.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..runtime import signals
from ..runtime.device import cores
from ..runtime.errors import UtilgenError, first_line
from ..shards.images import encode_image

if TYPE_CHECKING:
    from torch.cuda import Event

    from .load import LatentDiffusion

Item = tuple[int, int]  # (class index, image index)
Latents = Callable[[Sequence[Item]], Tensor]
AHEAD = 2  # batches that may wait for their encoding


def not_finite() -> UtilgenError:
    """What a model that draws NaN or infinite values ends with."""
    return UtilgenError(
        "images",
        "the model drew NaN or infinite values",
        "Try --precision fp32, or look at what the model and its adapters were made with.",
    )


def tile(model: LatentDiffusion, batch_size: int | None = None, images: int | None = None) -> int:
    """Rows a call, of a run that draws so many images in all: a GPU takes no more than the power of
    two above them, since a last batch is filled up. On the CPU nothing follows the batch size, or
    the number of images: 16 small latents saturate it, as one large one does."""
    small = model.latent_shape[1] * model.latent_shape[2] <= 256
    if model.device.type == "cpu":
        return 16 if small else 1
    rows = batch_size or (256 if small else 16)
    return min(rows, 1 << (images - 1).bit_length()) if images else rows


def prefer_channels_last(model: LatentDiffusion) -> None:
    """The memory layout that convolutions like: everywhere on a GPU, in the VAE on the CPU."""
    model.vae.to(memory_format=torch.channels_last)
    if model.device.type == "cuda":
        model.unet.to(memory_format=torch.channels_last)


def compile_unet(model: LatentDiffusion) -> None:
    """torch.compile the U-Net for drawing; the first call of each shape then takes a minute.

    A call raises UtilgenError where this machine has no compiler that works.
    """
    from torch._dynamo.exc import TorchDynamoException

    if "forward" in vars(model.unet):
        return
    compiled = torch.compile(model.unet.forward, dynamic=False)

    def forward(*inputs: Any, **options: Any) -> Any:
        try:
            return compiled(*inputs, **options)
        except TorchDynamoException as error:
            why = f"the U-Net cannot be compiled ({first_line(error)})"
            raise UtilgenError("--compile", why, "Leave it out.") from error

    model.unet.forward = forward


def render(
    model: LatentDiffusion,
    items: Sequence[Item],
    latents: Latents,
    rows: int,
    format: str = "png",
) -> Iterator[tuple[Item, bytes]]:
    """(item, encoded image) in order; `latents` is always called with `rows` items.

    The next batch is under way while threads fetch and encode the images of the last one. After
    a stop signal no further batch is begun: what was drawn is handed on, then `Stopped` is raised.
    """
    drawn = 0
    with encoders() as (fetch, encode), signals.deferred():

        def finish(wait: Callable[[], np.ndarray], finite: Callable[[], np.ndarray]) -> list[bytes]:
            if not finite().all():
                raise not_finite()
            return list(encode.map(lambda rgb: encode_image(rgb, format), wait()))

        def batches() -> Iterator[tuple[Sequence[Item], Future[list[bytes]]]]:
            for start in range(0, len(items), rows):
                if signals.stop_requested():
                    return
                part = items[start : start + rows]
                filled = [*part, *[part[-1]] * (rows - len(part))]
                pixels, finite = decode_pixels(model, latents(filled))
                arrays = to_host(pixels[: len(part)]), to_host(finite[: len(part)])
                yield part, fetch.submit(finish, *arrays)

        for part, images in run_ahead(batches(), AHEAD):
            yield from zip(part, images.result(), strict=True)
            drawn += len(part)
        if drawn < len(items):
            signals.check()


@contextmanager
def encoders() -> Iterator[tuple[ThreadPoolExecutor, ThreadPoolExecutor]]:
    """A thread that waits for the device, and threads that encode."""
    with ThreadPoolExecutor(1) as fetch, ThreadPoolExecutor(min(8, cores())) as encode:
        yield fetch, encode


def run_ahead(batches: Iterable[Any], ahead: int) -> Iterator[Any]:
    """The batches in order, each handed on only when `ahead` more have been started."""
    waiting: deque[Any] = deque()
    for batch in batches:
        waiting.append(batch)
        if len(waiting) > ahead:
            yield waiting.popleft()
    yield from waiting


@torch.no_grad()
def decode_pixels(model: LatentDiffusion, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Latents [B, 4, h, w] as uint8 [B, H, W, 3], a few large images at a time; and which of them
    are finite, bool [B]: a NaN would become a black image."""
    chunk = len(latents) if model.size <= 128 else 8
    parts = [model.decode(part) for part in latents.split(chunk)]
    images = torch.cat(parts)
    finite = images.isfinite().flatten(1).all(1)
    return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous(), finite


def to_host(images: Tensor) -> Callable[[], np.ndarray]:
    """Start the copy to the CPU; the function that comes back waits for it."""
    if images.device.type != "cuda":
        array: np.ndarray = images.cpu().numpy()
        return lambda: array
    host = torch.empty(images.shape, dtype=images.dtype, pin_memory=True)
    host.copy_(images, non_blocking=True)
    done: Event = torch.cuda.Event()
    done.record(torch.cuda.current_stream(images.device))

    def wait() -> np.ndarray:
        done.synchronize()
        copied: np.ndarray = host.numpy()
        return copied

    return wait
