"""Which images to show, chosen in one pass over shards, and how they stand in a page or a PNG."""

from __future__ import annotations

import base64
import heapq
import io
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..runtime.errors import printable
from ..shards.classes import note_class
from ..shards.images import decode_rgb, encode_image
from ..shards.sample import IMAGE_TYPES, Sample
from ..shards.scores import UTILITY, utility_of
from .html import Markup, join, tag

THUMB = 96  # pixels a side of an embedded image; smaller images stay as they are


@dataclass(order=True)
class Shown:
    """One image to show; ordered by utility, then by its place in the stream."""

    utility: float
    place: int
    sample: Sample = field(compare=False)
    scored: bool = field(compare=False, default=True)


@dataclass
class ClassSheet:
    """The images of one class: highest first, and lowest first."""

    name: str
    highest: list[Shown] = field(default_factory=list)
    lowest: list[Shown] = field(default_factory=list)
    count: int = 0
    scored: int = 0


def collect(samples: Iterable[Sample], limit: int) -> list[ClassSheet]:
    """The `limit` highest and lowest of each class by utility; unscored ones in stream order.

    Memory holds 2 x limit samples a class, however many there are. BadInput: a class has two names.
    """
    names: dict[int, str] = {}
    sheets: dict[int, ClassSheet] = {}
    high: dict[int, list[Shown]] = defaultdict(list)
    low: dict[int, list[tuple[tuple[float, int], Shown]]] = defaultdict(list)
    for place, sample in enumerate(samples):
        label = note_class(names, sample)
        sheet = sheets.setdefault(label, ClassSheet(str(label)))
        scored = UTILITY in sample.members
        utility = utility_of(sample) if scored else 0.0
        shown = Shown(utility, -place, sample, scored)
        sheet.count += 1
        sheet.scored += scored
        _keep(high[label], shown, limit)
        _keep(low[label], ((-utility, -place), shown), limit)
    for label, sheet in sheets.items():
        sheet.name = printable(names.get(label, sheet.name), 120)
        sheet.highest = sorted(high[label], reverse=True)
        sheet.lowest = [s for _, s in sorted(low[label], key=lambda e: e[0], reverse=True)]
    return [sheets[label] for label in sorted(sheets)]


def _keep(heap: list, item: object, limit: int) -> None:
    if len(heap) < limit:
        heapq.heappush(heap, item)
    else:
        heapq.heappushpop(heap, item)


def same_keys(
    first: Iterable[Sample], second: Iterable[Sample], per_class: int
) -> list[tuple[Sample, Sample]]:
    """Up to `per_class` samples of each class that both sets hold under one key, class by class."""
    found: dict[str, Sample] = {}
    taken: dict[int, int] = defaultdict(int)
    for sample in first:
        if taken[sample.label] < per_class:
            taken[sample.label] += 1
            found[sample.key] = sample
    pairs = [(found[s.key], s) for s in second if s.key in found]
    return sorted(pairs, key=lambda pair: pair[0].label)


def thumbnail(rgb: np.ndarray, side: int = THUMB) -> tuple[str, bytes]:
    """(media type, bytes) of an image no larger than `side`: PNG when small already, else JPEG."""
    if max(rgb.shape[:2]) <= side:
        return "image/png", encode_image(rgb)
    image = Image.fromarray(rgb)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, format="JPEG", quality=88)
    return "image/jpeg", out.getvalue()


def picture(sample: Sample, title: str) -> Markup:
    """An image with its bytes inside the page."""
    kind, data = thumbnail(decode_rgb(sample))
    source = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    return tag("img", src=source, alt=title, title=title, loading="lazy")


def caption(shown: Shown) -> str:
    """Key and utility."""
    utility = f", utility {shown.utility:.4f}" if shown.scored else ""
    return f"{shown.sample.key}{utility}"


def strip(images: Iterable[Shown]) -> Markup:
    """A row of images that wraps."""
    return tag("div", *(picture(s.sample, caption(s)) for s in images), class_="strip")


def high_low_sheet(sheets: list[ClassSheet]) -> Markup:
    """A row a class: its highest-utility images beside its lowest."""
    heads = [tag("span", text, class_="head") for text in ("", "highest utility", "lowest utility")]
    rows = [
        join(tag("span", s.name, class_="name"), strip(s.highest), strip(s.lowest)) for s in sheets
    ]
    return tag("div", *heads, *rows, class_="sheet")


def plain_sheet(sheets: list[ClassSheet], lowest: bool = False) -> Markup:
    """A row a class."""
    rows = [
        join(tag("span", f"{s.name} ({s.count})", class_="name"),
             strip(s.lowest if lowest else s.highest))
        for s in sheets
    ]  # fmt: skip
    return tag("div", *rows, class_="sheet one")


def pair_list(pairs: Iterable[tuple[Sample, Sample]], names: tuple[str, str]) -> Markup:
    """Image pairs, each with an arrow between."""
    shown = [
        tag("span", picture(a, f"{a.key}, {names[0]}"), tag("span", "→", class_="arrow"),
            picture(b, f"{b.key}, {names[1]}"), class_="pair")
        for a, b in pairs
    ]  # fmt: skip
    return tag("div", *shown, class_="pairs")


def halves(sample: Sample) -> tuple[Sample, Sample] | None:
    """Winner and loser of a preference pair as samples of their own; None for a single image."""
    sides = []
    for side in ("win", "lose"):
        kind = next((kind for kind in IMAGE_TYPES if f"{side}.{kind}" in sample.members), None)
        if kind is None:
            return None
        members = {kind: sample.members[f"{side}.{kind}"], "cls": sample._member("cls")}
        key = str(sample.facts.get(f"{side}_key", sample.key))
        sides.append(Sample(key, members, sample.origin))
    return sides[0], sides[1]


def contact_png(sheets: list[ClassSheet], lowest: bool = False, side: int = 64) -> bytes:
    """All sheets as one PNG: a row a class, its name before it."""
    font = ImageFont.load_default(14)
    rows = [s.lowest if lowest else s.highest for s in sheets]
    margin = 16 + max(int(font.getlength(s.name)) for s in sheets)
    width = margin + max(map(len, rows)) * (side + 4) + 12
    canvas = Image.new("RGB", (width, 12 + len(rows) * (side + 4) + 8), "white")
    draw = ImageDraw.Draw(canvas)
    for y, (sheet, row) in enumerate(zip(sheets, rows, strict=True)):
        top = 12 + y * (side + 4)
        draw.text((10, top + side / 2), sheet.name, fill="#555555", font=font, anchor="lm")
        for x, shown in enumerate(row):
            image = Image.fromarray(decode_rgb(shown.sample, side))
            canvas.paste(image, (margin + x * (side + 4), top))
    out = io.BytesIO()
    canvas.save(out, format="PNG")
    return out.getvalue()
