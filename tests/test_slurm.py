"""The SLURM scripts, run against faked sbatch and scontrol."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from .conftest import ROOT, Run
from .faults.outputs import digest
from .faults.slurm import Cluster

SLURM = ROOT / "examples" / "slurm"


def fake(directory: Path, name: str, script: str) -> None:
    directory.mkdir(exist_ok=True)
    path = directory / name
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)


def test_the_chain_of_jobs_is_the_golden_one(bash: Run, tmp_path: Path) -> None:
    fake(
        tmp_path / "bin", "sbatch",
        'echo "sbatch $*" >> jobs.txt; echo $((100 + $(wc -l < jobs.txt)))',
    )  # fmt: skip
    done = bash(f"PATH=$PWD/bin:$PATH bash {SLURM}/submit.sh sd21 real val test 4 20")
    assert done.returncode == 0, done.stderr
    jobs = (tmp_path / "jobs.txt").read_text().replace(str(SLURM / "stage.sbatch"), "STAGE")
    assert jobs == (ROOT / "tests" / "golden" / "slurm_submit.txt").read_text()
    (tmp_path / "jobs.txt").unlink()
    chosen = "CLASSIFIER='--arch resnet50 --size 64'"
    bash(f"{chosen} PATH=$PWD/bin:$PATH bash {SLURM}/submit.sh sd21 real val test 4 20")
    own = [line for line in (tmp_path / "jobs.txt").read_text().splitlines() if "--size 64" in line]
    assert [line.split("sbatch ")[-1].split()[0] for line in own] == ["value", "eval"]


def test_every_option_of_the_chain_exists(utilgen: Run) -> None:
    """Each command's --help knows the options that the chain uses."""
    for line in (ROOT / "tests" / "golden" / "slurm_submit.txt").read_text().splitlines():
        words = line.split("STAGE ")[1].split()
        command = words[:2] if words[0] == "value" else words[:1]
        text = utilgen(*command, "--help").stdout.decode()
        for option in re.findall(r"(?<= )--?[a-z-]+", " ".join(words)):
            assert re.search(rf"(?<![\w-]){option}(?![\w-])", text), f"{command} {option}"


@pytest.mark.parametrize(("array", "queued"), [({}, "7"), ({"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}, "7_3")])  # fmt: skip
def test_a_preempted_stage_saves_and_queues_itself_again(
    array: dict[str, str], queued: str, tmp_path: Path
) -> None:
    fake(tmp_path / "bin", "scontrol", 'echo "$*" >> scontrol.txt')
    fake(
        tmp_path / "bin",
        "utilgen",
        "trap 'sleep .3; exit 75' USR1; touch up; while :; do sleep .1; done",
    )
    env = {
        **os.environ,
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        **array,
    }
    job = subprocess.Popen(["bash", SLURM / "stage.sbatch", "generate"], cwd=tmp_path, env=env)
    while not (tmp_path / "up").exists():
        time.sleep(0.05)
    job.send_signal(10)
    assert job.wait(20) == 75
    assert (tmp_path / "scontrol.txt").read_text() == f"requeue {queued}\n"


def test_a_failed_stage_does_not_queue_itself_again(bash: Run, tmp_path: Path) -> None:
    fake(tmp_path / "bin", "scontrol", "touch called")
    fake(tmp_path / "bin", "utilgen", "exit 65")
    done = bash(f"PATH=$PWD/bin:$PATH SLURM_JOB_ID=7 bash {SLURM}/stage.sbatch generate")
    assert done.returncode == 65
    assert not (tmp_path / "called").exists()


def test_a_preempted_array_task_goes_on_to_the_same_shards(utilgen: Run, tmp_path: Path) -> None:
    """The job script really runs: it is hit once it draws, puts itself back and ends."""
    draw = "generate -m tiny --per-class 8 --shard-size 40 --steps 4 -o synth"
    cluster = Cluster(tmp_path / "cluster")
    sbatch = f"sbatch --parsable --job-name=draw --array=0-0 {SLURM}/stage.sbatch {draw}"
    cluster.submit(["-c", f"{sbatch} --part slurm"])
    cluster.run({"draw": (signal.SIGTERM, lambda: (cluster.directory / "synth").exists())})
    assert cluster.history == [("100_0", 75), ("100_0", 0)]
    utilgen(*draw.split())
    assert digest(tmp_path / "cluster" / "synth") == digest(tmp_path / "synth")
