"""Parts and ranks: any division of the work gives the same samples, and no process hangs.

parts: every `--part I/N`, in any order, batch size and after kills, against one undisturbed run.
ranks: each command under torchrun with two gloo processes, then with one of them killed.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from .outputs import torn
from .registry import Options, campaign, record
from .runs import CASES, QUIET, Child, Runs, forked

DIVIDED = {"generate": 0.8, "value score": 0.6, "ilpo": 1.5}  # and CPU seconds in which to kill
TRAINERS = {"invert": "learned_embeds", "dpo": "lora_weights", "lora": "lora_weights"}
LIMIT = 30.0  # seconds in which a run must end when one of its processes is gone


def divided(runs: Runs, name: str, rng: random.Random) -> dict[str, Any]:
    """All parts of a random division in random order, some of them killed first."""
    runs.ready(name)
    out, count, kills = runs.fresh(name), rng.randint(2, 5), 0
    order = rng.sample(range(count), count)
    codes = []
    for index in order:
        words = [*runs.words(name, out), "--part", f"{index}/{count}"]
        if name == "generate":
            words += ["--batch-size", str(rng.choice((1, 3, 16, 64)))]
        if rng.random() < 0.5:
            run = forked(words, runs.errors)
            if run.work_until(rng.uniform(0, DIVIDED[name])):
                run.send(rng.choice((signal.SIGKILL, signal.SIGTERM)))
                kills += 1
            run.wait(120)
        last = forked(words, runs.errors)
        codes.append(last.wait(300))
    why = last.said[-300:] if any(codes) else runs.same(name, out)
    return {"what": name, "parts": count, "order": order, "kills": kills, "torn": torn(out),
            "why": why}  # fmt: skip


@campaign("parts", runs=15)
def parts(options: Options) -> str:
    """--runs random divisions of generate, value score and ilpo, with kills."""
    runs, log = Runs(options.work, forked), options.work / "parts.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    for name in options.only or DIVIDED:
        for number in range(sum(r["what"] == name for r in rows), options.runs):
            rows.append(divided(runs, name, random.Random(f"{options.seed}/{name}/{number}")))
            with log.open("a") as f:
                f.write(json.dumps(rows[-1]) + "\n")
            record("parts", parts_table(rows, options.seed))
    return parts_table(rows, options.seed)


def parts_table(rows: list[dict[str, Any]], seed: int) -> str:
    """The section of RESULTS.md."""
    lines = [
        f"`--part I/N` for N from 2 to 5 in random order, random batch size, half of the parts "
        f"aimed at with KILL or TERM before they may end (seed {seed}); the directory against that of "
        "one undisturbed process.",
        "",
        "| command | divisions | parts | kills that hit | same bytes |",
        "|---|---|---|---|---|",
    ]
    for name in DIVIDED:
        mine = [r for r in rows if r["what"] == name]
        if mine:
            lines.append(
                f"| {name} | {len(mine)} | {sum(r['parts'] for r in mine)} | "
                f"{sum(r['kills'] for r in mine)} | {sum(not r['why'] for r in mine)} of {len(mine)} |"
            )
    return "\n".join(lines + [f"\n`{json.dumps(r)}`" for r in rows if r["why"] or r["torn"]])


def torchrun(words: list[str], errors: Path) -> Child:
    """`utilgen WORDS` in two gloo processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                "2", "-m", "utilgen_cli"]  # fmt: skip
    with errors.open("wb") as said:
        popen = subprocess.Popen(
            [*launcher, *words], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said,
            env={**os.environ, **QUIET, "CUDA_VISIBLE_DEVICES": ""}, start_new_session=True,
        )  # fmt: skip
    popen.returncode = 0  # `Child` waits for it
    return Child(popen.pid, errors)


def doubled(words: list[str]) -> list[str]:
    """The same with twice the batch size."""
    at = words.index("--batch-size") + 1
    return [*words[:at], str(2 * int(words[at])), *words[at + 1 :]]


def largest_difference(a: Path, b: Path, stem: str) -> float:
    """Between all tensors of the files *STEM*.safetensors in two directories."""
    from safetensors.torch import load_file

    found = [p.relative_to(a) for p in a.rglob(f"*{stem}*.safetensors")]
    assert found, f"nothing like {stem} in {a}"
    return max(
        float((load_file(a / p)[key] - tensor).abs().max())
        for p in found
        for key, tensor in load_file(b / p).items()
    )


def own_lines(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("utilgen: ")]


def ranked(runs: Runs, name: str) -> dict[str, Any]:
    """What a command does in two processes."""
    runs.ready(name)
    out, errors = runs.fresh(name), runs.work / "errors-ranks"
    words = runs.words(name, out)
    if name in TRAINERS:
        return both_ways(runs, name)
    run = torchrun(words, errors)
    code = run.wait(400)
    lines = own_lines(run.said)
    row = {"what": name, "code": code, "lines": lines, "answer": "", "good": False}
    if code == 0:
        why = runs.same(name, out)
        return row | {"answer": "works; same bytes as one process", "good": not why, "why": why}
    row |= {"answer": f"refuses: `{lines[0]}`" if lines else "?",
            "good": code == 1 and len(lines) == 1 and "exitcode  : 2" in run.said}  # fmt: skip
    if name in DIVIDED:
        out = runs.fresh(name)
        run = torchrun([*runs.words(name, out), "--part", "rank"], errors)
        why = runs.same(name, out) if run.wait(200) == 0 else run.said[-300:]
        row |= {"answer": row["answer"] + "; with `--part rank` it works: same bytes",
                "good": row["good"] and not why, "why": why}  # fmt: skip
    return row


