"""What `utility.json` says of a sample: its utility, and a small vector to compare it by."""

from __future__ import annotations

import base64
import sys
from typing import Any

import numpy as np

from ..runtime.errors import BadInput
from .sample import Sample

UTILITY = "utility.json"
WIDTH = 64  # features are projected to so many numbers: distances change by about a tenth


def score_of(sample: Sample) -> dict[str, Any]:
    """`utility.json`, checked. BadInput: it is not there, its utility is no finite number, or what
    it says was predicted is no number of a class."""
    if UTILITY not in sample.members:
        why = "the samples have no utility.json"
        raise BadInput(sample.key, why, "Run `utilgen value score` first.")
    score = sample.parsed(UTILITY)
    utility: Any = score.get("utility")
    if type(utility) not in (int, float) or not abs(utility) <= sys.float_info.max:
        raise sample.bad(f"its utility is {utility!r}, not a number")
    if type(predicted := score.get("predicted", 0)) is not int:
        raise sample.bad(f"its predicted is {predicted!r}, not the number of a class")
    return score


def utility_of(sample: Sample) -> float:
    """The sample's utility, checked as `score_of` does."""
    return float(score_of(sample)["utility"])


def check_utility(sample: Sample) -> None:
    """BadSample unless the utility, if there is one, is a number."""
    if UTILITY in sample.members:
        utility_of(sample)


def pack_features(features: np.ndarray) -> list[str]:
    """Feature vectors [N, D] as text, for JSON: float16 of a fixed random projection to 64."""
    rows = np.asarray(features, np.float32)
    if rows.shape[1] > WIDTH:
        directions = np.random.default_rng(0).standard_normal((rows.shape[1], WIDTH), np.float32)
        rows = rows @ directions / WIDTH**0.5
    return [base64.b64encode(row.tobytes()).decode() for row in rows.astype("<f2")]


def unpack_features(text: str) -> np.ndarray:
    """The vector that `pack_features` packed, float32 [at most 64]. ValueError if it is none."""
    row = np.frombuffer(base64.b64decode(text, validate=True), "<f2").astype(np.float32)
    if not len(row) or not np.isfinite(row).all():
        raise ValueError("not a feature vector")
    return row
