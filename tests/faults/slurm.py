"""examples/slurm on a faked cluster: sbatch keeps what it is given, scontrol puts jobs back, and
`Cluster.run` executes the job scripts in the order of their dependencies, preempting some.

A preemption is what SLURM does: USR1 to the batch shell (`--signal=B:USR1@120`), or TERM to all
processes of the job.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .outputs import digest
from .registry import Options, campaign
from .runs import DATA, QUIET

SCRIPTS = Path(__file__).parents[2] / "examples" / "slurm"
FAKES = {
    "sbatch": """id=$(($(ls "$CLUSTER" | wc -l) + 100))
printf '%s\\0' "$@" > "$CLUSTER/$id"
echo "$id" """,
    "scontrol": """[ "$1" = requeue ] && echo "$2" >> "$CLUSTER.requeued" """,
}


Moment = Callable[[], bool]
Preemptions = dict[str, tuple[int, Moment]]


class Cluster:
    """A directory of submitted jobs, and one machine that runs them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "jobs").mkdir(parents=True, exist_ok=True)
        (directory / "bin").mkdir(exist_ok=True)
        for name, script in FAKES.items():
            path = directory / "bin" / name
            path.write_text(f"#!/usr/bin/env bash\n{script}\n")
            path.chmod(0o755)
        places = [directory / "bin", Path(sys.executable).parent, os.environ["PATH"]]
        self.environment = {
            **os.environ, **QUIET, "CLUSTER": str(directory / "jobs"),
            "PATH": os.pathsep.join(map(str, places)),
        }  # fmt: skip
        self.history: list[tuple[str, int]] = []  # (job, exit code) of every start

    def submit(self, words: list[str]) -> None:
        """Run a script that submits jobs."""
        subprocess.run(["bash", *words], cwd=self.directory, env=self.environment, check=True)

    def run(self, preempt: Preemptions | None = None) -> None:
        """All jobs to their end; `preempt` maps a job's name to the signal and its moment.

        AssertionError: a job fails, or one that it depends on did not come first.
        """
        done: set[str] = set()
        for path in sorted((self.directory / "jobs").iterdir()):
            options, command = parse(path.read_bytes())
            if "dependency" in options:
                assert options["dependency"].removeprefix("afterok:") in done
            tasks = int(options["array"].partition("-")[2]) + 1 if "array" in options else 0
            self._run_job(path.name, command, tasks, (preempt or {}).get(options["job-name"]))
            done.add(path.name)

    def _run_job(
        self, number: str, command: list[str], tasks: int, hit: tuple[int, Moment] | None
    ) -> None:
        """The tasks of one job at the same time, each again as often as it is put back."""
        waiting: list[int | None] = list(range(tasks)) if tasks else [None]
        while waiting:
            running = [(task, self._start(number, command, task, tasks)) for task in waiting]
            if hit is not None:
                while not hit[1]():
                    time.sleep(0.02)
                for _, process in running:
                    preempt(process, hit[0])
                hit = None
            waiting = []
            for task, process in running:
                code = process.wait(300)
                name = number if task is None else f"{number}_{task}"
                self.history.append((name, code))
                if self._put_back(name):
                    waiting.append(task)
                else:
                    assert code == 0, (name, code, (self.directory / "log").read_text()[-600:])

    def _start(
        self, number: str, command: list[str], task: int | None, tasks: int
    ) -> subprocess.Popen[bytes]:
        array = {} if task is None else {
            "SLURM_ARRAY_JOB_ID": number, "SLURM_ARRAY_TASK_ID": str(task),
            "SLURM_ARRAY_TASK_COUNT": str(tasks), "SLURM_ARRAY_TASK_MIN": "0",
        }  # fmt: skip
        with (self.directory / "log").open("ab") as log:
            return subprocess.Popen(
                ["bash", *command], cwd=self.directory, stdout=log, stderr=log,
                env={**self.environment, "SLURM_JOB_ID": number, **array}, start_new_session=True,
            )  # fmt: skip

    def _put_back(self, name: str) -> bool:
        path = self.directory / "jobs.requeued"
        names = path.read_text().splitlines() if path.exists() else []
        if name not in names:
            return False
        names.remove(name)
        path.write_text("".join(f"{n}\n" for n in names))
        return True


