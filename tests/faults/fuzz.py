"""Fuzz: 10,000 broken tars, JSONs, safetensors and pictures; only our own errors may come out.

Each subject is a whole file that a user could name, and the function that reads it. It is mutated
(bytes flipped, cut, repeated, moved, replaced by extreme numbers) and read in this process.
"""

from __future__ import annotations

import io
import json
import random
import resource
import shutil
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from utilgen_cli.runtime.errors import UtilgenError

from .registry import Options, campaign
from .runs import Runs
from .shell import Kept, table

TINY = Path(__file__).parents[2] / "utilgen_cli" / "tiny"
Reader = Callable[[Path], object]


@dataclass
class Subject:
    """A file inside a directory that `read` opens."""

    directory: Path
    file: str
    read: Reader

    @property
    def path(self) -> Path:
        return self.directory / self.file


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to four random changes."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(found) + 1)
        kind = rng.randrange(8)
        if kind == 0:
            del found[at:]
        elif kind == 1:
            del found[at : at + rng.randint(1, 600)]
        elif kind == 2:
            found[at:at] = found[max(0, at - rng.randint(1, 600)) : at]
        elif kind == 3:
            found[at:at] = rng.choice(EXTREMES)
        elif kind == 4:
            found[at : at + 8] = rng.randbytes(8)
        elif found:
            found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
        if not found:
            break
    return bytes(found)


EXTREMES = (b"NaN", b"-1", b"1e999", b"null", b"[" * 3000, b"{}", b'"\\ud800"', b"99999999999999999999",
            b"\xff" * 8, b"\0" * 512, b"../../x", b"\x1b[2J", b"true", b"1" * 5000)  # fmt: skip


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """Replace one value somewhere in the JSON by another kind of value, or drop it."""
    try:
        value = json.loads(data)
    except ValueError:
        return mutate(data, rng)
    node, key = value, None
    while isinstance(node, dict | list) and len(node) and rng.random() < 0.9:
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        parent, node = node, node[key]
    if key is None:
        return mutate(data, rng)
    if rng.random() < 0.2:
        del parent[key]
    else:
        parent[key] = rng.choice(
            [None, -1, 10**30, 1e308, "", "x" * 300, [], {}, [[]], True, "../../x", 0]
        )
    return json.dumps(value).encode()


def read_shards(path: Path) -> None:
    """What `pairs` and `check` do with them."""
    from utilgen_cli.report.view import view_page
    from utilgen_cli.shards.operands import open_source
    from utilgen_cli.shards.quarantine import check_any
    from utilgen_cli.valuation.pairing import PairingConfig, pair_samples

    for sample in open_source([str(path)]).samples():
        check_any(sample)
    list(pair_samples(open_source([str(path)]).samples(), PairingConfig()))
    view_page(open_source([str(path)]).samples(), "title", 2)


def decode(path: Path) -> None:
    from utilgen_cli.shards.images import decode_rgb
    from utilgen_cli.shards.sample import Sample

    decode_rgb(Sample("a", {path.suffix[1:]: path.read_bytes()}), 16)


def read_stream(path: Path) -> None:
    from utilgen_cli.shards.reader import read_tar

    for sample in read_tar(io.BytesIO(path.read_bytes()), "stream"):
        _ = sample.facts, sample.label


def read_value(path: Path) -> None:
    from utilgen_cli.valuation.value_model import load_value

    load_value(path.parent if path.name == "value.json" else path.parents[0], "cpu", force=True)


def subjects(runs: Runs, work: Path) -> dict[str, Subject]:
    """Everything that commands read."""
    from utilgen_cli.classification.models import load_classifier
    from utilgen_cli.diffusion.bundle import read_defaults
    from utilgen_cli.diffusion.tokens import load_tokens
    from utilgen_cli.runtime.checkpoint import load_checkpoint, save_checkpoint

    small_shard(runs, work)
    for name, place in (("value", runs.whole("value train")), ("tokens", runs.whole("invert"))):
        shutil.copytree(place, work / name, dirs_exist_ok=True)
    (work / "bundle").mkdir(exist_ok=True)
    shutil.copy(TINY / "utilgen.json", work / "bundle")
    import torch

    save_checkpoint(work / "checkpoint.safetensors", {"x": torch.ones(9)}, {"step": 1})
    classifier = next((work / "value").rglob("classifier-0.safetensors"))
    tokens = next((work / "tokens").rglob("learned_embeds.safetensors"))
    value = work / "value"
    return {
        "shard": Subject(work, "stream.tar", read_stream),
        "shard with sums": Subject(work / "shards", "00000.tar", lambda p: read_shards(p.parent)),
        "sums": Subject(work / "shards", "00000_stats.json", lambda p: read_shards(p.parent)),
        "scored shard": Subject(work, "scored.tar", read_shards),
        "png": Subject(work, "a.png", decode),
        "jpg": Subject(work, "a.jpg", decode),
        "webp": Subject(work, "a.webp", decode),
        "value.json": Subject(value, "value.json", read_value),
        "reference": Subject(value, "reference.safetensors", read_value),
        "classifier": Subject(classifier.parent, classifier.name, load_classifier),
        "index.json": Subject(work / "tokens", "index.json", lambda p: load_tokens(p.parent)),
        "tokens": Subject(tokens.parent, tokens.name, lambda p: load_tokens(work / "tokens")),
        "utilgen.json": Subject(work / "bundle", "utilgen.json", lambda p: read_defaults(p.parent)),
        "checkpoint": Subject(work, "checkpoint.safetensors", load_checkpoint),
    }


