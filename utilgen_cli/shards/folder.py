"""Labelled images in folders or named by a CSV, as samples."""

from __future__ import annotations

import csv
import hashlib
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..runtime.errors import BadInput, NoInput
from .images import decode_rgb, encode_image
from .quarantine import Quarantine
from .sample import IMAGE_TYPES, Sample, encode_json, numbered_key

Labelled = tuple[int, Path]  # (class index, image file)


def list_images(
    source: Path, shots: int | None = None, seed: int = 0
) -> tuple[list[Labelled], list[str]]:
    """(class index, path) of each image, and the class names in the order of their index.

    `source` is FOLDER with a folder a class (sorted by name), or a CSV with columns path and label
    (classes in order of first appearance; paths relative to the CSV). NoInput, BadInput.
    """
    if source.is_dir():
        named = _from_folder(source)
    elif source.is_file():
        named = _from_csv(source)
    else:
        raise NoInput(str(source), "no such file or directory", "Name a folder or a CSV file.")
    images = []
    for index, (_, paths) in enumerate(named.items()):
        if shots is not None and len(paths) > shots:
            paths = sorted(random.Random(f"{seed}/{index}").sample(paths, shots))
        images += [(index, path) for path in paths]
    return images, list(named)


def _from_folder(folder: Path) -> dict[str, list[Path]]:
    named = {}
    for directory in sorted(p for p in folder.iterdir() if p.is_dir() and p.name[0] != "."):
        named[directory.name] = sorted(
            p for p in directory.rglob("*") if p.suffix.lower().lstrip(".") in IMAGE_TYPES
        )
        if not named[directory.name]:
            raise BadInput(str(directory), "a class without images", "Add some, or remove it.")
    if not named:
        raise NoInput(
            str(folder), "no class folders in it", "Lay images out as FOLDER/CLASS/*.jpg."
        )
    return named


def _from_csv(path: Path) -> dict[str, list[Path]]:
    named: dict[str, list[Path]] = {}
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as f:
        for number, row in enumerate(csv.DictReader(f), 2):
            if not row.get("path") or not row.get("label"):
                raise BadInput(f"{path} line {number}", "no path or no label",
                               "The first line must be `path,label`.")  # fmt: skip
            image = path.parent / row["path"]
            if not image.is_file():
                raise NoInput(f"{path} line {number}", f"{row['path']} does not exist",
                              "Paths count from the CSV's folder.")  # fmt: skip
            named.setdefault(row["label"], []).append(image)
    if not named:
        raise BadInput(str(path), "no rows", "Give columns path and label, a row an image.")
    return named


def listing_digest(images: list[Labelled], classes: list[str]) -> str:
    """A digest of the class names and of each image's class, name and size in bytes."""
    listed = [[label, path.name, path.stat().st_size] for label, path in images]
    return hashlib.blake2b(encode_json({"of": [classes, listed]}), digest_size=8).hexdigest()


def readable(
    images: list[tuple[int, Labelled]], quarantine: Quarantine
) -> list[tuple[int, Labelled]]:
    """The images that can be decoded; all of them where the first bad one is to be the error."""
    if not quarantine.skip:
        return images
    kept = []
    for number, (label, path) in images:
        for _ in quarantine.screen([_as_it_is(number, label, path)]):
            kept.append((number, (label, path)))
    return kept


def _as_it_is(number: int, label: int, path: Path) -> Sample:
    kind = path.suffix.lower().lstrip(".").replace("jpeg", "jpg")
    members = {kind: path.read_bytes(), "cls": str(label).encode()}
    return Sample(numbered_key(label, number), members, str(path))


def pack_images(
    images: Iterable[tuple[int, Labelled]], classes: list[str], size: int | None
) -> Iterator[Sample]:
    """A sample an image; with `size` re-encoded as a PNG of that side, else byte for byte."""
    for number, (label, path) in images:
        sample = _as_it_is(number, label, path)
        rgb = decode_rgb(sample, size)  # a broken image is found here, not hours later
        if size is not None:
            members = {"png": encode_image(rgb), "cls": sample.members["cls"]}
            sample = Sample(sample.key, members, str(path))
        facts = {"class_name": classes[label], "file": path.name, "source": "pack"}
        yield sample.with_member("json", encode_json(facts))
