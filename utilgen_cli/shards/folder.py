"""Labelled images in folders or named by a CSV, as samples."""

from __future__ import annotations

import csv
import errno
import hashlib
import os
import random
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from ..runtime.errors import BadInput, NoInput
from ..runtime.files import encode_json
from .images import decode_rgb, encode_image
from .quarantine import Quarantine
from .sample import BadSample, Sample, numbered_key

Labelled = tuple[int, Path]  # (class index, image file)
Numbered = tuple[int, Labelled]
Packed = frozenset[tuple[str, str]]  # (class name, `path`) of images that lie in shards
KINDS = {".png": "png", ".jpg": "jpg", ".jpeg": "jpg", ".jpe": "jpg", ".jfif": "jpg",
         ".webp": "webp"}  # fmt: skip
LAYOUT = "Lay images out as FOLDER/CLASS/*.jpg."
COLUMNS = "Give columns path and label, a row an image."


@dataclass
class ImageList:
    """What is to be packed, and what was seen beside it. `written`: how a CSV writes its paths.

    `spare` has each class's images that were not drawn, in the order in which they replace bad
    shots; `ignored` counts by suffix the files that are no image of a class.
    """

    source: Path
    classes: list[str]
    images: list[Labelled] = field(default_factory=list)
    spare: dict[int, list[Path]] = field(default_factory=dict)
    written: dict[Path, str] = field(default_factory=dict)
    ignored: Counter[str] = field(default_factory=Counter)

    def line(self) -> str | None:
        """For people: how many files were left out, and which."""
        loose = sum(n for suffix, n in self.ignored.items() if suffix in KINDS)
        other = sorted(suffix or "no suffix" for suffix in self.ignored if suffix not in KINDS)
        parts = [f"{loose} images outside of the class folders"] if loose else []
        if other:
            count = self.ignored.total() - loose
            parts.insert(0, f"{count} files that are no PNG, JPEG or WebP ({', '.join(other)})")
        return f"left out {' and '.join(parts)}" if parts else None

    def summary(self) -> dict[str, dict[str, int]]:
        """For --json: {} where all was taken."""
        return {"ignored": dict(sorted(self.ignored.items()))} if self.ignored else {}


def packed_before(samples: Iterable[Sample]) -> Packed:
    """What the samples were packed from. BadSample: one was not made by `pack`."""
    found = set()
    for sample in samples:
        name, path = (sample.facts.get(fact) for fact in ("class_name", "path"))
        if not isinstance(name, str) or not isinstance(path, str):
            raise sample.bad("its json does not say which path it was packed from")
        found.add((name, path))
    return frozenset(found)


def list_images(
    source: Path, shots: int | None = None, seed: int = 0, beside: Iterable[Path] = (),
    without: Sequence[Packed] = (),
) -> ImageList:  # fmt: skip
    """The images of each class, the classes in the order of their index.

    `source` is FOLDER with a folder a class (sorted by name), or a CSV with columns path and label
    (classes in order of first appearance; paths relative to the CSV). Nothing in a directory
    of `beside` is looked at, and images of `without` are passed over. NoInput, BadInput.
    """
    ignored: Counter[str] = Counter()
    written: dict[Path, str] = {}
    if _is(source.is_dir):
        named = _from_folder(source, {path.resolve() for path in beside}, ignored)
    elif _is(source.is_file):
        named = _from_csv(source, written)
    else:
        raise NoInput(str(source), "no such file or directory", "Name a folder or a CSV file.")
    listed = ImageList(source, list(named), ignored=ignored, written=written)
    if without:
        named = _others(listed, named, without)
    for index, paths in enumerate(named.values()):
        if shots is not None and len(paths) > shots:
            paths, listed.spare[index] = _draw(paths, shots, f"{seed}/{index}")
        listed.images += [(index, path) for path in paths]
    return listed


