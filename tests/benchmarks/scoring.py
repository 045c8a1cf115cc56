"""`value score` beside a plain inference pass (read, decode, one forward) over the same shards."""

from __future__ import annotations

import io
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from utilgen_cli.classification.data import LabelledImages, to_float
from utilgen_cli.shards.images import decode_rgb
from utilgen_cli.shards.operands import Source, open_source
from utilgen_cli.shards.sample import Sample
from utilgen_cli.shards.writer import write_shard, write_tar
from utilgen_cli.valuation.score import Scorer
from utilgen_cli.valuation.todv import ValueConfig
from utilgen_cli.valuation.training import ValueData, train_values
from utilgen_cli.valuation.value_model import ValueModel

from .harness import interleaved, record, table

SIZES = {"small-cnn": (32, 2000, "PNG"), "resnet18": (224, 64, "JPEG")}  # side, images, format
BATCH = 64


def images(count: int, side: int, kind: str) -> Iterator[Sample]:
    """Smooth random pictures."""
    random = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(random.integers(0, 255, (16, 16, 3), dtype=np.uint8))
        out = io.BytesIO()
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(out, kind)
        name = "png" if kind == "PNG" else "jpg"
        label = str(i % 2).encode()
        yield Sample(f"{i:06d}", {name: out.getvalue(), "cls": label, "json": b"{}"})


def value_model(arch: str, side: int, directory: Path) -> ValueModel:
    """Three folds and snapshots, hardly trained: only its speed is looked at."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (12, 3, side, side), generator=generator).to(torch.uint8)
    real = LabelledImages(pixels, torch.arange(12) % 2, [str(i) for i in range(12)], ["0", "1"])
    config = ValueConfig(arch=arch, steps=6, batch_size=4, snapshots=3, augment="none")
    return train_values(ValueData(real), config, directory)


def plain(model: ValueModel, source: Source) -> list[int]:
    """What anyone would write: a class for every image."""
    classifier, found, samples = model.classifiers[0], [], source.samples()
    with torch.no_grad():
        while batch := list(itertools.islice(samples, BATCH)):
            arrays = np.stack([decode_rgb(s, model.size) for s in batch])
            x = to_float(torch.from_numpy(arrays).permute(0, 3, 1, 2))
            found += classifier(x).argmax(1).tolist()
    return found


def main() -> None:
    """One table an architecture."""
    for arch, (side, count, kind) in SIZES.items():
        with tempfile.TemporaryDirectory() as name:
            shards = Path(name) / "shards"
            shards.mkdir()
            write_shard(shards / "00000.tar", images(count, side, kind))
            source = open_source([str(shards)])
            model = value_model(arch, side, Path(name) / "value")

            def score(passes: int, model: ValueModel = model, source: Source = source) -> None:
                scorer = Scorer(model, batch_size=BATCH, passes=passes)
                write_tar(scorer(source.samples()), io.BytesIO())

            sides = {
                "plain inference": lambda model=model, source=source: plain(model, source),
                "value score": lambda: score(1),
                "value score --passes 3": lambda: score(3),
                "value score --passes 9": lambda: score(9),
            }
            timings = interleaved(sides, repeats=5)
        title = f"Scoring {count} images of {side} px ({kind}) with {arch}"
        record(title, table(timings, "plain inference", "ms an image", 1e3 / count))


if __name__ == "__main__":
    main()