def after(seconds: float) -> Moment:
    """True so many seconds after it is first asked."""
    asked: list[float] = []

    def moment() -> bool:
        asked.append(time.monotonic())
        return asked[-1] - asked[0] >= seconds

    return moment


def parse(job: bytes) -> tuple[dict[str, str], list[str]]:
    """(sbatch's own options, the script and its arguments)."""
    words = job.decode().split("\0")[:-1]
    own = words[: words.index(str(SCRIPTS / "stage.sbatch"))]
    options = dict(w.removeprefix("--").partition("=")[::2] for w in own)
    return options, words[len(own) :]


def preempt(process: subprocess.Popen[bytes], number: int) -> None:
    """USR1 goes to the batch shell alone, TERM to every process of the job."""
    if process.poll() is None:
        if number == signal.SIGTERM:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)


@campaign("slurm", runs=2)
def slurm(options: Options) -> str:
    """submit.sh at smoke size to its end; then --runs times with every job preempted once."""
    whole, words = options.work / "whole", [str(SCRIPTS / "submit.sh"), "tiny"]
    words += [str(DATA / name) for name in ("real", "val", "test")] + ["2", "8"]
    os.environ["SMOKE"] = "1"
    rows: list[dict[str, Any]] = []
    seconds = chain(whole, words, None, options.seed)
    for number in range(options.runs):
        place = options.work / f"preempted-{number}"
        kind = (signal.SIGUSR1, signal.SIGTERM)[number % 2]
        chain(place, words, kind, options.seed + number)
        starts = json.loads((place / "history.json").read_text())
        a, b = (results(place), results(whole))
        rows.append({
            "signal": kind.name, "starts": len(starts), "put back": sum(c != 0 for _, c in starts),
            "codes": sorted({c for _, c in starts}),
            "differs": sorted(k for k in {**a, **b} if a.get(k) != b.get(k)),
        })  # fmt: skip
    lines = [
        f"`SMOKE=1 submit.sh tiny real val test 2 8` on faked sbatch and scontrol: 10 jobs, 13 "
        f"tasks, {seconds:.0f} s undisturbed. Then each job is aimed at once, at a random moment "
        f"(seed {options.seed}); those still at work are preempted and put themselves back.",
        "",
        "| signal | starts | put back | exit codes | same results |",
        "|---|---|---|---|---|",
    ]
    lines += [f"| {r['signal']} | {r['starts']} | {r['put back']} | {r['codes']} | "
              f"{'yes' if not r['differs'] else r['differs']} |" for r in rows]  # fmt: skip
    return "\n".join(lines)


def chain(place: Path, words: list[str], kind: signal.Signals | None, seed: int) -> float:
    """Submit and run the chain in `place`, unless that is done; its seconds."""
    marker = place / "history.json"
    start = time.monotonic()
    if not marker.exists():
        cluster, rng = Cluster(place), random.Random(seed)
        cluster.submit(words)
        names = ("invert", "generate", "value", "score", "pairs", "dpo", "ilpo", "best", "eval")
        moments: Preemptions = {}
        for name in names if kind else ():
            moments[f"utilgen-{name}"] = (int(kind or 0), after(rng.uniform(1, 12)))
        cluster.run(moments)
        marker.write_text(json.dumps(cluster.history))
    return time.monotonic() - start


def results(place: Path) -> dict[str, str]:
    """Digests of all that the jobs made."""
    made = (
        "tokens",
        "synth",
        "value",
        "scored",
        "pairs",
        "dpo",
        "ilpo-trial",
        "policy",
        "best",
        "eval",
    )
    return {f"{name}/{k}": v for name in made for k, v in digest(place / name).items()}
