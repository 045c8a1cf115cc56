"""The images of `value train`, read at the size that the architecture wants."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from functools import partial

from ..classification.data import agree, concatenate, load_images
from ..classification.models import build_classifier
from ..runtime.progress import Progress, silent
from ..shards.images import shorter_side
from ..shards.operands import Source, open_source
from ..shards.quarantine import Quarantine
from .training import ValueData

SMALLEST = 8  # pixels: below that the small CNN has nothing to pool
LARGEST = 224  # default side in pixels where the images are larger
LOOKED_AT = 256  # images whose sides are looked at


def native_size(source: Source) -> int:
    """The shorter side of the usual image (the median of the first ones), SMALLEST to LARGEST."""
    sides = [shorter_side(sample) for sample in itertools.islice(source.samples(), LOOKED_AT)]
    return max(SMALLEST, min(LARGEST, int(statistics.median_low(sides or [LARGEST]))))


def load_value_data(
    real: Sequence[str],
    synthetic: Sequence[str],
    validation: Sequence[str],
    arch: str,
    size: int | None = None,
    progress: Progress = silent,
    quarantine: Quarantine | None = None,
) -> ValueData:
    """Read all sets with the classes of `real`; BadInput where another set disagrees with them."""
    source = open_source(real, quarantine)
    # Two classes will do to learn the side of the images that the architecture is built for.
    side = build_classifier(arch, 2, size or native_size(source)).transform["size"]
    first = load_images(source, side, None, progress)
    load = partial(load_images, size=side, like=first, progress=progress)
    rest = [
        [load(open_source([name], quarantine)) for name in names]
        for names in (synthetic, validation)
    ]
    agree([first, *(data for sets in rest for data in sets)])
    joined = [concatenate(sets) if sets else None for sets in rest]
    return ValueData(first, joined[0], joined[1])
