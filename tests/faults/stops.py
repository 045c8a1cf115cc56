"""INT, TERM, USR1 and USR2 in every command, once and twice, and in a pipeline of three stages.

Moments are even over the CPU time of an undisturbed run: `TERM starting` in a process of its
own, in the seconds of its imports too, the others in a fork of a process that has them. What is
measured is the time from the signal to the end of the process.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from .outputs import torn
from .registry import Options, campaign, record
from .runs import CASES, Child, Runs, forked, started

SIGNALS = ("INT", "TERM", "USR1", "USR2")
TWICE = ("INT INT", "TERM TERM")
STARTING = "TERM starting"
AGAIN = 0.02  # seconds to the second signal
BOOT = 0.35  # CPU seconds until a process listens: before, a signal ends it as it ends any other
AT_WORK = ((2.0, 5.0), (1.0, 2.5), (0.3, 0.4))  # CPU seconds at which a stage is hit
IMPORTS = 4.0  # CPU seconds of torch, diffusers and transformers
PIPELINE = (("INT", None), ("TERM", 0), ("TERM", 1), ("TERM", 2), ("USR1", 0), ("USR2", 1))


def stopped(runs: Runs, name: str, kind: str, rng: random.Random) -> dict[str, Any]:
    """Send the signal(s) `kind` to a run, then run it again."""
    out, errors = runs.fresh(name), runs.errors
    if kind == STARTING:
        seconds = runs.ready(name) + IMPORTS * (name not in ("pack", "pairs", "check", "view"))
        moment, run = rng.uniform(BOOT, BOOT + seconds), started(runs.words(name, out), errors)
    else:
        moment, run = rng.uniform(0.05, runs.ready(name)), forked(runs.words(name, out), errors)
    words = runs.words(name, out)
    row: dict[str, Any] = {"what": name, "signal": kind, "moment": round(moment, 2)}
    row["hit"] = run.work_until(moment)
    row |= ended(run, kind) if row["hit"] else {}
    row["torn"] = torn(out)
    again = forked(words, errors)
    code = again.wait(300)
    row["why"] = again.said[-300:] if code else runs.same(name, out) if out.exists() else ""
    return row


def ended(run: Child, kind: str) -> dict[str, Any]:
    """Send the signals and wait; code, seconds, and whether it ended as it should."""
    names = kind.removesuffix(" starting").split()
    first, *second = (signal.Signals[f"SIG{name}"] for name in names)
    start = time.monotonic()
    run.send(first)
    hit_again = False
    for number in second:
        time.sleep(AGAIN)
        if hit_again := run.running:
            run.send(number)
    code = run.wait(120)
    expected = 130 if first == signal.SIGINT else 75
    good = code == expected and len(run.said.splitlines()) >= 1 and "Traceback" not in run.said
    finished = code == 0  # the signal came after the last thing to do
    return {"code": code, "seconds": round(time.monotonic() - start, 2), "good": good or finished,
            "again": hit_again, "said": run.said[-200:]}  # fmt: skip


def pipeline(runs: Runs, out: Path) -> list[Child]:
    """generate | value score | pairs -o OUT"""
    value, stages = runs.whole("value train"), []
    lines = (
        ["generate", "-m", str(runs.work / "model"), "--per-class", "40"],
        ["value", "score", "--value", str(value), "--force"],
        ["pairs", "-o", str(out)],
    )
    reading = os.open(os.devnull, os.O_RDONLY)
    for number, words in enumerate(lines):
        following, writing = os.pipe()
        stages.append(started(words, runs.work / f"errors-{number}", reading, writing))
        os.close(reading)
        os.close(writing)
        reading = following
    os.close(reading)
    return stages


def stopped_pipeline(
    runs: Runs, stage: int | None, kind: str, rng: random.Random
) -> dict[str, Any]:
    """Signal one stage (None: all, as a terminal's Ctrl-C does), then run the pipeline again."""
    out, whole = runs.work / "pipe-hurt", runs.work / "pipe"
    if not whole.exists():
        assert [s.wait(300) for s in pipeline(runs, whole)] == [0, 0, 0]
    shutil.rmtree(out, ignore_errors=True)
    stages = pipeline(runs, out)
    chosen = [stage] if stage is not None else [0, 1, 2]
    hit = stages[chosen[0]].work_until(rng.uniform(*AT_WORK[chosen[0]]))
    start = time.monotonic()
    for number in chosen:
        if stages[number].running:
            stages[number].send(signal.Signals[f"SIG{kind}"])
    order = [*chosen, *(n for n in range(3) if n not in chosen)]
    ends = {n: (stages[n].wait(300), time.monotonic() - start) for n in order}
    codes, seconds = [ends[n][0] for n in range(3)], max(ends[n][1] for n in chosen)
    # nothing is kept; `pairs -o`, which comes last, needs no more than to be run again
    expected = [130] * 3 if kind == "INT" else [1, 1, 75]
    row = {"what": "pipeline", "signal": kind, "stage": stage, "hit": hit, "code": codes,
           "seconds": round(seconds, 2), "torn": torn(out), "why": "",
           "good": all(codes[n] == expected[n] for n in chosen)}  # fmt: skip
    row["good"] |= codes == [0, 0, 0]  # the signal came after the last thing to do
    if any(codes) and list(out.glob("*.tar")):
        row["why"] = "a stopped pipeline left a shard"
    again = [s.wait(300) for s in pipeline(runs, out)]
    same = all((out / p.name).read_bytes() == p.read_bytes() for p in whole.glob("*.tar"))
    if again != [0, 0, 0] or not same:
        row["why"] = f"again: {again}, the same: {same}"
    return row


@campaign("signals", runs=1)
def signals(options: Options) -> str:
    """Each signal (and INT and TERM twice) --runs times in every command, and in a pipeline."""
    runs, log = Runs(options.work, forked), options.work / "signals.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        with log.open("a") as f:
            f.write(json.dumps(row) + "\n")
        record("signals", table(rows, options.seed))

    def missing(number: int, name: str, kind: str, stage: int | None = None) -> bool:
        known = [(r["what"], r["signal"], r.get("stage")) for r in rows]
        return known.count((name, kind, stage)) <= number

    for number in range(options.runs):
        for name in options.only or [*CASES, "pipeline"]:
            rng = random.Random(f"{options.seed}/{name}/{number}")
            for kind in (*SIGNALS, *TWICE, STARTING) if name in CASES else ():
                if missing(number, name, kind):
                    keep(stopped(runs, name, kind, rng))
            for kind, stage in PIPELINE if name == "pipeline" else ():
                runs.ready("value train")
                if missing(number, name, kind, stage):
                    keep(stopped_pipeline(runs, stage, kind, rng))
    return table(rows, options.seed)


def table(rows: list[dict[str, Any]], seed: int) -> str:
    """The section of RESULTS.md."""
    lines = [
        f"INT, TERM, USR1, USR2 once, INT and TERM twice ({AGAIN} s apart), at moments drawn evenly "
        f"over a run; TERM once more over a run with its imports (seed {seed}). Then run to the end. Right: exit 75 "
        "(of a pipeline, which keeps nothing, 1), or 130 for INT, one line and no traceback (or 0: nothing was left to do). Same: byte for byte "
        "the undisturbed output.",
        "",
        "| command | signals that hit | second ones | right | longest s to the exit | torn files | "
        "same after rerun |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in [*CASES, "pipeline"]:
        mine = [r for r in rows if r["what"] == name and r["hit"]]
        if mine:
            lines.append(
                f"| {name} | {len(mine)} | {sum(r.get('again', False) for r in mine)} | "
                f"{sum(r['good'] for r in mine)} | "
                f"{max(r['seconds'] for r in mine):.1f} | {sum(len(r['torn']) for r in mine)} | "
                f"{sum(not r['why'] for r in mine)} of {len(mine)} |"
            )
    bad = [r for r in rows if r["hit"] and (not r["good"] or r["why"] or r["torn"])]
    return "\n".join(lines + [f"\n`{json.dumps(r)}`" for r in bad])
