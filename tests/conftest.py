"""What tests share: the quick samples, the command line, and quiet threads."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import numpy as np
import pytest

from utilgen_cli.runtime.files import encode_json
from utilgen_cli.shards.images import encode_image
from utilgen_cli.shards.sample import Sample
from utilgen_cli.shards.writer import write_tar

from .preloaded import preloaded

# The suite draws the same examples every time, so that red means a change. To look for new ones:
# HYPOTHESIS_PROFILE=search pytest
hypothesis.settings.register_profile("suite", derandomize=True, deadline=None)
hypothesis.settings.register_profile("search", max_examples=2000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))

ROOT = Path(__file__).parents[1]
DATA = ROOT / "examples" / "data"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def make_sample(number: int, label: int = 0, size: int = 8, **facts: object) -> Sample:
    """A sample with a small random picture."""
    rgb = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
    members = {
        "png": encode_image(rgb),
        "cls": str(label).encode(),
        "json": encode_json({"class_name": f"class {label}", **facts}),
    }
    return Sample(f"{label:04d}-{number:06d}", members)


def tar_bytes(samples: Iterable[Sample]) -> bytes:
    """The samples as one tar."""
    out = io.BytesIO()
    write_tar(samples, out)
    return out.getvalue()


def flip_last_byte(path: Path) -> None:
    """Other weights of the same size."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


Run = Callable[..., subprocess.CompletedProcess[bytes]]


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory for PATH whose `utilgen` starts at once."""
    with preloaded(tmp_path_factory.mktemp("preloaded")) as directory:
        yield directory


@pytest.fixture
def utilgen(tmp_path: Path, commands: Path) -> Run:
    """Run `utilgen ARGS...` in the test's directory; stdin is empty unless `input` is given."""

    def run(
        *args: object, check: bool = True, **kwargs: object
    ) -> subprocess.CompletedProcess[bytes]:
        command = [str(commands / "utilgen"), *map(str, args)]
        kwargs = {"input": b"", "cwd": tmp_path, **kwargs}
        done = subprocess.run(command, capture_output=True, **kwargs)  # type: ignore[call-overload]
        if check and done.returncode:
            raise AssertionError(f"{command} exited {done.returncode}: {done.stderr.decode()}")
        return done

    return run


@pytest.fixture
def bash(tmp_path: Path) -> Run:
    """Run a script under `bash -o pipefail` with the installed `utilgen` on the PATH."""

    def run(script: str, **kwargs: object) -> subprocess.CompletedProcess[bytes]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        env = {**os.environ, "PATH": path, **kwargs.pop("env", {})}  # type: ignore[arg-type,dict-item]
        return subprocess.run(  # type: ignore[call-overload]
            ["bash", "-o", "pipefail", "-c", script], capture_output=True, cwd=tmp_path, env=env,
            **kwargs,
        )  # fmt: skip

    return run
