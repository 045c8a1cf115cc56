"""Bad samples in whole shards: odd pictures of every kind, in the input of every command."""

from __future__ import annotations

import io
import json
import random
import re
import shutil
import struct
import zlib
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from utilgen_cli.runtime.files import encode_json
from utilgen_cli.shards.operands import open_source
from utilgen_cli.shards.sample import Sample
from utilgen_cli.shards.writer import write_tar

from ..conftest import make_sample
from .registry import Options, campaign
from .runs import DATA, Runs, _fill
from .shell import Done, Kept, table, utilgen


def png(width: int, height: int, pixels: bytes, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG made by hand: also of sizes that no library would write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(pixels, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def _saved(image: Image.Image, format: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)  # type: ignore[arg-type]
    return out.getvalue()


@cache
def odd_images() -> dict[str, tuple[str, bytes, str | None]]:
    """name: (member, bytes, the reason for which it is left out, or None where it is converted)."""
    rgb = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    image = Image.fromarray(rgb)
    other = Image.fromarray(255 - rgb)
    whole, jpg = _saved(image, "PNG"), _saved(image, "JPEG")
    grey16 = Image.fromarray(rgb[..., 0].astype(np.uint16) * 257)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 4
    return {
        "noise": ("png", random.Random(0).randbytes(900), "corrupt image"),
        "flipped png": ("png", bytes(flipped), "corrupt image"),
        "cut png": ("png", whole[: len(whole) // 2], "truncated image"),
        "cut jpg": ("jpg", jpg[: len(jpg) * 2 // 3], "truncated image"),
        "empty": ("png", b"", "empty image"),
        "0 x 0": ("png", png(0, 0, b""), "corrupt image"),
        "9000 x 9000": ("png", png(9000, 9000, bytes(9000 * 9001), colour=0), "too many pixels"),
        "30000 x 30000": ("png", png(30000, 30000, b"\0"), "too many pixels"),
        "animated png": ("png", _saved(image, "PNG", save_all=True, append_images=[other]), "animation"),
        "animated webp": ("webp", _saved(image, "WEBP", save_all=True, append_images=[other]), "animation"),
        "gif called jpg": ("jpg", _saved(image, "GIF"), "corrupt image"),
        "cmyk": ("jpg", _saved(image.convert("CMYK"), "JPEG"), None),
        "16-bit grey": ("png", _saved(grey16, "PNG"), None),
        "16-bit colour": ("png", png(24, 24, (b"\0" + bytes(24 * 6)) * 24, depth=16), None),
        "palette": ("png", _saved(image.convert("P"), "PNG"), None),
        "transparent": ("png", _saved(image.convert("RGBA"), "PNG"), None),
        "grey": ("png", _saved(image.convert("L"), "PNG"), None),
        "line": ("png", png(60000, 1, bytes(1 + 3 * 60000)), None),
    }  # fmt: skip


def odd_samples(classes: list[str]) -> list[tuple[Sample, str | None]]:
    """Each odd image as a scored sample, and samples whose other members are bad."""
    found = []
    for number, (kind, data, reason) in enumerate(odd_images().values()):
        found.append((_sample(900 + number, 0, classes, {kind: data}), reason))
    good = make_sample(5, size=24).members["png"]
    label = _sample(950, 0, classes, {"png": good}).with_member("cls", b"dog")
    facts = _sample(951, 0, classes, {"png": good}).with_member("json", b"{not json")
    return [*found, (label, "unreadable"), (facts, "unreadable")]


def _sample(number: int, label: int, classes: list[str], image: dict[str, bytes]) -> Sample:
    facts = {
        "class_name": classes[label],
        "prompt": f"a photo of a {classes[label]}",
        "model": "tiny",
    }
    rest = {"cls": str(label).encode(), "json": encode_json(facts)}
    utility = {"utility.json": encode_json({"utility": (number % 97) / 97, "loss": 0.1})}
    return Sample(f"{label:04d}-{number:06d}", {**image, **rest, **utility})


def odd_set(path: Path) -> tuple[Path, int]:
    """(a shard of good and odd scored samples without sums, how many of them are to be left out)."""
    good = list(open_source([str(DATA / "real")]).samples())
    classes = [name for _, name in sorted({(s.label, s.facts["class_name"]) for s in good})]
    scored = [s.with_member("utility.json", encode_json({"utility": i / len(good), "loss": 0.5}))
              for i, s in enumerate(good)]  # fmt: skip
    odd = odd_samples(classes)
    mixed = [*scored[:40], *(s for s, _ in odd), *scored[40:]]
    return _write(path, mixed), sum(reason is not None for _, reason in odd)


def odd_pairs(path: Path) -> tuple[Path, int]:
    """The same with preference pairs: the loser is odd."""
    good = list(open_source([str(DATA / "real")]).samples())
    images = [("png", s.image[1], None) for s in good[:24]] + list(odd_images().values())
    pairs = [
        Sample(f"pair-{i}", {"win.png": good[i].image[1], f"lose.{kind}": data,
                             "cls": b"0", "json": encode_json({"prompt": "a photo of a bag"})})
        for i, (kind, data, _) in enumerate(images)
    ]  # fmt: skip
    return _write(path, pairs), sum(reason is not None for _, _, reason in images)


def _write(path: Path, samples: list[Sample]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    with (path / "00000.tar").open("wb") as f:
        write_tar(samples, f)
    return path


def odd_folder(path: Path) -> tuple[Path, int]:
    """A folder of pictures for `pack`."""
    found = odd_images()
    for number, (kind, data, _) in enumerate(found.values()):
        (path / "cat").mkdir(parents=True, exist_ok=True)
        (path / "cat" / f"{number}.{kind}").write_bytes(data)
    return path, sum(reason is not None for _, _, reason in found.values())


READERS = {
    "pack": "pack {folder} -o {out}",
    "check": "check {odd}",
    "value score": "value score {odd} --value {value} --force -o {out}",
    "pairs": "pairs {odd} -o {out}",
    "dpo": "dpo {pairs} -m tiny --smoke -o {out}",
    "value train": "value train --real {odd} --smoke -o {out}",
    "eval": "eval --real {odd} --synthetic base={odd} --test {val} --seeds 1 --smoke -o {out}",
    "invert": "invert {odd} -m tiny --smoke -o {out}",
    "lora": "lora {odd} -m tiny --smoke -o {out}",
    "ilpo": "ilpo -m tiny --value {value} --real {odd} --clip-image-weight 1 --smoke -o {out}",
    "view": "view {odd} -o {out}/page.html",
}
MARKERS = ("*.tar", "*.json", "*.safetensors", "*.html")
NO_JSON = ("view",)


def try_reader(
    command: str, work: Path, places: dict[str, Path], policy: str
) -> tuple[Done, dict, Path]:
    """(how it ended, what its JSON says, its output)."""
    out = work / "out" / f"{command}-{policy}".replace(" ", "-")
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(exist_ok=True)
    if command == "view":
        out.mkdir()
    words = [_fill(word, places | {"out": out}) for word in READERS[command].split()]
    more = [] if command in NO_JSON else ["--json"]
    done = utilgen([*words, *more, "-q", "--on-error", policy])
    last = (done.out or b"{}").decode() if done.out else done.said.strip().splitlines()[-1:]
    try:
        said = json.loads(last if isinstance(last, str) else "".join(last))
    except ValueError:
        said = {}
    return done, said if isinstance(said, dict) else {}, out


def prepare(work: Path) -> tuple[dict[str, Path], dict[str, int]]:
    """Inputs by name, and how many bad samples each has."""
    runs = Runs(work / "runs")
    runs.ready("value train")
    made = {"odd": odd_set(work / "odd"), "pairs": odd_pairs(work / "pairs"),
            "folder": odd_folder(work / "folder")}  # fmt: skip
    places = {name: path for name, (path, _) in made.items()}
    places |= {"value": runs.whole("value train"), "val": DATA / "val"}
    return places, {name: bad for name, (_, bad) in made.items()}


def read_odd(
    command: str, work: Path, places: dict[str, Path], bad: dict[str, int]
) -> list[object]:
    """The row of a command: what it does with stop, and with skip."""
    expected = next(bad[name] for name in bad if f"{{{name}}}" in READERS[command])
    stop, _, left = try_reader(command, work, places, "stop")
    skip, said, _ = try_reader(command, work, places, "skip")
    results = [p.name for m in MARKERS for p in left.glob(m) if p.name != "settings.json"]
    told = re.search(r"left out (\d+) bad", skip.said)
    counted = said.get("quarantined", {}).get("samples", "")
    return [stop.code, ", ".join(results) or "none", skip.code, expected, counted,
            told[1] if told else "", stop.line[:160]]  # fmt: skip


@campaign("quarantine", runs=1)
def quarantine(options: Options) -> str:
    """Bad samples in every command that reads images."""
    places, bad = prepare(options.work)
    kept = Kept(options.work / "quarantine.json")
    for command in READERS:
        if not options.only or command in options.only:
            kept.add(command, read_odd(command, options.work, places, bad))
    rows = [[name, *kept.rows[name][:-1]] for name in READERS if name in kept.rows]
    head = ("command", "exit with stop", "results left by stop", "exit with skip",
            "bad samples in the input", "counted in --json", "told on stderr")  # fmt: skip
    kinds = [f"{name} ({reason or 'converted'})" for name, (_, _, reason) in odd_images().items()]
    return f"Each command's input has these pictures: {', '.join(kinds)}.\n\n{table(head, rows)}"
