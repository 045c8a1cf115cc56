"""The commands that campaigns hurt: how to start them, what they must leave, what they may not."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .outputs import digest

DATA = Path(__file__).parents[2] / "examples" / "data"
QUIET = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}


@dataclass
class Case:
    """A command line; {out} is its output, {real}, {val}, {test} and the names of `needs` inputs."""

    line: str
    needs: list[str] = field(default_factory=list)


CASES = {
    "pack": Case("pack {images} --shard-size 40 -o {out}"),
    "invert": Case("invert {real} -m {model} --steps 8 --batch-size 8 -o {out}"),
    "generate": Case("generate -m {model} --per-class 6 --steps 20 --shard-size 25 -o {out}"),
    "value train": Case(
        "value train --real {real} --synthetic {generate} --val {val} --size 16 --smoke -o {out}",
        ["generate"],
    ),
    "value score": Case(
        "value score {generate} --value {value train} --force -o {out}", ["generate", "value train"]
    ),
    "pairs": Case("pairs {value score} -o {out}", ["value score"]),
    "dpo": Case("dpo {pairs} -m {model} --steps 8 --batch-size 4 -o {out}", ["pairs"]),
    "lora": Case("lora {real} -m {model} --steps 8 --batch-size 8 -o {out}"),
    "ilpo": Case(
        "ilpo -m {model} --value {value train} --smoke --per-class 2 --shard-size 8 -o {out}",
        ["value train"],
    ),
    "eval": Case(
        "eval --real {real} --synthetic base={generate} --test {val} --seeds 2 --steps 10 "
        "--size 16 --batch-size 16 -o {out}",
        ["generate"],
    ),
    "check": Case("check {generate}", ["generate"]),
    "view": Case("view {value score} -o {out}/page.html", ["value score"]),
}


class Runs:
    """Starts the cases; undisturbed outputs lie in `work` and are made once, by `start`."""

    def __init__(self, work: Path, start: Callable[[list[str], Path], Child] | None = None) -> None:
        self.work, self.start = work, start or started
        work.mkdir(parents=True, exist_ok=True)
        self.errors = work / f"errors-{os.getpid()}"  # campaigns may share the directory

    def words(self, name: str, out: Path) -> list[str]:
        """The arguments of a case."""
        places = {name: self.work / name for name in ("images", "model")} | {"out": out}
        places |= {split: DATA / split for split in ("real", "val", "test")}
        places |= {need: self.whole(need) for need in CASES[name].needs}
        return [_fill(word, places) for word in _split(CASES[name].line)]

    def whole(self, name: str) -> Path:
        """Where the output of an undisturbed run lies."""
        return self.work / name.replace(" ", "-")

    def ready(self, name: str) -> float:
        """Run a case undisturbed, and what it needs, unless that is done; its CPU seconds."""
        for need in CASES[name].needs:
            self.ready(need)
        with (self.work / ".making").open("w") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)
            return self._made(name, self.work / f"{name}.seconds")

    def _made(self, name: str, marker: Path) -> float:
        if not marker.exists():
            if not (self.work / "model").exists():
                small_bundle(self.work / "model")
            if name == "pack":
                _picture_folder(self.work / "images")
            if name == "view":
                self.whole(name).mkdir(exist_ok=True)
            run = self.start(self.words(name, self.whole(name)), self.errors)
            assert run.wait(300) == 0, run.said
            marker.write_text(str(run.cpu_seconds))
        return float(marker.read_text())

    def fresh(self, name: str) -> Path:
        """An empty place for a run that will be hurt."""
        out = self.work / f"{name.replace(' ', '-')}-hurt-{os.getpid()}"
        shutil.rmtree(out, ignore_errors=True)
        if name == "view":
            out.mkdir()
        return out

    def same(self, name: str, out: Path) -> str:
        """Empty if `out` holds what an undisturbed run wrote, else the names that differ."""
        a, b = digest(out), digest(self.whole(name))
        return ", ".join(sorted(k for k in {**a, **b} if a.get(k) != b.get(k)))


def small_bundle(path: Path) -> None:
    """A diffusers bundle with random weights that knows the example's classes: it loads, draws and
    trains as any other does, in a tenth of the time."""
    from utilgen_cli import tiny

    from ..random_bundle import SIZE, make_bundle

    shipped = Path(tiny.__path__[0])
    known = json.loads((shipped / "utilgen.json").read_text())
    make_bundle(path, defaults=False)
    about = {"size": SIZE, "steps": 4, "guidance_scale": 3.0, "classes": known["classes"],
             "clip": str(shipped / "open_clip")}  # fmt: skip
    (path / "utilgen.json").write_text(json.dumps(about))


def _split(line: str) -> list[str]:
    """Words; a place such as {value train} is one."""
    return [w.replace("\0", " ") for w in line.replace("{value ", "{value\0").split()]


def _fill(word: str, places: dict[str, Path]) -> str:
    for name, path in places.items():
        word = word.replace("{" + name + "}", str(path))
    return word


def _picture_folder(folder: Path) -> None:
    """FOLDER/CLASS/N.png: the example's shots as a person has them."""
    from utilgen_cli.shards.operands import open_source

    for sample in open_source([str(DATA / "real")]).samples():
        path = folder / str(sample.facts["class_name"]).replace("/", "-") / f"{sample.key}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sample.image[1])


