"""Pipes: every pair of commands that can be joined, with a first stage that fails in every way.

The first stage's real output is cut where it fails and followed by a failing exit. Nothing that the
second stage leaves may look whole: no shard, model or page under its name, and no stream with an
end mark.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from utilgen_cli.runtime.errors import BadInput
from utilgen_cli.shards.operands import read_path

from .registry import Options, campaign
from .runs import DATA, QUIET, Runs, _fill
from .shell import Kept, table, utilgen

FIRST = {
    "pack": "pack {images}",
    "generate": "generate -m tiny --per-class 3 --steps 3",
    "ilpo": "ilpo -m tiny --value {value} --per-class 2 --smoke",
    "value score": "value score {generate} --value {value} --force",
    "pairs": "pairs {scored}",
}
SECOND = {
    "invert": ("invert -m tiny --smoke -o {out}", ("pack",)),
    "lora": ("lora -m tiny --smoke -o {out}", ("pack",)),
    "value score -o": ("value score --value {value} --force -o {out}", ("pack", "generate", "ilpo", "value score")),
    "value score": ("value score --value {value} --force", ("pack", "generate", "ilpo")),
    "pairs -o": ("pairs -o {out}", ("value score",)),
    "pairs": ("pairs", ("value score",)),
    "dpo": ("dpo -m tiny --smoke -o {out}", ("pairs",)),
    "view": ("view -o {out}/page.html", ("pack", "generate", "ilpo", "value score", "pairs")),
}  # fmt: skip
FAILURES = ("before any output", "inside a member", "between members", "between samples",
            "without its end mark")  # fmt: skip
RESULTS = ("*.tar", "*.json", "*.safetensors", "*/*.safetensors", "*.html")


def joints() -> list[tuple[str, str]]:
    """(first, second) of every pair."""
    return [(first, second) for second, (_, firsts) in SECOND.items() for first in firsts]


def cut(tar: Path, failure: str, rng: random.Random) -> bytes:
    """What comes out of a first stage that fails there."""
    data = tar.read_bytes()
    with tarfile.open(tar) as archive:
        members = archive.getmembers()
    last = members[-1]
    end = last.offset_data + -(-last.size // 512) * 512
    names = [m.name.partition(".")[0] for m in members]
    starts = [m.offset for m, a, b in zip(members[1:], names, names[1:], strict=False) if a != b]
    places = {
        "before any output": [0],
        "inside a member": range(1, end),
        "between members": [m.offset for m in members[1:]],
        "between samples": starts or [end],
        "without its end mark": [end],
    }
    return data[: rng.choice(places[failure])]


def leftovers(out: Path) -> list[str]:
    """What of a second stage's output looks like a result."""
    if not out.exists():
        return []
    found = {p for pattern in RESULTS for p in out.glob(pattern) if not p.name.startswith(".")}
    return sorted(p.name for p in found if p.name != "settings.json")


def looks_whole(stream: Path) -> bool:
    """True if a reader would take the stream for complete."""
    try:
        list(read_path(stream))
    except BadInput:
        return False
    return True


class Joints:
    """The first stages' real outputs, and one joint at a time."""

    def __init__(self, work: Path) -> None:
        self.work, self.runs = work, Runs((work / "runs").resolve())
        for name in ("pack", "value score"):
            self.runs.ready(name)
        self.places = {
            "images": self.runs.work / "images", "value": self.runs.whole("value train"),
            "generate": self.runs.whole("generate"), "scored": self.runs.whole("value score"),
            "val": DATA / "val",
        }  # fmt: skip

    def words(self, line: str, out: Path) -> list[str]:
        return [_fill(word, self.places | {"out": out}) for word in line.split()]

    def first(self, name: str) -> Path:
        """The whole output of a first stage, made once."""
        path = self.work / f"{name}.tar".replace(" ", "-")
        if not path.exists():
            done = utilgen([*self.words(FIRST[name], path), "-q"], stdout=path.with_suffix(".part"))
            assert done.code == 0, done.said
            path.with_suffix(".part").rename(path)
        return path

    def place(self, second: str) -> Path:
        """An empty place for a second stage."""
        out = self.work / "out"
        shutil.rmtree(out, ignore_errors=True)
        if second == "view":
            out.mkdir()
        return out

    def feed(self, first: str, second: str, failure: str, rng: random.Random) -> list[object]:
        """(exit code, what looks whole afterwards, its line)."""
        broken, out = self.work / "broken.tar", self.place(second)
        broken.write_bytes(cut(self.first(first), failure, rng))
        stream = self.work / "stream.tar"
        done = utilgen([*self.words(SECOND[second][0], out), "-q"], stdin=broken, stdout=stream)
        left = leftovers(out)
        if not second.endswith("-o") and second in ("pairs", "value score") and looks_whole(stream):
            left.append("stream")
        return [done.code, left, done.line if done.clean else done.said[-200:]]

    def in_bash(self, first: str, second: str, failure: str, rng: random.Random) -> list[object]:
        """(status with pipefail, without, what looks whole afterwards), by real processes."""
        broken, out, stream = self.work / "broken.tar", self.place(second), self.work / "stream.tar"
        broken.write_bytes(cut(self.first(first), failure, rng))
        words = " ".join(self.words(SECOND[second][0], out))
        stages = f"(cat {broken}; exit 1) | {sys.executable} -m utilgen_cli {words} -q > {stream}"
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", f"{stages}; echo $? ${{PIPESTATUS[1]}}"],
            env={**os.environ, **QUIET}, check=False, capture_output=True,
        )  # fmt: skip
        left = leftovers(out)
        if second in ("pairs", "value score") and looks_whole(stream):
            left.append("stream")
        return [*map(int, done.stdout.split()), left]


@campaign("pipes", runs=1)
def pipes(options: Options) -> str:
    """The whole matrix; `--only FIRST|SECOND ...` for some of it."""
    work, kept = Joints(options.work), Kept(options.work / "pipes.json")
    for first, second in joints():
        name = f"{first} | {second}"
        if (options.only and name not in options.only) or name in kept.rows:
            continue
        rng = random.Random(f"{options.seed}/{name}")
        fed = [work.feed(first, second, failure, rng) for failure in FAILURES]
        failure = rng.choice(FAILURES)
        bash = [failure, *work.in_bash(first, second, failure, rng)]
        whole = sum(bool(row[1]) for row in fed) + bool(bash[3])
        kept.add(name, [*(row[0] for row in fed), *bash[:3], whole])
    rows = [[name.replace(" | ", " → "), *kept.rows[name]] for name in kept.rows]
    head = ("first → second", *(f"fails {f}" for f in FAILURES), "in bash: fails",
            "status with pipefail", "status without", "results that look whole")  # fmt: skip
    about = (
        "Exit codes of the second stage. `-o`: into a directory, else to stdout. In bash: real "
        "processes under `pipefail`; the status without it is the second stage's own."
    )
    return f"{about}\n\n{table(head, rows)}"
