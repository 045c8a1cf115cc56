"""`utilgen dpo` and `utilgen lora` on the command line: files, exit codes, one-line errors."""

from __future__ import annotations

import importlib.util
import json
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from utilgen_cli.commands.dpo import dpo
from utilgen_cli.diffusion.finetune_config import (
    FinetuneConfig,
    make_optimizer,
    schedule_factor,
)
from utilgen_cli.diffusion.preference_run import PreferenceConfig
from utilgen_cli.runtime.errors import UsageError, UtilgenError

from .conftest import Run, tar_bytes
from .random_bundle import CLASSES, make_bundle
from .test_preference_training import LORA, pairs, shots

QUICK = ["--steps", "2", "--batch-size", "2"]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle")


def test_dpo_reads_a_pipe_and_prints_its_directory(
    utilgen: Run, bundle: Path, tmp_path: Path
) -> None:
    done = utilgen("dpo", "-m", bundle, *QUICK, "-o", "round1", input=tar_bytes(pairs(16)))
    assert done.stdout == b"round1\n"
    assert b"of 2 held-out pairs are ranked right" in done.stderr
    names = {path.name for path in (tmp_path / "round1").iterdir()}
    assert names == {".lock", ".lock-settings", "settings.json", ".files.json", "dpo.json", LORA}
    again = utilgen(
        "dpo", "-m", bundle, *QUICK, "-o", "round1", "--json", input=tar_bytes(pairs(16))
    )
    assert json.loads(again.stdout)["pairs"] == 16
    assert b"round1 was done before; the pipe was not compared with it." in again.stderr
    broken = utilgen("dpo", "-m", bundle, *QUICK, "-o", "round1", input=b"", check=False)
    assert broken.returncode == 65, "what fails upstream is said, also when the work is done"


def test_a_broken_pipe_leaves_nothing_that_looks_done(
    utilgen: Run, bundle: Path, tmp_path: Path
) -> None:
    whole = tar_bytes(pairs(16))
    cut = whole[:-10240]  # all members, no end mark
    done = utilgen("dpo", "-m", bundle, *QUICK, "-o", "cut", input=cut, check=False)
    assert done.returncode == 65, done.stderr.decode()
    assert not {LORA, "dpo.json"} & {path.name for path in (tmp_path / "cut").iterdir()}


def test_an_error_is_one_line_before_any_work(utilgen: Run, bundle: Path) -> None:
    done = utilgen("dpo", "-m", bundle, "-o", "out", "--loss", "best", input=b"", check=False)
    assert done.returncode == 2 and done.stdout == b""
    line = "utilgen: dpo: --loss best: unknown. Use one of dpo, ipo, kto.\n"
    assert done.stderr.decode() == line
    done = utilgen("dpo", "-m", bundle, "--init", "a.safetensors", "-o", "out", check=False)
    assert b"--init a.safetensors: no such file or directory. Make one with" in done.stderr


@pytest.mark.parametrize(
    ("settings", "code", "says"),
    [
        ({"reference": "previous"}, 2, "Add --init."),
        ({"reference": "x"}, 2, "Use one of base, previous."),
        ({"beta": 0.0}, 2, "--beta 0.0: must be positive."),
        ({"init": Path("nowhere")}, 66, "--init nowhere: is not there."),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], code: int, says: str) -> None:
    with pytest.raises(UtilgenError, match=re.escape(says)) as caught:
        PreferenceConfig("tiny", **settings)
    assert caught.value.exit_code == code


@pytest.mark.parametrize(
    ("options", "says"),
    [({"full": True, "rank": 4}, "--full of all weights"),
     ({"init": Path("a"), "rank": 4}, "--init has one of its own"),
     ({"desirable": "above:0"}, "is for --loss kto")],
)  # fmt: skip
def test_options_that_would_do_nothing_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        dpo(Path("out"), **options)