def both_ways(runs: Runs, name: str) -> dict[str, Any]:
    """How far a trainer's weights in two processes are from those of one with twice the batch.

    Of the shipped model, and of random weights, whose gradients are next to nothing: there Adam
    makes rounding larger.
    """
    worst = {}
    for model in ("tiny", str(runs.work / "model")):
        two, one = runs.fresh(name), runs.work / f"{name}-doubled"
        shutil.rmtree(one, ignore_errors=True)
        line = [
            model if word == str(runs.work / "model") else word for word in runs.words(name, two)
        ]
        again = doubled([str(one) if word == str(two) else word for word in line])
        assert torchrun(line, runs.work / "errors-ranks").wait(400) == 0
        assert forked(again, runs.errors).wait(300) == 0
        worst[model] = largest_difference(one, two, TRAINERS[name])
    tiny, random_weights = worst.values()
    answer = (f"works; weights within {tiny:.1e} of one process with the doubled batch (-m tiny), "
              f"{random_weights:.1e} (random weights)")  # fmt: skip
    return {"what": name, "code": 0, "lines": [], "answer": answer, "good": tiny <= 1e-5}


def bereft(runs: Runs, name: str, rank: int) -> dict[str, Any]:
    """Kill one of two processes when both are at work; how long until the launcher ends."""
    runs.ready(name)
    out, errors = runs.fresh(name), runs.work / "errors-ranks"
    words = runs.words(name, out)
    more = ["--per-class", "6000", "--part", "rank"] if name in DIVIDED else ["--steps", "9000"]
    words += more  # work that does not end by itself
    run = torchrun(words, errors)
    workers = at_work(run, out)
    workers[rank].send_signal(signal.SIGKILL)
    start = time.monotonic()
    try:
        code = run.wait(120)
    except TimeoutError:
        code = -1
    left = [p for p in workers if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    for process in left:
        process.kill()
    seconds = time.monotonic() - start
    return {"what": name, "killed": rank, "code": code, "seconds": round(seconds, 1),
            "left": len(left), "torn": torn(out),
            "good": code not in (0, -1) and seconds < LIMIT and not left}  # fmt: skip


def at_work(run: Child, out: Path) -> list[psutil.Process]:
    """The two workers, by rank, once both have worked for some seconds and own the output."""
    while run.running:
        workers = {}
        for process in psutil.Process(run.pid).children(recursive=True):
            try:
                rank = process.environ().get("RANK")
            except psutil.Error:
                continue
            if rank is not None:
                workers[int(rank)] = process
        busy = [sum(p.cpu_times()[:2]) > 7.0 for p in workers.values()]
        if len(busy) == 2 and all(busy) and (out / "settings.json").exists():
            return [workers[0], workers[1]]
        time.sleep(0.1)
    raise AssertionError(run.said[-500:])


@campaign("ranks", runs=1)
def ranks(options: Options) -> str:
    """Every command under torchrun with two processes; then one of the two is killed."""
    runs, log = Runs(options.work), options.work / "ranks.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = {(r["what"], r.get("killed")) for r in rows}
    todo: list[tuple[str, int | None]] = [(name, None) for name in CASES]
    todo += [("dpo", 0), ("dpo", 1), ("generate", 0), ("generate", 1), ("invert", 1), ("lora", 1)]
    for name, killed in todo:
        if (name, killed) in done or (options.only and name not in options.only):
            continue
        rows.append(ranked(runs, name) if killed is None else bereft(runs, name, killed))
        with log.open("a") as f:
            f.write(json.dumps(rows[-1]) + "\n")
        record("ranks", ranks_table(rows))
    return ranks_table(rows)


def ranks_table(rows: list[dict[str, Any]]) -> str:
    """The section of RESULTS.md."""
    lines = [
        "Two gloo processes under torchrun.",
        "",
        "| command | answer | right |",
        "|---|---|---|",
    ]
    lines += [f"| {r['what']} | {r['answer']} | {'yes' if r['good'] else 'NO'} |"
              for r in rows if "answer" in r]  # fmt: skip
    lines += ["", "One of the two killed (-9) at work; no data loader has worker processes.", "",
              "| command | killed rank | s until all had ended | exit | torn files | right |",
              "|---|---|---|---|---|---|"]  # fmt: skip
    lines += [f"| {r['what']} | {r['killed']} | {r['seconds']} | {r['code']} | {len(r['torn'])} | "
              f"{'yes' if r['good'] else 'NO'} |" for r in rows if "killed" in r]  # fmt: skip
    return "\n".join(lines)
