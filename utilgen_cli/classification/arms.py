"""The arms of a comparison: real only, each synthetic set alone, each joined with real."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..runtime.errors import UsageError
from .data import LabelledImages, concatenate

REAL, ALONE, JOINT = "real", "alone", "joint"


@dataclass(frozen=True)
class Arm:
    """What one row of the table trains on; `mix` is the synthetic part of a joint arm."""

    name: str
    kind: str  # REAL, ALONE or JOINT
    data: LabelledImages
    mix: LabelledImages | None = None
    synthetic: str | None = None  # name of the synthetic set
    times: float | None = None  # its volume as a multiple of real, where that was asked for

    @property
    def n_real(self) -> int:
        """Real training images."""
        return 0 if self.kind == ALONE else len(self.data)

    @property
    def n_synthetic(self) -> int:
        """Synthetic training images."""
        return len(self.data) if self.kind == ALONE else len(self.mix) if self.mix else 0


def build_arms(
    real: LabelledImages,
    synthetic: Mapping[str, LabelledImages],
    validation: LabelledImages | None = None,
    times: Sequence[float] = (),
) -> list[Arm]:
    """Real only, then each set alone, then each joined with real.

    `validation`, if given, joins the real share of every arm that has one. `times` cuts the sets
    to multiples of the size of `real`; with several, each volume is an arm of its own.
    """
    share = real if validation is None else concatenate([real, validation])
    volumes = [
        (name, k, at_volume(name, s, real, k))
        for name, s in synthetic.items()
        for k in (times or (None,))
    ]
    label = {(n, k): n if len(times) < 2 else f"{n} x{k:g}" for n, k, _ in volumes}
    alone = [Arm(label[n, k], ALONE, s, None, n, k) for n, k, s in volumes]
    joint = [Arm(f"real + {label[n, k]}", JOINT, share, s, n, k) for n, k, s in volumes]
    arms = [Arm("real", REAL, share), *alone, *joint]
    names = [arm.name for arm in arms]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"--synthetic, --times: {twice!r}", "two arms would have this name",
                         "Name the sets, or choose the volumes, otherwise.")  # fmt: skip
    return arms


def at_volume(
    name: str, synthetic: LabelledImages, real: LabelledImages, times: float | None
) -> LabelledImages:
    """The first `times` x (real images of the class) synthetic images of each class."""
    if times is None:
        return synthetic
    keep = []
    for label, class_name in enumerate(real.classes):
        wanted = round(times * int((real.labels == label).sum()))
        own = torch.nonzero(synthetic.labels == label).flatten()
        if len(own) < wanted:
            raise UsageError(
                f"--times {times:g}",
                f"{name} has {len(own)} images of {class_name!r}, not {wanted}",
                f"Generate {wanted} a class, or lower --times.",
            )  # fmt: skip
        keep.append(own[:wanted])
    if not any(len(own) for own in keep):
        raise UsageError(f"--times {times:g}", f"leaves no image of {name}", "Raise it.")
    return synthetic.subset(torch.cat(keep).sort().values)


def digest_shards(paths: Sequence[Path]) -> str:
    """SHA-256 over the bytes of the shards, in order."""
    whole = hashlib.sha256()
    for path in paths:
        with path.open("rb") as f:
            whole.update(hashlib.file_digest(f, "sha256").digest())
    return whole.hexdigest()


def digest_images(data: LabelledImages) -> str:
    """SHA-256 over pixels and labels: what training can see of a set."""
    whole = hashlib.sha256()
    for images in data.images.split(4096):
        whole.update(images.numpy().tobytes())
    whole.update(data.labels.numpy().tobytes())
    return whole.hexdigest()
