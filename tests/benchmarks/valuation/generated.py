"""Telling wrong-label from right-label images of the tiny generator, with 16 + 16 shots a class.

What is right is said by a judge trained on the 50,000 pre-training images, as they are and shifted as
the generator saw them (examples/study/judge.py), and used for nothing else. A classifier trained on
all 10,000 other training images shows how well anyone can agree with that judge.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from utilgen_cli.classification.data import LabelledImages, load_images
from utilgen_cli.classification.models import load_classifier
from utilgen_cli.classification.train import predict
from utilgen_cli.shards.operands import open_source
from utilgen_cli.valuation.canary import auroc
from utilgen_cli.valuation.todv import ValueConfig
from utilgen_cli.valuation.training import ValueData, train_values

from ..store import Run, Stopwatch, Store, spread, table
from .world import SHOTS, retrained

JUDGE = "UTILGEN_JUDGE"  # a judge.safetensors; made where there is none
PER_CLASS = 80
SIDES = {
    "utilgen, default": ValueConfig(),
    "utilgen, --augment affine --steps 800": ValueConfig(augment="affine", steps=800),
    "utilgen, one classifier, in-sample": ValueConfig(folds=1, snapshots=1),
}


@dataclass
class Drawn:
    """The generated images and whether the judge sees each as its label."""

    images: LabelledImages
    right: Tensor


def drawn(directory: Path) -> Drawn:
    """`utilgen generate -m tiny --per-class 80`, made once, and judged."""
    shards, judge = (
        directory / "generated",
        Path(os.environ.get(JUDGE, directory / "judge.safetensors")),
    )
    command = [sys.executable, "-m", "utilgen_cli", "generate", "-m", "tiny", "--per-class"]
    subprocess.run([*command, str(PER_CLASS), "-q", "-o", f"{shards}/"], check=True)
    if not judge.exists():
        script = Path(__file__).parents[3] / "examples" / "study" / "judge.py"
        subprocess.run([sys.executable, str(script), "train", str(judge)], check=True)
    images = load_images(open_source([str(shards)]), 32)
    return Drawn(images, predict(load_classifier(judge), images.images).argmax(1) == images.labels)


def held_out_images() -> LabelledImages:
    """The 10,000 training images that neither generator nor judge has seen, 32 pixels."""
    from fashion import CLASSES, load, split

    images, labels = load("train")
    at = split(labels)[1]
    rgb = images[at][:, None].expand(-1, 3, -1, -1)
    return LabelledImages(rgb, labels[at], [str(i) for i in at.tolist()], list(CLASSES))


def shots(data: LabelledImages, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """Real and validation shots of one seed."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    y = data.labels[order]
    at = torch.stack([order[y == c][: 2 * SHOTS] for c in range(10)])
    real, validation = (data.subset(at[:, i : i + SHOTS].flatten()) for i in (0, SHOTS))
    return real, validation


def told_apart(found: Drawn, values: Tensor) -> float:
    return auroc(values[found.right], values[~found.right])


def minus_losses(model: torch.nn.Module, data: LabelledImages) -> Tensor:
    return -F.cross_entropy(predict(model, data.images), data.labels, reduction="none")


def ours(found: Drawn, data: LabelledImages, config: ValueConfig, seed: int) -> Run:
    """AUROC of W and of minus the loss, and CPU seconds."""
    real, validation = shots(data, seed)
    with tempfile.TemporaryDirectory() as name, Stopwatch() as watch:
        value = train_values(
            ValueData(real, found.images, validation), config, Path(name), seed=seed
        )
        judged = value.judge_pixels(found.images.images, found.images.labels)
    return {
        "auroc": told_apart(found, judged.logit),
        "loss": told_apart(found, -judged.loss),
        "canary": value.facts["canary"]["auroc"],
        "seconds": watch.seconds,
    }


def generated_table(stores: dict[str, Store], seeds: int) -> str:
    """The table of generated images."""
    store = stores["generated"]
    found, data = drawn(store.path.parent), held_out_images()
    rows = []
    for name, config in SIDES.items():
        runs = [
            store.get(f"{name} seed {s}", lambda c=config, s=s: ours(found, data, c, s))
            for s in range(seeds)
        ]
        rows.append([name, *(spread([run[k] for run in runs]) for k in ("auroc", "loss", "canary")),
                     spread([run["seconds"] for run in runs], 0)])  # fmt: skip
    most = [store.get(f"all seed {s}", lambda s=s: everything(found, data, s)) for s in range(2)]
    rows.append(["classifier on 10,000 images", "", spread([run["auroc"] for run in most]), "", ""])
    share = float(found.right.float().mean())
    note = f"{len(found.images)} images, {100 * share:.1f} % right by the judge."
    head = ["side", "AUROC of W", "of minus the loss", "canary", "CPU seconds"]
    return table(head, rows) + f"\n\n{note}"


def everything(found: Drawn, data: LabelledImages, seed: int) -> Run:
    """What a classifier that no few-shot user has makes of it."""
    model = retrained(data, seed, 800, augmentation="affine")
    return {"auroc": told_apart(found, minus_losses(model, found.images))}
