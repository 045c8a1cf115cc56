"""What lies in the files that a command reads, as a short digest."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

SETTINGS = "settings.json"  # of an output directory
STATS = "_stats.json"  # after a shard's stem
CHECKPOINT = "checkpoint.safetensors"  # of a run, until it is done
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
TEXTS = (".json", ".txt", ".model")
ENDS = 1 << 20  # bytes of each end of a large file that are looked at
MAX_TEXT = 1 << 26  # bytes of a text that is read whole
# Facts that differ where the same is made again, or made with a stop in between.
EFFORT = re.compile(rb'"(?:seconds|unet_calls|unet_latents)": [^\s,}]+')


def contents(paths: Sequence[Path]) -> str | None:
    """A digest of the shards, or of the weights and texts beside them, at `paths`; None if there
    are none.

    Of a shard its own sum where its statistics have one; of texts all but how long the work took;
    of other shards and of weights the size and the first and last MiB. The same bytes made again
    give the same digest; other ones, in all likelihood, not.
    """
    files = [f for path in paths for f in ([path] if path.is_file() else _read_of(path))]
    whole = hashlib.blake2b(digest_size=8)
    for file in files:
        whole.update(_gist(file))
    return whole.hexdigest() if files else None


def directory_named(name: str | None) -> Path | None:
    """The local directory that is named as an open_clip model: what lies there is a setting of
    what is made with it. None for other names."""
    path = (name or "").removeprefix("local-dir:")
    return Path(path) if os.path.isdir(path) else None  # noqa: PTH112  (a name may be too long)


def _read_of(directory: Path) -> list[Path]:
    """What a reader takes of a directory: the shards at its top; weights with their texts."""
    files = list(_below(directory))
    shards = [f for f in files if f.suffix == ".tar" and f.parent == directory]
    weights = [f for f in files if f.suffix in WEIGHTS]
    texts = [f for f in files if f.suffix in TEXTS] if weights else []
    return sorted(f for f in [*shards, *weights, *texts] if f.is_file())


def _below(directory: Path) -> Iterator[Path]:
    """The files of a directory, but for bookkeeping and for outputs that lie in it."""
    seen = {os.path.realpath(directory)}  # links may lead round
    for folder, folders, names in os.walk(directory, followlinks=True):
        folders[:] = [f for f in folders if f[0] != "." and not is_output(Path(folder, f))]
        real = [os.path.realpath(Path(folder, f)) for f in folders]
        folders[:] = [f for f, r in zip(folders, real, strict=True) if r not in seen]
        seen.update(real)
        yield from (Path(folder, n) for n in names if n[0] != "." and not _is_bookkeeping(n))


def is_output(directory: Path) -> bool:
    """True if a run has its output there: it is no part of the directory that it lies in."""
    return (directory / SETTINGS).exists()


def _is_bookkeeping(name: str) -> bool:
    return name == SETTINGS or name.endswith((STATS, CHECKPOINT))


def _gist(file: Path) -> bytes:
    stats, size = file.with_name(f"{file.stem}{STATS}"), file.stat().st_size
    if file.suffix == ".tar" and stats.exists():
        found = re.search(rb'"sha256": "([0-9a-f]{64})"', stats.read_bytes())
        if found:
            return found[1]
    if file.suffix in TEXTS and size <= MAX_TEXT:
        text = EFFORT.sub(b"", file.read_bytes())
        return str(len(text)).encode() + text
    with file.open("rb") as f:
        head = f.read(ENDS)
        f.seek(max(0, size - ENDS))
        return str(size).encode() + head + f.read()