def small_shard(runs: Runs, work: Path) -> None:
    """A few scored samples as a stream, as a shard with sums, and three pictures."""
    from PIL import Image

    from utilgen_cli.shards.operands import open_source
    from utilgen_cli.shards.writer import write_shard, write_tar

    samples = list(open_source([str(runs.whole("value score"))]).samples())[:8]
    (work / "shards").mkdir(exist_ok=True)
    write_shard(work / "shards" / "00000.tar", samples)
    for name in ("stream.tar", "scored.tar"):
        with (work / name).open("wb") as f:
            write_tar(samples, f)
    image = Image.open(io.BytesIO(samples[0].image[1])).resize((48, 48))
    for kind in ("png", "jpg", "webp"):
        image.convert("RGB").save(work / f"a.{kind}")


def try_one(subject: Subject, data: bytes) -> str:
    """`read`, `refused`, or the traceback of an error that is not ours."""
    subject.path.write_bytes(data)
    try:
        subject.read(subject.path)
    except UtilgenError as error:
        return "refused" if str(error).isprintable() else f"not printable: {error!r}"
    except Exception as error:
        frames = [
            f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)
        ]
        return f"{type(error).__name__}: {str(error)[:80]} ({' '.join(frames[-4:])})"
    return "read"


def fuzz_subject(subject: Subject, runs: int, seed: str) -> tuple[Counter[str], float, int]:
    """(outcomes, longest seconds, growth of this process in MB)."""
    whole = subject.path.read_bytes()
    outcomes: Counter[str] = Counter()
    longest, memory = 0.0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        assert try_one(subject, whole) == "read"
        for number in range(runs):
            rng = random.Random(f"{seed}/{number}")
            is_json = subject.file.endswith(".json") and rng.random() < 0.7
            data = mutate_json(whole, rng) if is_json else mutate(whole, rng)
            start = time.monotonic()
            outcomes[try_one(subject, data)] += 1
            longest = max(longest, time.monotonic() - start)
    finally:
        subject.path.write_bytes(whole)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    return outcomes, longest, grown // 1024


@campaign("fuzz", runs=10_000)
def fuzz(options: Options) -> str:
    """Evenly over all subjects."""
    runs, kept = Runs((options.work / "runs").resolve()), Kept(options.work / "fuzz.json")
    for need in ("value score", "invert"):
        runs.ready(need)
    found = subjects(runs, options.work)
    each = -(-options.runs // len(found))
    for name, subject in found.items():
        if name not in kept.rows and (not options.only or name in options.only):
            outcomes, longest, grown = fuzz_subject(subject, each, f"{options.seed}/{name}")
            kept.add(name, [dict(outcomes), round(longest, 2), grown])
    rows, strange = [], []
    for name, (outcomes, longest, grown) in kept.rows.items():
        others = {k: n for k, n in outcomes.items() if k not in ("read", "refused")}
        rows.append([name, sum(outcomes.values()), outcomes.get("refused", 0), outcomes.get("read", 0),
                     sum(others.values()), longest, grown])  # fmt: skip
        strange += [f"{name}: {n} x {k}" for k, n in others.items()]
    rows.append(
        ["all", *(sum(r[i] for r in rows) for i in (1, 2, 3, 4)), max(r[5] for r in rows), ""]
    )
    head = ("what was broken", "files", "refused with our error", "read all the same", "other errors",
            "longest, s", "memory grew, MB")  # fmt: skip
    return "\n\n".join([table(head, rows), *strange])
