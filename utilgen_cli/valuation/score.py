"""The per-sample gate: `utility.json` for every sample of a stream."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..runtime.files import encode_json
from ..runtime.progress import Progress, silent
from ..shards.images import decode_many
from ..shards.sample import Sample
from ..shards.scores import UTILITY, pack_features
from .baselines import check_method, valuer
from .neighbours import Memory
from .value_model import Judgement, ValueModel

FIELDS = ("utility", "loss", "probability", "margin", "nearest", "disagreement")


@dataclass
class ClassSummary:
    """Sums over the samples of one class."""

    samples: int = 0
    right: int = 0  # predicted as what they are labelled
    duplicates: int = 0
    sums: dict[str, float] = field(default_factory=dict)

    def add(self, other: ClassSummary) -> None:
        self.samples += other.samples
        self.right += other.right
        self.duplicates += other.duplicates
        for name, total in other.sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + total

    def row(self) -> dict[str, Any]:
        """Means and shares."""
        n = max(1, self.samples)
        means = {name: round(total / n, 4) for name, total in self.sums.items()}
        return {
            "samples": self.samples,
            "disagreement": None,
            **means,
            "agreement": round(self.right / n, 4),
            "duplicates": round(self.duplicates / n, 4),
        }


class Scorer:
    """A stage: samples in, the same samples with `utility.json` out, in order; memory is flat.

    `nearest` looks among the real images and the last 4,096 samples of the same shard (or stream),
    so that a resumed run writes the same bytes. `passes` members judge each sample: what it
    trained on, that of its fold alone. One costs what a plain inference pass does, and was measured
    as good as nine; only two or more can disagree. `agreed`: what is seen as another class than its
    own is counted, and not passed on.
    """

    def __init__(
        self,
        value: ValueModel,
        method: str = "weight-net",
        batch_size: int = 256,
        progress: Progress = silent,
        passes: int = 1,
        agreed: bool = False,
    ) -> None:
        self.value, self.method, self.batch_size = value, check_method(method), batch_size
        self.passes, self.agreed = passes, agreed
        self.values = valuer(method, value)
        self.progress = progress
        self.classes: dict[int, ClassSummary] = {}

    def __call__(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        for scored, _ in self.with_features(samples):
            yield scored

    def with_features(self, samples: Iterable[Sample]) -> Iterator[tuple[Sample, Tensor]]:
        """Scored samples, each with its unit feature vector [D]."""
        stored = [self.value.reference[f"{name}_features"] for name in ("train", "validation")]
        memory = Memory(torch.cat(stored))
        iterator = iter(samples)
        with self.progress("value score", None) as task:
            while batch := list(itertools.islice(iterator, self.batch_size)):
                judged, labels = self._judge(batch)
                facts = self._facts(judged, labels, memory.nearest(judged.features))
                task.advance(len(batch))
                features = judged.features.cpu()
                packed = pack_features(features.numpy())
                for i, (sample, entry) in enumerate(zip(batch, facts, strict=True)):
                    self._count(sample.label, entry)
                    if self.agreed and entry["predicted"] != sample.label:
                        continue
                    entry["features"] = packed[i]
                    yield sample.with_member(UTILITY, encode_json(entry)), features[i]

    def _count(self, label: int, facts: dict[str, Any]) -> None:
        duplicate = facts["nearest"] < self.value.facts["duplicate_distance"]
        sums = {n: facts[n] for n in ("utility", "loss", "disagreement") if facts[n] is not None}
        one = ClassSummary(1, int(facts["predicted"] == label), int(duplicate), sums)
        self.classes.setdefault(label, ClassSummary()).add(one)

    def take(self) -> dict[str, Any]:
        """The sums per class, as JSON; they begin anew."""
        sums = {str(label): asdict(entry) for label, entry in self.classes.items()}
        self.classes = {}
        return sums

    def add(self, sums: dict[str, Any]) -> None:
        """Add what was taken."""
        for label, entry in sums.items():
            self.classes.setdefault(int(label), ClassSummary()).add(ClassSummary(**entry))

    def _judge(self, batch: list[Sample]) -> tuple[Judgement, Tensor]:
        for sample in batch:
            check_class(sample, self.value)
        arrays = decode_many(batch, self.value.size, torch.get_num_threads())
        # channels last, as convolutions like it
        images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
        labels = torch.tensor([s.label for s in batch])
        return self.value.judge_pixels(images, labels, self.batch_size, self.passes), labels

    def _facts(self, judged: Judgement, labels: Tensor, nearest: Tensor) -> list[dict[str, Any]]:
        """The content of `utility.json` of each sample."""
        labels = labels.to(judged.loss.device)
        own = judged.probabilities.gather(1, labels[:, None])[:, 0]
        others = judged.probabilities.scatter(1, labels[:, None], 0.0).amax(1)
        value = self.values(judged, labels)
        columns = (value, judged.loss, own, own - others, nearest, judged.spread)
        rows = zip(*(c.tolist() for c in columns), strict=True)
        predicted = judged.probabilities.argmax(1).tolist()
        return [
            {
                **{name: float(f"{x:.6g}") for name, x in zip(FIELDS, row, strict=True)},
                **({"disagreement": None} if self.passes == 1 else {}),
                "predicted": p,
                "method": self.method,
            }
            for row, p in zip(rows, predicted, strict=True)
        ]

    def _name(self, label: int) -> str:
        """What a class is called; ImageNet has two cranes, which are told apart by their number."""
        name = self.value.classes[label]
        return f"{name} ({label})" if self.value.classes.count(name) > 1 else name

    def summary(self) -> dict[str, Any]:
        """Per class and over all, as JSON."""
        total = ClassSummary()
        for label in sorted(self.classes):
            total.add(self.classes[label])
        rows = {self._name(i): self.classes[i].row() for i in sorted(self.classes)}
        passed = total.right if self.agreed else total.samples
        return {"method": self.method, "all": total.row(), "passed": passed, "classes": rows}


def check_class(sample: Sample, value: ValueModel) -> None:
    """BadInput if the sample's class is none that `value` learnt, or has another name there."""
    label, classes = sample.label, value.classes
    if label >= len(classes):
        raise sample.bad(f"class {label}: the value model knows {len(classes)} classes")
    name = sample.facts.get("class_name", classes[label])
    if name != classes[label] and label not in value.unnamed:
        raise sample.bad(f"class {label} is {name!r}, in the value model {classes[label]!r}")
