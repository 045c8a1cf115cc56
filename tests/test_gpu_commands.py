"""The commands on a GPU that is pretended: they keep its rules, and end where the CPU does."""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from utilgen_cli.shards.images import decode_rgb, encode_image
from utilgen_cli.shards.sample import Sample

from .conftest import make_sample, tar_bytes
from .policy_parts import make_clip
from .random_bundle import CLASSES, make_bundle
from .test_command_ilpo import pixels, read

FEW = ["--steps", "2", "--batch-size", "4"]
# in the order of the loop: what a command makes, and how
LOOP = {
    "before": ["generate", "--per-class", "4", "--batch-size", "16"],
    "value": ["value", "train", "--real", "real.tar", "--synthetic", "before", "--val", "val.tar",
              "--steps", "10", "--folds", "2"],
    "scored": ["value", "score", "before", "--value", "value", "--force"],
    "pairs": ["pairs", "scored"],
    "dpo": ["dpo", "pairs", "--ema", ".9", "--gradient-accumulation", "2", "--flip", *FEW],
    "tokens": ["invert", "real.tar", "--vectors", "2", *FEW],
    "prompts": ["invert", "real.tar", "--population", "2", "--adapter", "dpo", *FEW],
    "lora": ["lora", "real.tar", "--gradient-checkpointing", *FEW],
    "after": ["ilpo", "--adapter", "dpo", "--init", "prompts", "--value", "value", "--clip", "clip",
              "--real", "real.tar", "--anchor-weight", "1", "--set-term", "gradient-match",
              "--iterations", "1", "--search-steps", "2", "--chunk", "4", "--noise", "single",
              "--per-class", "2", "--batch-size", "16", "--save-policy", "policy"],
    "again": ["generate", "--policy", "policy", "--adapter", "dpo", "--per-class", "2",
              "--batch-size", "16"],
    "table": ["eval", "--real", "real.tar", "--synthetic", "before=scored", "--val", "val.tar",
              "--test", "test.tar", "--seeds", "1", *FEW],
}  # fmt: skip
Loop = Callable[..., tuple[Path, dict[str, Any]]]
PRECISE = {"generate", "dpo", "invert", "lora", "ilpo", "eval"}


def shaded(number: int, label: int) -> Sample:
    """A class is told by its brightness in a few steps."""
    sample = make_sample(number, label, 16)
    rgb = decode_rgb(sample) // 4 + 90 * label
    return sample.with_member("png", encode_image(rgb))


def real(first: int, shots: int) -> bytes:
    """A shard of the bundle's classes."""
    samples = [shaded(first + 10 * i + c, c) for i in range(shots) for c in range(3)]
    names = [json.dumps({"class_name": CLASSES[i % 3]}).encode() for i in range(len(samples))]
    named = zip(samples, names, strict=True)
    return tar_bytes(sorted((s.with_member("json", n) for s, n in named), key=lambda s: s.key))


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory, commands: Path) -> Loop:
    """Run the commands one after the other on a machine of tests/pretend_gpu.py; what is `given`
    was made before."""
    inputs = tmp_path_factory.mktemp("inputs")
    make_bundle(inputs / "bundle")
    make_clip(inputs / "clip")
    for name, first in (("real", 0), ("val", 1000), ("test", 2000)):
        (inputs / f"{name}.tar").write_bytes(real(first, 6))

    def run(machine: str, *options: str, given: Sequence[Path] = ()) -> tuple[Path, dict[str, Any]]:
        env = {**os.environ, "TEST_MACHINE": machine, "UTILGEN_MODEL": "bundle"}
        here = tmp_path_factory.mktemp(machine)
        for path in (*inputs.iterdir(), *given):
            (here / path.name).symlink_to(path)
        for name, words in LOOP.items():
            if not (here / name).exists():
                more = options if words[0] in PRECISE else ()
                command = [commands / "utilgen", *words, "-o", name, *more, "-q", "--json"]
                done = subprocess.run(command, env=env, cwd=here, capture_output=True)
                assert done.returncode == 0, (command, done.stderr.decode())
        return here, json.loads(done.stdout)

    return run


@pytest.fixture(scope="module")
def precise(loop: Loop) -> tuple[Path, dict[str, Any]]:
    return loop("gpu", "--precision", "fp32")


def weights(path: Path) -> dict[str, Tensor]:
    """All that was learnt there, by file and name."""
    files = sorted(path.rglob("*.safetensors"))
    assert files
    return {f"{f.relative_to(path)} {k}": x for f in files for k, x in load_file(f).items()}


@pytest.mark.timeout(600)
def test_in_single_precision_the_loop_ends_where_the_cpu_does(
    loop: Loop, precise: tuple[Path, dict[str, Any]]
) -> None:
    (cpu, there), (gpu, here) = loop("cpu", "--precision", "fp32"), precise
    for name in ("before", "after", "again"):
        drawn, expected = (read(path / name / "00000.tar") for path in (gpu, cpu))
        images = [member for member in expected if member.endswith(".png")]
        assert len(images) == (12 if name == "before" else 6)
        for member in images:  # diffusers' layers are laid out otherwise there: the last bit
            assert np.abs(pixels(drawn[member]) - pixels(expected[member])).max() <= 1, name
    stats = json.loads((gpu / "before" / "00000_stats.json").read_text())
    assert (stats["device"], stats["precision"]) == ("cuda", "float32")
    # one value model is learnt to the bit; Adam's first steps have the size of their rate whatever
    # the gradient, so that a last bit shows where a gradient is nothing else
    for name, tolerance in (("value", 0), ("tokens", 1e-4), ("policy", 1e-4), ("dpo", 0.05), ("lora", 0.05)):  # fmt: skip
        expected = weights(cpu / name)
        for key, x in weights(gpu / name).items():
            error = (x.double() - expected[key].double()).abs().max()
            assert error <= tolerance * expected[key].double().abs().max(), key
    arms = [(a["name"], pytest.approx(a["nll"]["mean"], rel=1e-3)) for a in there["arms"]]
    assert [(a["name"], a["nll"]["mean"]) for a in here["arms"]] == arms


@pytest.mark.timeout(600)
def test_by_default_the_loop_runs_in_half_precision(
    loop: Loop, precise: tuple[Path, dict[str, Any]]
) -> None:
    known = [precise[0] / name for name in ("value", "scored", "pairs")]  # they have no precision
    here, table = loop("gpu", given=known)
    stats = json.loads((here / "after" / "00000_stats.json").read_text())
    assert (stats["device"], stats["precision"]) == ("cuda", "bfloat16")
    assert all(math.isfinite(arm["nll"]["mean"]) for arm in table["arms"])
    assert table["protocol"]["train"]["precision"] == "bf16"
    for name in ("dpo", "tokens", "prompts", "lora", "policy"):
        assert all(x.dtype != torch.bfloat16 for x in weights(here / name).values()), name
