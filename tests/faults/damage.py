"""Damaged input: shards that were cut or flipped.

`damage` hurts whole shards in many places and counts how many of them a reader of the directory
and a reader of the bare stream find; `repair` hurts those of a finished `generate`.
"""

from __future__ import annotations

import io
import json
import random
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from utilgen_cli.runtime.errors import BadInput
from utilgen_cli.shards.operands import open_source
from utilgen_cli.shards.quarantine import check_any
from utilgen_cli.shards.reader import read_tar
from utilgen_cli.shards.writer import write_shard

from ..conftest import make_sample
from .registry import Options, campaign
from .runs import Runs
from .shell import Kept, table, utilgen

CUTS = ("cut anywhere", "cut between members", "cut between samples", "cut in the end mark")
FLIPS = ("flip anywhere", "flip in a header", "flip in a picture", "flip in cls or json",
         "flip in padding", "flip in the end")  # fmt: skip


def write_original(directory: Path, samples: int = 12) -> Path:
    """A whole shard with its statistics."""
    directory.mkdir(parents=True, exist_ok=True)
    shard = directory / "00000.tar"
    made = [make_sample(i, i % 3, size=24, prompt=f"a photo of {i}") for i in range(samples)]
    write_shard(shard, made)
    return shard


def places(shard: Path) -> dict[str, list[tuple[int, int]]]:
    """Byte ranges of a tar by what stands there."""
    found: dict[str, list[tuple[int, int]]] = {name: [] for name in FLIPS}
    with tarfile.open(shard) as tar:
        for member in tar:
            end = member.offset_data + member.size
            picture = member.name.endswith(".png")
            body = "flip in a picture" if picture else "flip in cls or json"
            found["flip in a header"].append((member.offset, member.offset_data))
            found[body].append((member.offset_data, end))
            if end % 512:
                found["flip in padding"].append((end, end + -end % 512))
    last = max(end for _, end in found["flip in padding"])
    found["flip in the end"].append((last, shard.stat().st_size))
    found["flip anywhere"].append((0, shard.stat().st_size))
    return found


def damaged(shard: Path, kind: str, rng: random.Random) -> bytes:
    """The bytes of the shard after one blow."""
    data = bytearray(shard.read_bytes())
    if kind in FLIPS:
        start, end = rng.choice([r for r in places(shard)[kind] if r[1] > r[0]])
        data[rng.randrange(start, end)] ^= 1 << rng.randrange(8)
        return bytes(data)
    headers = [start for start, _ in places(shard)["flip in a header"]]
    [(last, size)] = places(shard)["flip in the end"]
    cuts = {
        "cut anywhere": range(size),
        "cut between members": headers,
        "cut between samples": headers[::3],
        "cut in the end mark": range(last, size),
    }
    return bytes(data[: rng.choice(cuts[kind])])


def read_with_sums(shard: Path) -> BadInput | None:
    """What a reader of the directory says."""
    try:
        for _ in open_source([str(shard)]).samples():
            pass
    except BadInput as error:
        return error
    return None


def read_as_stream(data: bytes) -> BadInput | None:
    """What a reader of a pipe says, which also decodes what it reads."""
    try:
        for sample in read_tar(io.BytesIO(data), "standard input"):
            check_any(sample)
    except BadInput as error:
        return error
    return None


def says_where(error: BadInput, file: str, keys: set[str]) -> bool:
    """Its line names the file, the byte, and a key (or that none was read yet)."""
    line = str(error)
    keyed = any(key in line for key in keys) or "before the first member" in line
    return file in line and "at byte" in line and keyed


def blows(runs: int, seed: int) -> Iterator[tuple[str, random.Random]]:
    """`runs` kinds of damage, evenly, each with its own randomness."""
    kinds = [*CUTS, *FLIPS]
    for i in range(runs):
        yield kinds[i % len(kinds)], random.Random(f"{seed}/{i}")


