"""The judge: a classifier trained on the images that the bundle was made from, both as they are and
shifted as the bundle saw them: one that knows no shift takes many right images for wrong ones.

It reports label fidelity and nothing else: no stage of the loop may see it.
`python judge.py train judge.safetensors [--pool SHARDS]` (else the 50,000 of Fashion-MNIST);
`python judge.py score judge.safetensors synth/ ...`
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from utilgen_cli.classification.data import LabelledImages, load_images
from utilgen_cli.classification.models import build_classifier, load_classifier, save_classifier
from utilgen_cli.classification.train import TrainConfig, predict, train_classifier
from utilgen_cli.runtime.progress import reporter
from utilgen_cli.shards.operands import open_source

sys.path.append(str(Path(__file__).parents[1] / "tiny"))
from fashion import CLASSES, load, split
from pool import Shift, open_pool


def pretraining_images(count: int | None = None) -> LabelledImages:
    """The unshifted pre-training images (the first `count` of a seeded shuffle)."""
    images, labels = load("train")
    index, _ = split(labels)
    index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(0))[:count]]
    keys = [f"train-{i:05d}" for i in index.tolist()]
    rgb = images[index][:, None].expand(-1, 3, -1, -1)
    return LabelledImages(rgb, labels[index], keys, list(CLASSES))


def as_seen(pool: Path | None) -> LabelledImages:
    """Every image of the pool (else Fashion-MNIST) twice: as it is, and shifted."""
    found, generator = open_pool(pool), torch.Generator().manual_seed(0)
    shifted = [
        (255 * Shift.draw(len(part), generator).apply(part, found.beyond)).round().to(torch.uint8)
        for part in found.images.split(1000)
    ]
    images = torch.cat([found.images, *shifted]).expand(-1, 3, -1, -1)
    keys = [str(i) for i in range(len(images))]
    return LabelledImages(images, found.labels.repeat(2), keys, list(found.classes))


def train(path: Path, steps: int, pool: Path | None) -> None:
    data = as_seen(pool)
    model = build_classifier("small-cnn", len(data.classes), 32)
    config = TrainConfig(steps=steps, batch_size=128)
    train_classifier(model, data, config, seed=0, progress=reporter(False))
    save_classifier(path, model)
    if pool is None:
        images, labels = load("t10k")
        hit = predict(model, images[:, None].expand(-1, 3, -1, -1)).argmax(1) == labels
        print(f"judge: {hit.float().mean():.4f} on the 10,000 test images", file=sys.stderr)


def score(path: Path, shards: list[str]) -> None:
    model = load_classifier(path)
    for operand in shards:
        data = load_images(open_source([operand]), 32)
        hit = (predict(model, data.images).argmax(1) == data.labels).float()
        per_class = [hit[data.labels == c].mean().item() for c in range(len(data.classes))]
        print(json.dumps({"shards": operand, "images": len(data), "fidelity": hit.mean().item(),
                          "per_class": [round(p, 3) for p in per_class]}))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("do", choices=("train", "score"))
    parser.add_argument("judge", type=Path)
    parser.add_argument("shards", nargs="*")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--pool", type=Path, help="shards to learn from, not Fashion-MNIST")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.do == "train":
        train(args.judge, args.steps, args.pool)
    else:
        score(args.judge, args.shards)


if __name__ == "__main__":
    main()
