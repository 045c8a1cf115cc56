"""What ResNet-50 at 224 px waits for: the decode of JPEGs once, and a batch from the cache a step.

    python -m tests.benchmarks loader [--batch-size 64 --precision bf16 --workers 8]

`eval` and `value train` decode every image once (JPEGs in draft mode: at a reduced scale near the
wanted one) into a memory-mapped file of uint8; what crops image by image does so in workers. The
wait is what steps that are fed take longer than steps on one batch: a GPU's host runs ahead, so
that a clock around the loader alone would show none.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from utilgen_cli.classification.batches import MARGIN, Batch, Batches
from utilgen_cli.classification.data import load_images
from utilgen_cli.classification.models import build_classifier
from utilgen_cli.classification.train import batch_loss, make_optimizer, preset
from utilgen_cli.runtime.device import DTYPES, autocast, pick_device
from utilgen_cli.shards.images import decode_many, square
from utilgen_cli.shards.operands import open_source
from utilgen_cli.shards.sample import Sample
from utilgen_cli.shards.writer import write_shard

from .harness import interleaved, record, table

IMAGES, WIDTH, HEIGHT, SIZE = 32, 1000, 750, 224


def photograph(number: int) -> bytes:
    """A JPEG (quality 90) with structure at all scales, about as large as a photograph's."""
    random = np.random.default_rng(number)
    total = np.zeros((HEIGHT, WIDTH, 3))
    for side in (4, 16, 64, 256):
        coarse = Image.fromarray(random.integers(0, 255, (side, side, 3), dtype=np.uint8))
        total += np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)) / 4
    out = io.BytesIO()
    Image.fromarray(total.astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def whole_decode(sample: Sample) -> np.ndarray:
    """Without draft mode."""
    return np.asarray(square(Image.open(io.BytesIO(sample.image[1])).convert("RGB"), SIZE))


def main(arguments: Sequence[str] = ()) -> None:
    """Two tables: milliseconds an image to decode it, and to train on it."""
    parser = argparse.ArgumentParser("loader", description=__doc__)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args(list(arguments))
    samples = [
        Sample(f"{i:06d}", {"jpg": photograph(i), "cls": str(i % 2).encode(), "json": b"{}"})
        for i in range(IMAGES)
    ]
    device, size, workers = pick_device(), args.batch_size, args.workers
    config = preset("paper", batch_size=size, precision=args.precision)
    with tempfile.TemporaryDirectory() as name:
        write_shard(Path(name) / "00000.tar", samples)
        data = load_images(open_source([name]), round(MARGIN * SIZE))
    alone = iter(Batches(data, config, 0, device=device, size=SIZE))
    fed = iter(Batches(data, config, 0, device=device, size=SIZE, workers=workers))
    same = next(alone)
    model = build_classifier("resnet50", 2, SIZE).to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(model.train(), config)

    def step(batch: Batch) -> None:
        x, y = batch
        with autocast(device, DTYPES[config.precision]):
            loss = batch_loss(model(x), y, config)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    drawn = range(args.steps)
    decoding = {
        "decode, whole": lambda: [whole_decode(s) for s in samples],
        "decode once, draft mode": lambda: decode_many(samples, SIZE),
        "the same, 2 threads": lambda: decode_many(samples, SIZE, 2),
    }
    stepping = {
        "steps on one batch": lambda: [step(same) for _ in drawn],
        "a batch, cropped here": lambda: [next(alone) for _ in drawn],
        f"steps fed by {workers} workers": lambda: [step(next(fed)) for _ in drawn],
    }
    timings = interleaved(stepping, repeats=3)
    one, _, other = (t.median for t in timings.values())
    lines = [
        table(interleaved(decoding, repeats=3), "decode, whole", "ms an image", 1e3 / IMAGES),
        table(timings, "steps on one batch", "ms an image", 1e3 / (args.steps * size)),
        f"Wait for the loader: {100 * (other / one - 1):.1f} % of a step.",
        f"`python -m tests.benchmarks {' '.join(['loader', *arguments])}`",
    ]
    title = f"Loader: ResNet-50 at {SIZE} px, {args.precision}, batches of {size}, JPEGs of {WIDTH} x {HEIGHT}"  # fmt: skip
    record(title, "\n\n".join(lines))


if __name__ == "__main__":
    main(sys.argv[1:])