def hurt_all(work: Path, runs: int, seed: int) -> dict[str, Counter[str]]:
    """Counts a kind; the hurt shards stay in `work`/hurt, each with its statistics."""
    original = write_original(work / "whole")
    keys = {sample.key for sample in open_source([str(original)]).samples()}
    stats = (work / "whole" / "00000_stats.json").read_bytes()
    (work / "hurt").mkdir(exist_ok=True)
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in (*CUTS, *FLIPS)}
    for number, (kind, rng) in enumerate(blows(runs, seed)):
        shard = work / "hurt" / f"{number:05d}.tar"
        shard.write_bytes(damaged(original, kind, rng))
        shard.with_name(f"{number:05d}_stats.json").write_bytes(stats)
        error = read_with_sums(shard)
        counts[kind]["shards"] += 1
        counts[kind]["found"] += error is not None
        counts[kind]["code 65"] += error is not None and error.exit_code == 65
        counts[kind]["located"] += error is not None and says_where(error, shard.name, keys)
        counts[kind]["in a pipe"] += read_as_stream(shard.read_bytes()) is not None
    return counts


@campaign("damage", runs=400)
def damage(options: Options) -> str:
    """Cut and flipped shards."""
    counts = hurt_all(options.work, options.runs, options.seed)
    names = ("shards", "found", "located", "code 65", "in a pipe")
    rows = [[kind, *(c[n] for n in names)] for kind, c in counts.items()]
    rows.append(["all", *(sum(c[n] for c in counts.values()) for n in names)])
    done = utilgen(["check", options.work / "hurt", "--json", "-q"])
    broken = len(json.loads(done.out)["broken"])
    clean = utilgen(["check", options.work / "whole", "-q"])
    head = ("blow", "shards", "found beside its sums", "file, byte and key named", "exit code 65",
            "found in a pipe")  # fmt: skip
    return "\n\n".join([
        f"One blow a shard (12 samples, {len(counts)} kinds, seed {options.seed}); `in a pipe`: no "
        "sums are there, headers, end mark, PNG sums and JSON are all there is to see.",
        table(head, rows),
        f"`utilgen check` of the directory with all of them: {broken} of {options.runs} broken, "
        f"exit {done.code}; of the whole one: exit {clean.code}.",
    ])  # fmt: skip


def hurt_and_rerun(runs: Runs, work: Path, rng: random.Random) -> list[object]:
    """Found by check; the rerun ends well; it remade the hurt shards alone; all is as it was."""
    out = work / "hurt"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(runs.whole("generate"), out)
    shards = sorted(out.glob("*.tar"))
    chosen = sorted(rng.sample(shards, rng.randint(1, len(shards) - 1)))
    for shard in chosen:
        shard.write_bytes(damaged(shard, rng.choice([*CUTS, *FLIPS]), rng))
    before = {p: p.stat().st_ino for p in shards}
    found = utilgen(["check", out, "-q"]).code
    again = utilgen([*runs.words("generate", out), "-q"])
    remade = [p for p in shards if p.stat().st_ino != before[p]]
    return [found == 65, again.code == 0, chosen == remade, not runs.same("generate", out)]


@campaign("repair", runs=10)
def repair(options: Options) -> str:
    """Some shards of a finished `generate` are hurt; the rerun remakes these and no others."""
    runs, kept = Runs(options.work / "runs"), Kept(options.work / "repair.json")
    runs.ready("generate")
    for number in range(options.runs):
        if str(number) not in kept.rows:
            rng = random.Random(f"{options.seed}/{number}")
            kept.add(str(number), hurt_and_rerun(runs, options.work, rng))
    rows = list(kept.rows.values())
    counts = [f"{sum(map(bool, column))} of {len(rows)}" for column in zip(*rows, strict=True)]
    head = ("found by check", "rerun exits 0", "remade exactly the hurt shards", "bytes as before")
    return f"`generate`, 60 images in 3 shards, a random share hurt.\n\n{table(head, [counts])}"
