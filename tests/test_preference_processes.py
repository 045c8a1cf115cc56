"""Two processes under torchrun compute what one does with the doubled batch."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .conftest import ROOT, TORCHRUN, Run, tar_bytes
from .random_bundle import make_bundle
from .test_preference_training import LORA, pairs

OPTIONS = ["--steps", "3", "--lr", "1e-3", "--warmup", "0", "--beta", "10", "--loss"]


@pytest.mark.parametrize(("loss", "started"), [("dpo", True), ("kto", False)])
def test_two_processes_equal_one_with_the_doubled_batch(
    utilgen: Run, commands: Path, tmp_path: Path, loss: str, started: bool
) -> None:
    """Once with all that starting is, once by processes that have it behind them."""
    program = ["-m", "utilgen_cli"] if started else ["--no-python", commands / "utilgen"]
    bundle = make_bundle(tmp_path / "bundle")
    (tmp_path / "pairs.tar").write_bytes(tar_bytes(pairs(12)))
    command = ["dpo", "pairs.tar", "-m", str(bundle), *OPTIONS, loss]
    utilgen(*command, "--batch-size", "8", "-o", "one")
    both = subprocess.run(
        [*TORCHRUN, *program, *command, "--batch-size", "4", "-o", "two"],
        cwd=tmp_path, capture_output=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert both.returncode == 0, both.stderr.decode()
    assert both.stdout.decode().split() == ["two"]
    one, two = load_file(tmp_path / "one" / LORA), load_file(tmp_path / "two" / LORA)
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, atol=1e-5, rtol=0)
    assert sum(float(t.abs().sum()) for k, t in one.items() if k.endswith("lora_B.weight")) > 0


DECIDE = """
import sys, torch
from utilgen_cli.runtime import distributed
rank, _ = distributed.init()
figures = distributed.as_the_first({"dL_w": 0.1 + rank, "dL_l": 1e-300}, torch.device("cpu"))
line = f"{rank} {figures['dL_w']} {figures['dL_l']}"
sys.stdout.write(line + chr(10))  # at once: two of them write
"""


def test_all_processes_decide_by_the_figures_of_the_first(tmp_path: Path) -> None:
    (tmp_path / "decide.py").write_text(DECIDE)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*TORCHRUN, "decide.py"], cwd=tmp_path, env=environment, check=True,
                          capture_output=True, text=True)  # fmt: skip
    assert sorted(done.stdout.splitlines()) == ["0 0.1 1e-300", "1 0.1 1e-300"]
