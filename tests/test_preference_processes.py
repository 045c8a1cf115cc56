"""Two processes under torchrun compute what one does with the doubled batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .conftest import Run, tar_bytes
from .random_bundle import make_bundle
from .test_preference_training import LORA, pairs

OPTIONS = ["--steps", "3", "--lr", "1e-3", "--warmup", "0", "--beta", "10", "--loss"]


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_two_processes_equal_one_with_the_doubled_batch(
    utilgen: Run, tmp_path: Path, loss: str
) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    (tmp_path / "pairs.tar").write_bytes(tar_bytes(pairs(12)))
    command = ["dpo", "pairs.tar", "-m", str(bundle), *OPTIONS, loss]
    utilgen(*command, "--batch-size", "8", "-o", "one")
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    both = subprocess.run(
        [*torchrun, "-m", "utilgen_cli", *command, "--batch-size", "4", "-o", "two"],
        cwd=tmp_path, capture_output=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert both.returncode == 0, both.stderr.decode()
    assert both.stdout.decode().split() == ["two"]
    one, two = load_file(tmp_path / "one" / LORA), load_file(tmp_path / "two" / LORA)
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, atol=1e-5, rtol=0)
    assert sum(float(t.abs().sum()) for k, t in one.items() if k.endswith("up.weight")) > 0
