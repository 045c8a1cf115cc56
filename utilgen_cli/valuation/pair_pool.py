"""Scored samples that wait to be paired: a few numbers each in memory, their images on disk."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from ..runtime.errors import BadInput
from ..runtime.files import encode_json
from ..runtime.progress import Progress, silent
from ..shards.classes import note_name
from ..shards.images import decode_rgb
from ..shards.sample import Sample
from ..shards.scores import score_of, unpack_features

Describe = Callable[[list[np.ndarray]], np.ndarray]  # uint8 [H, W, 3] each -> float32 [N, D]
DESCRIPTOR_SIDE = 8  # a descriptor is the image as 8 x 8 grey levels


@dataclass(frozen=True, slots=True)
class Candidate:
    """One pooled sample, read back from disk."""

    key: str
    extension: str
    image: bytes
    facts: dict[str, str | None]  # class_name, prompt, model
    features: str | None  # of the value model, packed


class SamplePool:
    """About 50 bytes of memory a sample; the image and its facts lie in a temporary file."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="utilgen-pairs-", buffering=1 << 20)  # noqa: SIM115
        self._label, self._head, self._image = array("i"), array("i"), array("i")
        self._group, self._digest, self._offset = array("q"), array("q"), array("q")
        self._utility, self._agreed = array("d"), array("b")  # agreed: yes, no, or -1: unknown
        self._end = 0
        self._names: dict[int, str] = {}
        self.featured = 0  # samples with features of the value model

    def __len__(self) -> int:
        return len(self._label)

    @property
    def label(self) -> np.ndarray:
        """Class of each sample, int32 [N]."""
        return np.frombuffer(self._label, np.int32)

    @property
    def group(self) -> np.ndarray:
        """Hash of (class, prompt) of each sample, int64 [N]: pairs are made within a group."""
        return np.frombuffer(self._group, np.int64)

    @property
    def digest(self) -> np.ndarray:
        """Hash of the image file of each sample, int64 [N]."""
        return np.frombuffer(self._digest, np.int64)

    @property
    def utility(self) -> np.ndarray:
        """Utility of each sample, float64 [N]."""
        return np.frombuffer(self._utility, np.float64)

    def agreed(self, indices: np.ndarray) -> np.ndarray:
        """Which samples the value model sees as their class, bool [len(indices)]. BadInput: it is
        not said of all."""
        found = np.frombuffer(self._agreed, np.int8)[indices]
        if (found < 0).any():
            key = self.read(int(indices[np.argmin(found)])).key
            why = "its utility.json does not say which class was predicted"
            raise BadInput(key, why, "Run `utilgen value score`, or use another --strategy.")
        return found.astype(bool)

    def add(self, sample: Sample) -> None:
        """Keep one scored sample. BadInput: it was not scored, or its class has another name."""
        score = score_of(sample)
        extension, image = sample.image
        facts = sample.facts
        note_name(self._names, sample.place, sample.label, facts.get("class_name"))
        head = {name: facts.get(name) for name in ("class_name", "prompt", "model")}
        features = score.get("features")
        about = {"key": sample.key, "extension": extension, "facts": head, "features": features}
        head_bytes = encode_json(about)
        self.featured += features is not None
        self._file.write(head_bytes)
        self._file.write(image)
        self._label.append(sample.label)
        self._group.append(_hash64(f"{sample.label}\0{head['prompt'] or ''}".encode()))
        self._digest.append(_hash64(image))
        self._utility.append(score["utility"])
        self._agreed.append(score["predicted"] == sample.label if "predicted" in score else -1)
        self._offset.append(self._end)
        self._head.append(len(head_bytes))
        self._image.append(len(image))
        self._end += len(head_bytes) + len(image)

    def extend(self, samples: Iterable[Sample], progress: Progress = silent) -> None:
        """Keep all of `samples`, in one pass."""
        with progress("read scored samples", None) as task:
            for sample in samples:
                self.add(sample)
                task.advance()
        self._file.flush()

    def read(self, index: int) -> Candidate:
        """Sample number `index` as it came in."""
        head_length = self._head[index]
        data = os.pread(self._file.fileno(), head_length + self._image[index], self._offset[index])
        head = json.loads(data[:head_length])
        return Candidate(head["key"], head["extension"], data[head_length:], head["facts"],
                         head["features"])  # fmt: skip

    def descriptors(self, indices: np.ndarray) -> np.ndarray:
        """Small grey versions of the images, uint8 [len(indices), 64]."""
        rows = np.empty((len(indices), DESCRIPTOR_SIDE**2), np.uint8)
        for row, index in zip(rows, indices, strict=True):
            row[:] = self._descriptor(int(index))
        return rows

    def _descriptor(self, index: int) -> np.ndarray:
        found = self.read(index)
        rgb = decode_rgb(Sample(found.key, {found.extension: found.image}), DESCRIPTOR_SIDE)
        return rgb.mean(axis=2).round().astype(np.uint8).ravel()

    def features(self, indices: np.ndarray) -> np.ndarray:
        """The value model's features, float32 [len(indices), D]. BadInput: none, or two sizes."""
        found = [self.read(int(index)) for index in indices]
        try:
            return np.stack([unpack_features(sample.features or "") for sample in found])
        except (TypeError, ValueError):
            why = "its features are not those of the others"
            raise BadInput(found[0].key, why, "Run `utilgen value score` again.") from None

    def described(self, indices: np.ndarray, describe: Describe) -> np.ndarray:
        """What `describe` makes of the images, [len(indices), D], 64 at a time."""
        rows = [np.empty((0, 1), np.float32)]
        for part in np.array_split(indices, -(-len(indices) // 64)) if len(indices) else ():
            found = [self.read(int(index)) for index in part]
            images = [decode_rgb(Sample(c.key, {c.extension: c.image})) for c in found]
            rows.append(describe(images))
        return np.concatenate(rows[1:] or rows)

    def close(self) -> None:
        """Give the disk space back."""
        self._file.close()

    def __enter__(self) -> SamplePool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _hash64(data: bytes) -> int:
    digest = hashlib.blake2b(data, digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
