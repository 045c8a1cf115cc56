"""The row of the model card: label fidelity, and accuracy of classifiers trained on the images.

Class-prompt images of the bundle at several CFG scales (80 a class), beside the 16 real shots and
as many real images of the task's own distribution (from the pre-training split, unshifted). Tested
on 2,000 official test images; `--seeds` classifiers an arm.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1] / "study"))
from fashion import CLASSES
from judge import pretraining_images

from utilgen_cli.classification.data import LabelledImages, load_images
from utilgen_cli.classification.models import build_classifier, load_classifier
from utilgen_cli.classification.train import TrainConfig, predict, train_classifier
from utilgen_cli.shards.operands import open_source

DATA = Path(__file__).parents[1] / "data"


def load(path: Path) -> LabelledImages:
    return load_images(open_source([str(path)]), 32, list(CLASSES))


def accuracy(
    data: LabelledImages, mix: LabelledImages | None, test: LabelledImages, seeds: int, steps: int
) -> str:
    """`mean +- standard deviation` in percent over the seeds."""
    found = []
    for seed in range(seeds):
        model = build_classifier("small-cnn", len(CLASSES), 32, seed=seed)
        train_classifier(model, data, TrainConfig(steps=steps), seed=seed, mix=mix)
        hit = predict(model, test.images).argmax(1) == test.labels
        found.append(100 * hit.float().mean().item())
    return f"{statistics.mean(found):.1f} +- {statistics.stdev(found):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("judge", type=Path)
    parser.add_argument("work", type=Path, help="where the drawn images go")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 2.0, 4.0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--shards", type=Path, nargs="*", default=[], help="further arms")
    args = parser.parse_args()
    torch.set_num_threads(1)
    judge = load_classifier(args.judge)
    real, test = load(DATA / "real"), load(DATA / "test")
    arms: dict[str, LabelledImages] = {}
    for scale in args.scales:
        out = args.work / f"cfg-{scale:g}"
        subprocess.run(
            ["utilgen", "generate", "-q", "-m", args.model, "--per-class", "80",
             "--guidance-scale", str(scale), "-o", out], check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        arms[f"class prompt, CFG {scale:g}"] = load(out)
    arms |= {str(path): load(path) for path in args.shards}
    arms["real images of the task"] = pretraining_images(800)
    alone = accuracy(real, None, test, args.seeds, args.steps)
    print(json.dumps({"arm": "real only", "joint": alone}))
    for name, data in arms.items():
        said = predict(judge, data.images).argmax(1)
        row = {
            "arm": name, "fidelity": round(100 * (said == data.labels).float().mean().item(), 1),
            "synthetic only": accuracy(data, None, test, args.seeds, args.steps),
            "joint": accuracy(real, data, test, args.seeds, args.steps),
        }  # fmt: skip
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
