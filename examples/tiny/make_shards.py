"""Write the task's shards: few-shot, validation and test, unshifted, 32 x 32 grey PNG.

`--test 10000` gives the whole official test set; the repository ships 2,000 of it. `--further N`
gives N more training images a class, from --start on: what real images would be worth in a study.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from fashion import CLASSES, load, split
from PIL import Image

from utilgen_cli.shards.sample import Sample, encode_json
from utilgen_cli.shards.writer import write_shard


def png(pixels: torch.Tensor) -> bytes:
    import io

    out = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(out, format="PNG", optimize=True)
    return out.getvalue()


def samples(
    name: str, images: torch.Tensor, labels: torch.Tensor, index: torch.Tensor
) -> Iterator[Sample]:
    for i in index.tolist():
        c = int(labels[i])
        facts = {"class_name": CLASSES[c], "index": i, "source": f"fashion-mnist/{name}"}
        key = f"{name}-{i:05d}"
        yield Sample(
            key, {"png": png(images[i]), "cls": str(c).encode(), "json": encode_json(facts)}
        )


def per_class(index: torch.Tensor, labels: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """Images start..start+count of each class, interleaved over the classes."""
    of_class = [index[labels[index] == c][start : start + count] for c in range(len(CLASSES))]
    return torch.stack(of_class, dim=1).flatten()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--val", type=int, default=16, help="validation images a class")
    parser.add_argument("--test", type=int, default=2000)
    parser.add_argument("--further", type=int, default=0, help="further real images a class")
    parser.add_argument("--start", type=int, default=500, help="the first of those, of 1,000")
    args = parser.parse_args()
    images, labels = load("train")
    _, task = split(labels)
    test_images, test_labels = load("t10k")
    test = per_class(torch.arange(len(test_labels)), test_labels, 0, args.test // len(CLASSES))
    parts = {
        "real": (images, labels, per_class(task, labels, 0, args.shots)),
        "val": (images, labels, per_class(task, labels, 100, args.val)),
        "further-real": (images, labels, per_class(task, labels, args.start, args.further)),
        "test": (test_images, test_labels, test),
    }
    for part, (x, y, index) in parts.items():
        if not len(index):
            continue
        (args.out / part).mkdir(parents=True, exist_ok=True)
        name = "test" if part == "test" else "train"
        count = write_shard(args.out / part / "00000.tar", samples(name, x, y, index))
        print(f"{part}: {count} samples")


if __name__ == "__main__":
    main()