class Child:
    """A run under way: what can be done to it, and what is known of it once it has ended."""

    def __init__(self, pid: int, errors: Path) -> None:
        self.pid, self.errors = pid, errors
        self.code: int | None = None
        self.cpu_seconds = 0.0

    @property
    def running(self) -> bool:
        return self._poll() is None

    @property
    def said(self) -> str:
        """Its stderr."""
        return self.errors.read_text(errors="replace")

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def work_until(self, cpu_seconds: float) -> bool:
        """Wait until the run has used so much processor time; False if it ended before."""
        return self.until(lambda: self._used() >= cpu_seconds)

    def until(self, reached: Callable[[], bool]) -> bool:
        """Wait until `reached()`; False if the run ended before."""
        while self.running:
            if reached():
                return True
            time.sleep(0.005)
        return False

    def _used(self) -> float:
        """Seconds of processor time so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _poll(self) -> int | None:
        if self.code is None:
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
                self.cpu_seconds = usage.ru_utime + usage.ru_stime
        return self.code

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (code := self._poll()) is None:
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
                raise TimeoutError(f"still there after {timeout} s")
            time.sleep(0.01)
        return code


def started(
    words: list[str],
    errors: Path,
    stdin: int = subprocess.DEVNULL,
    stdout: int = subprocess.DEVNULL,
) -> Child:
    """`utilgen WORDS` as a user starts it."""
    with errors.open("wb") as said:
        popen = subprocess.Popen(
            [sys.executable, "-m", "utilgen_cli", *words], stdin=stdin, stdout=stdout, stderr=said,
            env={**os.environ, **QUIET}, start_new_session=True,
        )  # fmt: skip
    popen.returncode = 0  # `Child` waits for it
    return Child(popen.pid, errors)


def forked(words: list[str], errors: Path) -> Child:
    """The same in a fork of this process, which has imported everything: no seconds of imports."""
    warm()
    pid = os.fork()
    if pid == 0:
        _become(words, errors)
    return Child(pid, errors)


_warm: list[Callable[[], None]] = []


def warm() -> None:
    """Import all that commands import, and compute nothing: threads do not survive a fork."""
    if _warm:
        return
    os.environ.update(QUIET)
    import torch

    torch.set_num_threads(1)
    import open_clip  # noqa: F401
    import peft  # noqa: F401
    import scipy.stats  # noqa: F401
    import timm  # noqa: F401
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel  # noqa: F401
    from pydantic import BaseModel  # noqa: F401
    from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

    from utilgen_cli.app import main
    from utilgen_cli.classification import comparison  # noqa: F401
    from utilgen_cli.commands import joining, valuing  # noqa: F401
    from utilgen_cli.diffusion import inversion, preference_run  # noqa: F401
    from utilgen_cli.report import evaluation, view  # noqa: F401
    from utilgen_cli.valuation import training  # noqa: F401

    _warm.append(main)


def _become(words: list[str], errors: Path) -> None:
    """In the child: be `utilgen WORDS`, and never come back."""
    code = 70
    try:
        null, said = (
            os.open(os.devnull, os.O_RDWR),
            os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        )
        for source, target in ((null, 0), (null, 1), (said, 2)):
            os.dup2(source, target)
        sys.argv = ["utilgen", *words]
        _warm[0]()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(bool(end.code))
    finally:
        os._exit(code)