def _others(
    listed: ImageList, named: dict[str, list[Path]], without: Sequence[Packed]
) -> dict[str, list[Path]]:
    """The images that are in none of `without`. BadInput: one was packed from elsewhere, or a class
    has none left."""
    called = {(name, path_in(listed, path)) for name, paths in named.items() for path in paths}
    for packed in without:
        if unknown := sorted(packed - called):
            name, path = unknown[0]
            why = f"{path!r} of class {name} is not in {listed.source}"
            raise BadInput("--without", why, "Name shards packed from there, as it is now.")
    left_out = frozenset().union(*without)
    others = {
        name: [path for path in paths if (name, path_in(listed, path)) not in left_out]
        for name, paths in named.items()
    }
    for name, paths in others.items():
        if not paths:
            raise BadInput(f"class {name}", "has no images but those of --without",
                           "Add some, or pack fewer before.")  # fmt: skip
    return others


def path_in(listed: ImageList, path: Path) -> str:
    """What tells an image from others of its class: its path in the folder of the class, or as the
    CSV has it."""
    text = listed.written.get(path) or "/".join(path.relative_to(listed.source).parts[1:])
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _draw(paths: list[Path], shots: int, seed: str) -> tuple[list[Path], list[Path]]:
    """(the shots, sorted; the others, shuffled)."""
    rng = random.Random(seed)
    chosen = rng.sample(range(len(paths)), shots)
    others = sorted(set(range(len(paths))) - set(chosen))
    rng.shuffle(others)
    return sorted(paths[i] for i in chosen), [paths[i] for i in others]


def _is(question: Callable[[], bool]) -> bool:
    """Ask a path what it is. A name that is too long is nothing; what may not be looked at is said
    where it is read."""
    try:
        return question()
    except OSError as error:
        return error.errno != errno.ENAMETOOLONG


def _from_folder(folder: Path, beside: set[Path], ignored: Counter[str]) -> dict[str, list[Path]]:
    """The images of each class folder; the other files go into `ignored`."""
    named = {}
    entries = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    ignored.update(_suffix(p) for p in entries if not _is(p.is_dir))
    for directory in (p for p in entries if _is(p.is_dir)):
        files = sorted(_files(directory, beside))
        images = [p for p in files if _suffix(p) in KINDS]
        ignored.update(_suffix(p) for p in files if _suffix(p) not in KINDS)
        if images:
            named[_class_name(directory)] = images
        elif not any(path.is_relative_to(directory.resolve()) for path in beside):
            raise BadInput(str(directory), "a class without images",
                           "Add some (PNG, JPEG or WebP), or remove it.")  # fmt: skip
    if not named:
        raise NoInput(str(folder), "no class folders in it", LAYOUT)
    return named


