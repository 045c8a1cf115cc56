"""Kill runs at random moments, run them again, and compare the bytes with an undisturbed run.

    python -m tests.faults.campaign WORK [--times 20] [--signal KILL|TERM|USR1] [--only NAME ...]

A row a command: how often it was hit while it worked, and how many of the reruns gave the same
bytes. pytest runs a short form (tests/test_faults.py); long forms are recorded in RESULTS.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

DATA = Path(__file__).parents[2] / "examples" / "data"
BOOKKEEPING = (".lock", "settings.json")


@dataclass
class Case:
    """A command that writes OUT; `needs` are the cases whose outputs it reads."""

    words: list[str]
    needs: list[str] = field(default_factory=list)


CASES = {
    "invert": Case(["invert", "REAL", "-m", "tiny", "--smoke"]),
    "generate": Case(["generate", "-m", "tiny", "--per-class", "6", "--shard-size", "5", "--steps", "4"]),
    "value": Case(
        ["value", "train", "--real", "REAL", "--synthetic", "generate", "--val", "VAL", "--smoke"],
        ["generate"],
    ),
    "score": Case(["value", "score", "generate", "--value", "value", "--force"], ["value"]),
    "pairs": Case(["pairs", "score"], ["score"]),
    "dpo": Case(["dpo", "pairs", "-m", "tiny", "--smoke"], ["pairs"]),
    "ilpo": Case(
        ["ilpo", "-m", "tiny", "--value", "value", "--force", "--per-class", "2", "--shard-size", "5",
         "--smoke"], ["value"],
    ),
    "eval": Case(
        ["eval", "--real", "REAL", "--synthetic", "base=generate", "--val", "VAL", "--test", "VAL2",
         "--seeds", "2", "--smoke"], ["generate"],
    ),
    "lora": Case(["lora", "REAL", "-m", "tiny", "--smoke"]),
}  # fmt: skip


def command(case: Case, work: Path, out: Path) -> list[str]:
    """The case as an argument list; inputs are undisturbed outputs in `work`."""
    places = {"REAL": str(DATA / "real"), "VAL": str(DATA / "val"), "VAL2": str(DATA / "test")}
    places |= {name: str(work / name) for name in CASES if name in case.needs + list(CASES)}
    first, *rest = case.words
    words = [first, *(places.get(w, w) for w in rest)]
    words = [w.replace("base=generate", f"base={work / 'generate'}") for w in words]
    if case.words[0] == "value":
        words[1] = case.words[1]
    return [sys.executable, "-m", "utilgen_cli", *words, "-q", "-o", str(out)]


def digest(directory: Path) -> dict[str, str]:
    """What must come back the same: every file, with times left out of the statistics."""
    found = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        name = str(path.relative_to(directory))
        if path.name.startswith(BOOKKEEPING):
            continue
        data = path.read_bytes()
        if path.suffix == ".json":
            data = json.dumps(without_times(json.loads(data)), sort_keys=True).encode()
        found[name] = hashlib.sha256(data).hexdigest()
    return found


def without_times(value: object) -> object:
    """JSON without the entries that tell of time spent."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if "second" not in k and k != "date"}
    if isinstance(value, list):
        return [without_times(v) for v in value]
    return value


def undisturbed(name: str, work: Path) -> float:
    """Run a case and what it needs, once; the seconds it took."""
    for need in CASES[name].needs:
        undisturbed(need, work)
    marker = work / f"{name}.seconds"
    if marker.exists():
        return float(marker.read_text())
    start = time.monotonic()
    subprocess.run(command(CASES[name], work, work / name), check=True, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - start
    marker.write_text(str(seconds))
    return seconds


def disturb(name: str, work: Path, number: signal.Signals, rng: random.Random) -> dict[str, object]:
    """One run that is hit at a random moment, then run again to its end."""
    seconds = undisturbed(name, work)
    out = work / f"{name}-disturbed"
    shutil.rmtree(out, ignore_errors=True)
    words = command(CASES[name], work, out)
    run = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    time.sleep(rng.uniform(0.3, 1.0) * seconds)
    hit = run.poll() is None
    if hit:
        run.send_signal(number)
    start = time.monotonic()
    _, said = run.communicate(timeout=120)
    stop_seconds, code = time.monotonic() - start, run.returncode
    partial = [str(p) for p in out.rglob("*.tar") if not whole(p)] if out.exists() else []
    again = subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
    same = again.returncode == 0 and digest(out) == digest(work / name)
    row = {"hit": hit, "code": code, "stop_seconds": round(stop_seconds, 2), "partial": partial,
           "same": same}  # fmt: skip
    if not same:
        row["why"] = again.stderr.decode()[-300:] or difference(digest(out), digest(work / name))
    if b"Traceback" in said:
        row["why"] = said.decode()[-300:]
    return row


def difference(a: dict[str, str], b: dict[str, str]) -> str:
    return ", ".join(sorted(k for k in {**a, **b} if a.get(k) != b.get(k)))


def whole(shard: Path) -> bool:
    """GNU tar reads it and it ends in the end mark."""
    listed = subprocess.run(["tar", "tf", shard], capture_output=True, check=False)
    return listed.returncode == 0 and shard.read_bytes().endswith(bytes(1024))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--signal", default="KILL")
    parser.add_argument("--only", nargs="*", default=list(CASES))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    number = signal.Signals[f"SIG{args.signal}"]
    args.work.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        rng = random.Random(f"{args.seed}/{name}/{args.signal}")
        rows = [disturb(name, args.work, number, rng) for _ in range(args.times)]
        summary = {
            "command": name, "signal": args.signal, "runs": len(rows),
            "hit": sum(bool(r["hit"]) for r in rows),
            "codes": sorted({int(str(r["code"])) for r in rows}),
            "longest_stop_seconds": max(float(str(r["stop_seconds"])) for r in rows),
            "partial": sum(bool(r["partial"]) for r in rows),
            "same": sum(bool(r["same"]) for r in rows),
        }  # fmt: skip
        print(json.dumps(summary), flush=True)
        for row in rows:
            if "why" in row:
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
