"""`value train` as a library call: data in, a directory with a value model out."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import __version__
from ..classification.data import LabelledImages, to_float
from ..classification.models import Classifier
from ..runtime.artefact import CHECKPOINT, seal
from ..runtime.checkpoint import remove_checkpoint, save_tensors
from ..runtime.files import write_json
from ..runtime.progress import Progress, silent
from .canary import auroc, verdict, wrong_labels
from .neighbours import nearest_others
from .pool import PLANTED, REAL, VALIDATION, Pool, make_pool
from .todv import Trajectory, ValueConfig, snapshot_name, train_trajectory
from .value_model import (
    FORMAT,
    REFERENCE,
    VALUE_JSON,
    Snapshot,
    ValueModel,
    load_value,
    read_snapshots,
)

BATCH = 256  # images that are judged at once


@dataclass
class ValueData:
    """The images of a run, all at the classifier's size and with the same classes."""

    real: LabelledImages
    synthetic: LabelledImages | None = None
    validation: LabelledImages | None = None


def train_values(
    data: ValueData,
    config: ValueConfig,
    directory: Path,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> ValueModel:
    """Learn the value of samples (TODV); the model is written into `directory`, value.json last.

    Goes on from `directory`/checkpoint.safetensors where there is one, to the same bytes.
    """
    pool, known = make_pool(
        data.real, data.synthetic, data.validation,
        folds=config.folds, canaries=config.canaries, seed=seed,
    )  # fmt: skip
    size = data.real.images.shape[-1]
    run = Trajectory(config, pool, size, seed, torch.device(device), progress)
    checkpoint = directory / CHECKPOINT
    train_trajectory(run, directory, checkpoint, progress)
    entries = [snapshot_entry(i, config.folds) for i in range(config.snapshots)]
    facts = describe(run, entries, data, seed)
    snapshots = [s.to(device) for s in read_snapshots(directory, entries)]
    reference = reference_tensors(snapshots, pool, known)
    save_tensors(directory / REFERENCE, reference)
    facts["duplicate_distance"] = duplicate_distance(reference)
    facts["canary"] = watch_canaries(ValueModel(snapshots, facts, reference).to(device), pool, seed)
    seal(directory)
    write_json(directory / VALUE_JSON, facts)
    remove_checkpoint(checkpoint)
    return load_value(directory, device, force=True)


def snapshot_entry(number: int, folds: int) -> dict[str, Any]:
    """The files of a snapshot, as value.json lists them."""
    name = snapshot_name(number)
    return {
        "classifiers": [f"{name}/classifier-{k}.safetensors" for k in range(folds)],
        "weight_net": f"{name}/weight_net.safetensors",
    }


def describe(
    run: Trajectory, entries: list[dict[str, Any]], data: ValueData, seed: int
) -> dict[str, Any]:
    """What value.json says, but for the canary."""
    steps = run.config.snapshot_steps()
    sets = {"real": data.real, "synthetic": data.synthetic, "validation": data.validation}
    transform = run.models[0].transform
    return {
        "format": FORMAT,
        "arch": run.config.arch,
        "classes": run.pool.classes,
        "unnamed": sorted(data.real.unnamed),
        "transform": {k: list(v) if isinstance(v, tuple) else v for k, v in transform.items()},
        "config": run.config.facts(),
        "seed": seed,
        "samples": {name: len(found) if found else 0 for name, found in sets.items()},
        "history": run.history,
        "weight_curve": run.weight_net.curve(),
        "loss_range": [float(run.weight_net.low), float(run.weight_net.high)],
        "snapshots": [{"step": s, **e} for s, e in zip(steps, entries, strict=True)],
        "versions": {
            "utilgen": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


@torch.no_grad()
def reference_tensors(
    snapshots: list[Snapshot], pool: Pool, known: dict[int, int]
) -> dict[str, Tensor]:
    """What scoring compares with: the folds, and the features of real images."""
    found = {
        "hash": torch.tensor(list(known), dtype=torch.int64),
        "fold": torch.tensor(list(known.values()), dtype=torch.int16),
    }
    judge = cast(Classifier, snapshots[-1].classifiers[0])
    sets = {"train": pool.trained_on(0)[0], "validation": pool.validated_on(0)}
    for name, at in sets.items():
        found[f"{name}_features"] = F.normalize(features_of(judge, pool.images, at), dim=1)
        found[f"{name}_labels"] = pool.labels[at]
    return found


def duplicate_distance(reference: dict[str, Tensor]) -> float:
    """A fifth of the usual distance between a real image and its nearest one."""
    features = torch.cat([reference[f"{name}_features"] for name in ("train", "validation")])
    return round(max(1e-6, 0.2 * nearest_others(features).median().item()), 8)


def features_of(classifier: Classifier, images: Tensor, at: Tensor) -> Tensor:
    """Penultimate features of the uint8 images that stand `at` [N], [N, D], on the CPU."""
    device = next(classifier.parameters()).device
    parts = (to_float(images[part].to(device)) for part in at.split(BATCH))
    return torch.cat([classifier.features(x).float().cpu() for x in parts])


def watch_canaries(value: ValueModel, pool: Pool, seed: int) -> dict[str, Any]:
    """AUROC of real images under their own label over the same under wrong ones, by W and, to tell
    what W adds, by the held-out loss alone.

    With folds nobody judges an image that it trained on, so that every wrong label will do: the few
    that were planted would say little. Without, what was planted is judged as it was trained on.
    """
    planted = torch.nonzero(pool.roles == PLANTED)[:, 0]
    real = torch.nonzero((pool.roles == REAL) | (pool.roles == VALIDATION))[:, 0]
    if value.folds > 1:
        at, wrong = wrong_labels(pool.labels[real], len(pool.classes), seed)
        at = real[at]
    else:
        at, wrong = planted, pool.labels[planted]
    if len(wrong) == 0:
        return {"auroc": None, "planted": 0, "judged": 0, "verdict": verdict(None)}
    right, right_losses = judged_at(value, pool.images, real, pool.labels[real])
    under, under_losses = judged_at(value, pool.images, at, wrong)
    found = auroc(right, under)
    return {"auroc": round(found, 4), "planted": len(planted), "judged": len(wrong),
            "auroc_of_minus_loss": round(auroc(-right_losses, -under_losses), 4),
            "verdict": verdict(found)}  # fmt: skip


def judged_at(
    value: ValueModel, images: Tensor, at: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Held-out logits and losses of the uint8 images that stand `at` [N], under labels [N]: [N]
    each; a batch of pixels at a time."""
    parts = zip(at.split(BATCH), labels.split(BATCH), strict=True)
    found = [value.judge_pixels(images[p], y) for p, y in parts]
    return torch.cat([f.logit for f in found]), torch.cat([f.loss for f in found])
