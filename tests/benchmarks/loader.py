"""What ResNet-50 at 224 px waits for: the decode of JPEGs once, and a batch from the cache a step.

`eval` and `value train` decode every image once (JPEGs in draft mode: at a reduced scale near the
wanted one) into a memory-mapped file of uint8; a step copies a batch and crops it on the device.
"""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from utilgen_cli.classification.batches import Batches
from utilgen_cli.classification.data import load_images
from utilgen_cli.classification.models import build_classifier
from utilgen_cli.classification.train import make_optimizer, preset, weighted_loss
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


def main(batch_size: int = 8) -> None:
    """One table: milliseconds an image."""
    samples = [
        Sample(f"{i:06d}", {"jpg": photograph(i), "cls": str(i % 2).encode(), "json": b"{}"})
        for i in range(IMAGES)
    ]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as name:
        write_shard(Path(name) / "00000.tar", samples)
        data = load_images(open_source([name]), SIZE)
    config = preset("paper", batch_size=batch_size)
    batches = iter(Batches(data, config, 0, device=device))
    model = build_classifier("resnet50", 2, SIZE).to(device).train()
    optimizer = make_optimizer(model, config)

    def step() -> None:
        x = torch.rand(batch_size, 3, SIZE, SIZE, device=device)
        y = torch.zeros(batch_size, dtype=torch.long, device=device)
        optimizer.zero_grad()
        weighted_loss(model(x), y, torch.ones(batch_size, device=device)).backward()
        optimizer.step()

    rounds = IMAGES // batch_size
    timings = interleaved(
        {
            "decode, whole": lambda: [whole_decode(s) for s in samples],
            "decode once, draft mode": lambda: decode_many(samples, SIZE),
            "the same, 2 threads": lambda: decode_many(samples, SIZE, 2),
            "batch from the cache": lambda: [next(batches) for _ in range(rounds)],
            "training step": lambda: [step() for _ in range(rounds)],
        },
        repeats=3,
    )
    body = table(timings, "training step", "ms an image", 1e3 / IMAGES)
    title = f"Loader: ResNet-50 at {SIZE} px, batches of {batch_size}, JPEGs of {WIDTH} x {HEIGHT}"
    record(title, body)


if __name__ == "__main__":
    main()
