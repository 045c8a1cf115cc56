"""Scored samples that wait to be paired: a few numbers each in memory, their images on disk."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..runtime.errors import BadInput
from ..runtime.files import encode_json
from ..runtime.progress import Progress, silent
from ..shards.images import decode_rgb
from ..shards.sample import Sample

DESCRIPTOR_SIDE = 8  # a descriptor is the image as 8 x 8 grey levels


@dataclass(frozen=True, slots=True)
class Candidate:
    """One pooled sample, read back from disk."""

    key: str
    extension: str
    image: bytes
    facts: dict[str, str | None]  # class_name, prompt, model


class SamplePool:
    """About 50 bytes of memory a sample; the image and its facts lie in a temporary file."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="utilgen-pairs-", buffering=1 << 20)  # noqa: SIM115
        self._label, self._head, self._image = array("i"), array("i"), array("i")
        self._group, self._digest, self._offset = array("q"), array("q"), array("q")
        self._utility = array("d")
        self._end = 0

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

    def add(self, sample: Sample) -> None:
        """Keep one scored sample. BadInput if it was not scored."""
        utility = _utility(sample)
        extension, image = sample.image
        facts = sample.facts
        head = {name: facts.get(name) for name in ("class_name", "prompt", "model")}
        head_bytes = encode_json({"key": sample.key, "extension": extension, "facts": head})
        self._file.write(head_bytes)
        self._file.write(image)
        self._label.append(sample.label)
        self._group.append(_hash64(f"{sample.label}\0{head['prompt'] or ''}".encode()))
        self._digest.append(_hash64(image))
        self._utility.append(utility)
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
        return Candidate(head["key"], head["extension"], data[head_length:], head["facts"])

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

    def close(self) -> None:
        """Give the disk space back."""
        self._file.close()

    def __enter__(self) -> SamplePool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _utility(sample: Sample) -> float:
    if "utility.json" not in sample.members:
        raise BadInput(
            sample.key, "the samples have no utility.json", "Run `utilgen value score` first."
        )
    utility: Any = sample.parsed("utility.json").get("utility")
    if type(utility) not in (int, float) or not math.isfinite(utility):
        raise BadInput(
            sample.key,
            f"its utility is {utility!r}, not a number",
            "Run `utilgen value score` again.",
        )
    return float(utility)


def _hash64(data: bytes) -> int:
    digest = hashlib.blake2b(data, digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