def _files(directory: Path, beside: set[Path]) -> Iterator[Path]:
    """All files below that neither are hidden nor lie in a hidden folder or in `beside`; a folder
    that links lead to again is read once."""
    seen = {*beside}
    for place, folders, names in os.walk(directory, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if (here := Path(place).resolve()) in seen:
            folders.clear()
            continue
        seen.add(here)
        yield from (Path(place, name) for name in names if not name.startswith("."))


def _class_name(directory: Path) -> str:
    if _text(directory.name) != directory.name:
        raise BadInput(str(directory), "its name is not UTF-8", "Rename it.")
    return directory.name


def _suffix(path: Path) -> str:
    return _text(path.suffix.lower())


def _text(name: str) -> str:
    """A name of the file system with what is not UTF-8 in it replaced."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _from_csv(path: Path, written: dict[Path, str]) -> dict[str, list[Path]]:
    named: dict[str, list[Path]] = {}
    for number, row in enumerate(_rows(path), 2):
        if not row.get("path") or not row.get("label"):
            raise BadInput(f"{path} line {number}", "no path or no label",
                           "The first line must be `path,label`.")  # fmt: skip
        image = path.parent / row["path"]
        if not _is(image.is_file):
            raise NoInput(f"{path} line {number}", f"{row['path']} does not exist",
                          "Paths count from the CSV's folder.")  # fmt: skip
        named.setdefault(row["label"], []).append(image)
        written[image] = row["path"]
    if not named:
        raise BadInput(str(path), "no rows", COLUMNS)
    return named


def _rows(path: Path) -> Iterator[dict[str, str]]:
    with path.open(newline="", encoding="utf-8-sig") as f:
        reader = csv.DictReader(f)
        try:
            yield from reader
        except UnicodeDecodeError:
            raise BadInput(str(path), "is not UTF-8", "Save it as UTF-8.") from None
        except csv.Error as error:
            raise BadInput(f"{path} line {reader.line_num}", str(error), COLUMNS) from None


def listing_digest(listed: ImageList, images: Iterable[Numbered]) -> str:
    """A digest of the class names and of each image's class, name and size in bytes: of those
    that are listed, and of those of `images` that came in their place."""
    drawn = set(listed.images)
    seen = [*listed.images, *(image for _, image in images if image not in drawn)]
    rows = [[label, path.name, _size(path)] for label, path in seen]
    return hashlib.blake2b(encode_json({"of": [listed.classes, rows]}), digest_size=8).hexdigest()


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:  # said where it is read
        return None


def readable(listed: ImageList, quarantine: Quarantine) -> list[Numbered]:
    """The images that can be decoded, numbered; all of them where the first bad one is to be the
    error. A bad shot's number goes to another image of its class while there are any.

    BadInput: a class has none left.
    """
    if not quarantine.skip:
        return list(enumerate(listed.images))
    kept = []
    spare = {label: iter(paths) for label, paths in listed.spare.items()}
    for number, (label, path) in enumerate(listed.images):
        for candidate in chain([path], spare.get(label, ())):
            if _passes(number, (label, candidate), quarantine):
                kept.append((number, (label, candidate)))
                break
    _refuse_empty(listed.classes, {label for _, (label, _) in kept})
    return kept


def _passes(number: int, image: Labelled, quarantine: Quarantine) -> bool:
    try:
        return bool(list(quarantine.screen([_as_it_is(number, *image)])))
    except BadSample as error:  # its file cannot be read
        quarantine.reject(error)
        return False


def _refuse_empty(classes: list[str], labels: set[int]) -> None:
    for label, name in enumerate(classes):
        if label not in labels:
            raise BadInput(f"class {name}", "none of its images can be used",
                           "Add some that can, or remove it.")  # fmt: skip


def _as_it_is(number: int, label: int, path: Path) -> Sample:
    sample = Sample(numbered_key(label, number), {}, _text(str(path)))
    kind = KINDS.get(path.suffix.lower(), path.suffix.lower().lstrip("."))
    try:
        sample.members = {kind: _read(path), "cls": str(label).encode()}
    except OSError as error:
        why = f"its file cannot be read ({error.strerror})"
        raise sample.bad(why, "unreadable file") from None
    return sample


def _read(path: Path) -> bytes:
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe's writer would be waited for
        raise OSError(errno.EINVAL, "it is no regular file")
    return path.read_bytes()


def pack_images(
    images: Iterable[Numbered], listed: ImageList, size: int | None
) -> Iterator[Sample]:
    """A sample an image; with `size` re-encoded as a PNG of that side, else byte for byte."""
    for number, (label, path) in images:
        sample = _as_it_is(number, label, path)
        rgb = decode_rgb(sample, size)  # a broken image is found here, not hours later
        if size is not None:
            members = {"png": encode_image(rgb), "cls": sample.members["cls"]}
            sample = Sample(sample.key, members, sample.origin)
        facts = {
            "class_name": listed.classes[label], "file": _text(path.name),
            "path": path_in(listed, path), "source": "pack",
        }  # fmt: skip
        yield sample.with_member("json", encode_json(facts))
