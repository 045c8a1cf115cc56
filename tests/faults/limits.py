"""Disks that are full or read-only, two processes on one output, other settings in the same output.

After each failure there is room again and the same command is run to its end: nothing that was
finished may be lost, and the result must be the undisturbed run's. tmpfs needs root; without it
those rows are left out.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utilgen_cli.shards.sums import is_as_written

from .pipes import looks_whole
from .registry import Options, campaign
from .runs import Runs, digest
from .shell import Done, Kept, begin, table, utilgen

WRITERS = ("pack", "generate", "value score", "pairs", "value train", "dpo", "invert", "lora",
           "eval", "ilpo")  # fmt: skip
STREAMS = {
    "generate": "generate -m tiny --per-class 2 --steps 2",
    "value score": None,
    "pairs": None,
    "ilpo": None,
}
SHARES = (0.1, 0.5, 0.9)
CHANGED = {"pack": "--size 16", "generate": "--steps 3", "value score": "--method loss",
           "pairs": "--quantile 0.4", "value train": "--seed 7", "dpo": "--seed 7",
           "invert": "--seed 7", "lora": "--seed 7", "ilpo": "--seed 7"}  # fmt: skip
LONG = ("generate", "value train", "dpo", "invert", "lora", "eval", "ilpo")


def used(directory: Path) -> int:
    """Bytes of the files under a directory, in whole pages."""
    sizes = [p.stat().st_size for p in directory.rglob("*") if p.is_file()]
    return sum(-(-size // 4096) * 4096 for size in sizes)


@contextmanager
def small_disk(place: Path, size: int) -> Iterator[None]:
    """A tmpfs of `size` bytes at `place`."""
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", place], check=True)


def finished_shards(out: Path) -> dict[Path, int]:
    """Whole shards, by the inode that a rerun must keep."""
    return {p: p.stat().st_ino for p in out.glob("*.tar") if is_as_written(p)}


def clean_failure(done: Done) -> str:
    """Empty if it failed with one line and a code of its own."""
    said = [x for x in done.said.splitlines() if x.startswith("utilgen: ") and "warning" not in x]
    if done.code == 0:  # there was room enough
        return ""
    if done.code != 1 or len(said) != 1 or "Traceback" in done.said:
        return f"exit {done.code}: {done.said[-200:]!r}"
    return "" if "unexpected error" not in said[0] else said[0]


def then_rerun(
    runs: Runs, name: str, out: Path, failed: Done, kept: dict[Path, int]
) -> list[object]:
    """(what was wrong with the failure, shards lost, what differs after the rerun)."""
    again = utilgen([*runs.words(name, out), "-q"])
    lost = [p.name for p, inode in kept.items() if not p.exists() or p.stat().st_ino != inode]
    other = again.line or again.said[-200:] if again.code else runs.same(name, out)
    return [clean_failure(failed), ", ".join(lost), other, failed.line]


def on_small_disk(runs: Runs, name: str, work: Path, share: float) -> list[object]:
    """The disk has room for `share` of the output; then it gets more."""
    place = work / "disk"
    room = max(8192, int(share * used(runs.whole(name))) // 4096 * 4096)
    with small_disk(place, room):
        out = place / "out"
        failed = utilgen([*runs.words(name, out), "-q"])
        kept = finished_shards(out)
        remount(place, "size=1G")
        return then_rerun(runs, name, out, failed, kept)


def with_file_limit(runs: Runs, name: str, work: Path, share: float) -> list[object]:
    """No file may grow beyond `share` of the largest one (RLIMIT_FSIZE)."""
    largest = max(p.stat().st_size for p in runs.whole(name).rglob("*") if p.is_file())
    limit, out = max(2048, int(share * largest)), work / "limited"
    shutil.rmtree(out, ignore_errors=True)

    def lower() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as every Python starts

    failed = utilgen([*runs.words(name, out), "-q"], before=lower)
    return then_rerun(runs, name, out, failed, finished_shards(out))


def on_read_only_disk(runs: Runs, name: str, work: Path) -> list[object]:
    """The disk is read-only at first."""
    place = work / "disk"
    with small_disk(place, 1 << 30):
        remount(place, "ro")
        failed = utilgen([*runs.words(name, place / "out"), "-q"])
        remount(place, "rw")
        return then_rerun(runs, name, place / "out", failed, {})


def without_scratch(runs: Runs, name: str, work: Path) -> list[object]:
    """TMPDIR lies on a full disk."""
    place, out = work / "disk", work / "scratchless"
    shutil.rmtree(out, ignore_errors=True)
    with small_disk(place, 8192):
        (place / "full").write_bytes(bytes(4096))

        def use() -> None:
            import tempfile

            os.environ["TMPDIR"], tempfile.tempdir = str(place), None

        failed = utilgen([*runs.words(name, out), "-q"], before=use)
    return then_rerun(runs, name, out, failed, finished_shards(out))


def to_full_stream(runs: Runs, name: str, work: Path) -> list[object]:
    """stdout is /dev/full; then a file under a limit, which must not look whole."""
    words = (STREAMS[name] or "").split() or runs.words(name, work)[:-2]
    full = utilgen([*words, "-q"], stdout=Path("/dev/full"))
    stream = work / "stream.tar"
    stream.unlink(missing_ok=True)

    def lower() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    cut = utilgen([*words, "-q"], stdout=stream, before=lower)
    whole = "a stream that looks whole" if looks_whole(stream) else ""
    return [clean_failure(full) or clean_failure(cut), "", whole, full.line]


def two_at_once(runs: Runs, name: str, work: Path) -> list[object]:
    """A second process is refused; the first is killed, and its lock taken over."""
    out = work / "shared"
    shutil.rmtree(out, ignore_errors=True)
    pid = begin([*runs.words(name, out), "-q"], work / "null", work / "said")
    while not (out / "settings.json").exists():
        time.sleep(0.005)
    os.kill(pid, signal.SIGSTOP)
    second = utilgen([*runs.words(name, out), "-q"])
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    found = then_rerun(runs, name, out, second, {})
    return [found[0] or ("" if "another process" in second.line else second.line), *found[1:]]


def other_settings(runs: Runs, name: str, work: Path) -> list[object]:
    """Refused, with the difference; nothing of the output changes."""
    words = runs.words(name, runs.whole(name))
    option, value = CHANGED[name].split()
    before = digest(runs.whole(name))
    done = utilgen([*words, option, value, "-q"])
    told = done.code == 2 and "now" in done.line and value in done.line
    same = digest(runs.whole(name)) == before
    return ["" if told else done.said[-200:], "", "" if same else "the output changed", done.line]


def trials(root: bool) -> Iterator[tuple[str, str]]:
    """(what, command) of every trial."""
    for name in WRITERS:
        for share in SHARES:
            if root:
                yield f"small disk {share}", name
        yield "file limit 0.5", name
        if root:
            yield "read-only disk", name
        if name in STREAMS:
            yield "full stream", name
        if name in ("pairs", "dpo", "invert", "lora") and root:
            yield "full TMPDIR", name
        if name in LONG:
            yield "two at once", name
        if name in CHANGED:
            yield "other settings", name


def attempt(runs: Runs, what: str, name: str, work: Path) -> list[object]:
    """One trial: (wrong failure, finished shards lost, wrong result, the line)."""
    kind, _, share = what.rpartition(" ")
    if kind == "small disk":
        return on_small_disk(runs, name, work, float(share))
    if kind == "file limit":
        return with_file_limit(runs, name, work, float(share))
    one_way = {"read-only disk": on_read_only_disk, "full TMPDIR": without_scratch,
               "full stream": to_full_stream, "two at once": two_at_once,
               "other settings": other_settings}  # fmt: skip
    return one_way[what](runs, name, work)


@campaign("limits", runs=1)
def limits(options: Options) -> str:
    """Every trial once; --only COMMAND or WHAT ... for some."""
    runs, kept = Runs((options.work / "runs").resolve()), Kept(options.work / "limits.json")
    for what, name in trials(os.geteuid() == 0):
        if options.only and name not in options.only and what not in options.only:
            continue
        if f"{what}: {name}" not in kept.rows:
            runs.ready(name)
            kept.add(f"{what}: {name}", attempt(runs, what, name, options.work))
    rows = []
    for what in dict.fromkeys(key.partition(":")[0] for key in kept.rows):
        mine = {k: row for k, row in kept.rows.items() if k.partition(":")[0] == what}
        counts = [sum(not row[i] for row in mine.values()) for i in range(3)]
        names = ", ".join(k.partition(": ")[2] for k in mine)
        rows.append([what, names, *(f"{c} of {len(mine)}" for c in counts)])
    head = ("limit", "commands", "one line, exit code as promised", "nothing finished is lost",
            "then the same result")  # fmt: skip
    wrong = [f"{key}: {row[:3]}" for key, row in kept.rows.items() if any(row[:3])]
    return "\n\n".join([table(head, rows), *wrong])