def test_schedules_and_optimisers_that_are_not_there() -> None:
    with pytest.raises(UsageError, match="Use one of adamw, adamw8bit"):
        FinetuneConfig(optimizer="lion")
    with pytest.raises(UsageError, match="must be positive"):
        FinetuneConfig(learning_rate=0.0)
    weights = [torch.nn.Parameter(torch.zeros(1))]
    with pytest.raises(UsageError, match="--schedule x: unknown"):
        schedule_factor(torch.optim.AdamW(weights), FinetuneConfig(schedule="x"))
    low = FinetuneConfig(learning_rate=1e-8, schedule="polynomial")
    with pytest.raises(UsageError, match=r"--schedule polynomial: lr_end .* Raise --lr"):
        schedule_factor(make_optimizer(weights, low), low)
    if importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises(UsageError, match="pip install bitsandbytes"):
            make_optimizer(weights, FinetuneConfig(optimizer="adamw8bit"))


@pytest.mark.parametrize("schedule", ["constant_with_warmup", "linear", "cosine", "polynomial"])
@pytest.mark.parametrize(("warmup", "expected"), [(0, 1.0), (4, 0.25), (10, 0.1), (20, 0.05)])
def test_the_warm_up_rises_from_the_first_step(schedule: str, warmup: int, expected: float) -> None:
    """No step is taken at a rate of 0, however long the warm-up is beside the run."""
    config = FinetuneConfig(steps=10, warmup=warmup, schedule=schedule)
    weights = [torch.nn.Parameter(torch.zeros(1))]
    factor = schedule_factor(make_optimizer(weights, config), config)
    factors = [factor(step) for step in range(10)]
    assert factors[0] == pytest.approx(expected)
    assert min(factors) > 0
    if 0 < warmup <= 10:
        assert factors[warmup - 1] == 1.0 == max(factors)


@pytest.mark.parametrize("per", ["dataset", "class"])
def test_what_lora_learns_with_class_tokens_can_be_drawn_with(
    per: str, utilgen: Run, bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "real.tar").write_bytes(tar_bytes(shots()))
    utilgen("invert", "real.tar", "-m", bundle, *QUICK, "-o", "tokens")
    utilgen(
        "lora", "real.tar", "-m", bundle, "--tokens", "tokens", "--per", per, *QUICK, "-o", "lora"
    )
    drawing = ["generate", "-m", bundle, "--tokens", "tokens", "--adapter", "lora", "--steps", "1"]
    assert utilgen(*drawing, "-q", "-o", "drawn").returncode == 0
    assert (tmp_path / "drawn" / "00000.tar").exists()


def test_a_model_that_changed_under_its_name_is_another_one(
    utilgen: Run, bundle: Path, tmp_path: Path
) -> None:
    drawing = ["generate", "-m", bundle, "--steps", "1", "-q", "-o", "drawn"]
    utilgen(*drawing)
    weights = bundle / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-2] ^= 1
    weights.write_bytes(data)
    done = utilgen(*drawing, check=False)
    assert done.returncode == 2 and b"model files contents was" in done.stderr


def test_a_signal_saves_and_the_same_command_goes_on(
    utilgen: Run, commands: Path, bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "pairs.tar").write_bytes(tar_bytes(pairs(16)))
    arguments = ["dpo", "pairs.tar", "-m", str(bundle), "--steps", "60", "--batch-size", "2"]
    utilgen(*arguments, "-o", "whole")
    command = [commands / "utilgen", *arguments, "-o", "stopped"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    while "dpo: 0/60" not in process.stderr.readline():
        pass
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 75, said
    assert "SIGTERM" in said and "Run the same command again" in said
    assert (tmp_path / "stopped" / "checkpoint.safetensors").exists()
    assert not (tmp_path / "stopped" / "dpo.json").exists()
    utilgen(*arguments, "-o", "stopped")
    assert (tmp_path / "stopped" / LORA).read_bytes() == (tmp_path / "whole" / LORA).read_bytes()


def test_lora_writes_what_dpo_begins_from(utilgen: Run, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "real.tar").write_bytes(tar_bytes(shots()))
    done = utilgen("lora", "real.tar", "-m", bundle, *QUICK, "-o", "lora")
    assert done.stdout == b"lora\n" and b"6 images of 3 classes" in done.stderr
    assert json.loads((tmp_path / "lora" / "lora.json").read_text())["adapters"] == ["."]
    stream = tar_bytes(pairs(4))
    utilgen("dpo", "-m", bundle, "--init", "lora", *QUICK, "-o", "dpo", input=stream)
    drawn = utilgen("generate", "-m", bundle, "--adapter", "dpo", "--steps", "2")
    assert drawn.stdout.count(b".png") == len(CLASSES)
