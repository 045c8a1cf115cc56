"""kill -9 at random moments: the rerun must write what an undisturbed run writes, to the last bit.

Moments are uniform over the CPU time of the undisturbed run, which other work on the machine does
not stretch (imports left out: the process is forked from one that has them).
"""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Iterator
from typing import Any

from .outputs import torn
from .registry import Options, campaign, record
from .runs import Runs, forked

RUNS = {"generate": 50, "ilpo": 50, "value train": 20, "dpo": 20, "invert": 20, "eval": 20,
        "lora": 20}  # fmt: skip
HITS = 4  # at most, before a run may end
SIGNALS = 4 * (signal.SIGKILL,) + (signal.SIGTERM,)


def killed(runs: Runs, name: str, rng: random.Random) -> Iterator[dict[str, Any]]:
    """One run that is hit up to HITS times (one hit in five is a TERM, which saves, so that later
    ones meet a resumed run), then run to its end: a row a hit."""
    seconds, out = runs.ready(name), runs.fresh(name)
    words, rows = runs.words(name, out), []
    for _ in range(HITS):
        moment, number = rng.uniform(0, 1.1 * seconds), rng.choice(SIGNALS)
        run = forked(words, runs.errors)
        if not run.work_until(moment):
            rows.append({"command": name, "signal": "none", "moment": round(moment, 3), "torn": []})
            break
        run.send(number)
        run.wait(120)
        rows.append({"command": name, "signal": number.name, "moment": round(moment, 3),
                     "torn": torn(out)})  # fmt: skip
    else:
        run = forked(words, runs.errors)
    code = run.wait(300)
    why = runs.same(name, out) if code == 0 else run.said[-300:]
    for row in rows:
        yield {**row, "code": code, "why": why}


@campaign("kill", runs=0)
def kill(options: Options) -> str:
    """kill -9: 50 moments of generate and ilpo, 20 of each trainer (--runs N: N of each)."""
    runs, log = Runs(options.work, forked), options.work / "kill.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    wanted = {n: options.runs or count for n, count in RUNS.items() if n in (options.only or RUNS)}
    while missing := [n for n, count in wanted.items() if len(kills(rows, n)) < count]:
        for name in missing:  # in turn, so that a campaign that is stopped has seen them all
            number = sum(r["command"] == name for r in rows)
            new = list(killed(runs, name, random.Random(f"{options.seed}/{name}/{number}")))
            rows += new
            with log.open("a") as f:
                f.writelines(json.dumps(row) + "\n" for row in new)
            record("kill", table(rows, runs, options.seed))
    return table(rows, runs, options.seed)


def kills(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The rows of a command that are a kill -9."""
    return [r for r in rows if r["command"] == name and r["signal"] == "SIGKILL"]


def table(rows: list[dict[str, Any]], runs: Runs, seed: int) -> str:
    """The section of RESULTS.md."""
    lines = [
        f"kill -9 at moments drawn evenly over an undisturbed run (seed {seed}; imports left out), "
        f"a run up to {HITS} times, with a TERM in between now and then; then run to the end. Same: "
        "every file is byte for byte the undisturbed run's (but for times in JSON), and none is "
        "left over.",
        "",
        "| command | CPU seconds | kills | torn files under a final name | same after rerun |",
        "|---|---|---|---|---|",
    ]
    for name in RUNS:
        if mine := kills(rows, name):
            torn_files = sum(len(r["torn"]) for r in mine)
            same = sum(not r["why"] for r in mine)
            lines.append(
                f"| {name} | {runs.ready(name):.2f} | {len(mine)} | {torn_files} | "
                f"{same} of {len(mine)} |"
            )
    lines += [f"\n{r['command']} at {r['moment']} s: {r['why'] or r['torn']}" for r in rows
              if r["why"] or r["torn"]]  # fmt: skip
    return "\n".join(lines)
