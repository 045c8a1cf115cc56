"""Why a synthetic set helps or not, as classifiers see it that were trained on real images only.

Fidelity (do the probes agree with the labels?), distribution and influence are three different
things and are reported as three. Test images have no part in any of them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..runtime.files import write_json
from .arms import digest_images
from .data import LabelledImages
from .distribution import compare
from .evaluation import Run, weights_path
from .influence import direction, influence_parts, mean_over, positive_share, temperature
from .models import Classifier
from .towers import Towers


@dataclass
class Probe:
    """One real-trained classifier and how it sees the reference set."""

    model: Classifier
    reference: Tensor  # features [V, D]
    s: Tensor  # direction of influence [C, D+1]


@torch.no_grad()
def _calibrate(model: Classifier, reference: LabelledImages, towers: Towers) -> None:
    """Divide the head by its temperature.

    A few-shot classifier is overconfident, so that anything that lowers its confidence, a false
    label too, would lower the validation loss and count as helpful.
    """
    t = temperature(see(model, reference, towers)[1], reference.labels)
    model.head.weight.div_(t)
    model.head.bias.div_(t)


@torch.no_grad()
def see(model: Classifier, data: LabelledImages, towers: Towers) -> tuple[Tensor, Tensor]:
    """(features [N, D], logits [N, C]) of a set, on the CPU in fp32."""
    features = towers.features(model, data.images)
    head = model.head
    return features, torch.nn.functional.linear(features, head.weight.cpu(), head.bias.cpu())


class Analyst:
    """Judges synthetic sets with probes; each judgement is kept in `directory` by its content.

    `reference` is the validation set: real images on which the probes were not trained.
    """

    def __init__(
        self, probes: Sequence[Run], directory: Path, real: LabelledImages,
        reference: LabelledImages, towers: Towers,
    ) -> None:  # fmt: skip
        self.runs, self.directory, self.towers = probes, directory, towers
        self.real, self.reference = real, reference
        self._probes: list[Probe] = []

    def analyse(self, synthetic: LabelledImages, count: int | None = None) -> dict[str, Any]:
        """`agreement`, `distribution` (of `count` images) and `influence` (with the `values` a key)
        of a set."""
        path = self.directory / f"analysis-{self._code(synthetic, count)}.json"
        if not path.exists():
            write_json(path, self._judge(synthetic, count))
        return json.loads(path.read_text())

    def _code(self, synthetic: LabelledImages, count: int | None) -> str:
        parts = [run.name for run in self.runs]
        parts += [digest_images(d) for d in (synthetic, self.reference, self.real)]
        if count is not None and count < len(synthetic):
            parts.append(f"{count} images")
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def _judge(self, synthetic: LabelledImages, count: int | None) -> dict[str, Any]:
        probes = self._load()
        first, *others = (probe.model for probe in probes)
        seen_first = see(first, synthetic, self.towers)
        seen = itertools.chain([seen_first], (see(m, synthetic, self.towers) for m in others))
        votes, a, b = mean_over(
            (z.softmax(1), *influence_parts(x, z, probe.s))
            for probe, (x, z) in zip(probes, seen, strict=True)
        )
        influence = positive_share((a, b), synthetic.labels)
        arch = self.runs[0].arch
        return {
            "agreement": (votes.argmax(1) == synthetic.labels).double().mean().item(),
            "distribution": compare(
                probes[0].reference, self.reference.labels, seen_first[0], synthetic.labels,
                f"{arch} trained on {len(self.real)} real images", count,
            ),
            "influence": influence | {"models": len(probes)},
        }  # fmt: skip

    def _load(self) -> list[Probe]:
        if not self._probes:
            self._probes = [self._probe(run) for run in self.runs]
        return self._probes

    def _probe(self, run: Run) -> Probe:
        classes, size = len(self.real.classes), self.real.images.shape[-1]
        path = weights_path(self.directory, run)
        model = self.towers.load(path, run.arch, classes, size)
        _calibrate(model, self.reference, self.towers)
        features, logits = see(model, self.reference, self.towers)
        s = direction(see(model, self.real, self.towers), (features, logits, self.reference.labels))
        return Probe(model, features, s)
