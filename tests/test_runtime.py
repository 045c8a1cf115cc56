"""The edge of a run: settings, locks, checkpoints, seeds, errors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace

import pytest
import torch

from utilgen_cli.classification.batches import workers_for
from utilgen_cli.runtime import signals
from utilgen_cli.runtime.checkpoint import (
    load_checkpoint,
    optimizer_tensors,
    previous,
    restore_optimizer,
    save_checkpoint,
)
from utilgen_cli.runtime.device import pick_device
from utilgen_cli.runtime.distributed import buckets
from utilgen_cli.runtime.errors import Stopped, UsageError, UtilgenError
from utilgen_cli.runtime.output import OutputDirectory
from utilgen_cli.runtime.seeds import sample_generator

from .conftest import ROOT
from .largest import Largest


def test_the_same_settings_resume_and_others_are_refused_with_the_difference(
    tmp_path: Path,
) -> None:
    with OutputDirectory(tmp_path / "o", "dpo", {"steps": 3, "lr": 0.1}) as out:
        (out.path / "kept").write_text("x")
    with OutputDirectory(tmp_path / "o", "dpo", {"steps": 3, "lr": 0.1}):
        pass
    with pytest.raises(UsageError, match=r"steps was 3, now 4"):
        with OutputDirectory(tmp_path / "o", "dpo", {"steps": 4, "lr": 0.1}):
            pass
    with OutputDirectory(tmp_path / "o", "dpo", {"steps": 4}, overwrite=True) as out:
        assert not (out.path / "kept").exists()


def test_a_run_that_made_nothing_binds_no_later_one_to_its_settings(tmp_path: Path) -> None:
    with OutputDirectory(tmp_path / "o", "dpo", {"steps": 3}) as out:
        (out.path / ".00000.tar.journal").write_text("{}\n")
        (out.path / ".00000.tar.partial").write_bytes(b"")
    with OutputDirectory(tmp_path / "o", "dpo", {"steps": 4}) as out:
        assert not (out.path / ".00000.tar.journal").exists()
    with OutputDirectory(tmp_path / "o", "lora", {"steps": 4}):
        pass
    with OutputDirectory(tmp_path / "o", "dpo", {"steps": 4}) as out:
        pass
    (out.path / "checkpoint.safetensors").write_bytes(b"x")
    for command, why in (("dpo", "steps was 4, now 5"), ("lora", "was made by utilgen dpo")):
        with pytest.raises(UsageError, match=why):
            with OutputDirectory(tmp_path / "o", command, {"steps": 5}):
                pass


def test_a_part_that_made_nothing_binds_the_others_only_while_it_is_at_work(
    tmp_path: Path,
) -> None:
    def own(steps: int, part: str | None) -> OutputDirectory:
        return OutputDirectory(tmp_path / "o", "generate", {"steps": steps}, part=part)

    with own(3, "0/2"):
        pass
    with own(4, "1/2"):
        for _ in range(2):  # the refused one lets go, and the first still has its share
            with pytest.raises(UsageError, match="steps was 4, now 5") as refused, own(5, "0/2"):
                pass
            assert "remove the directory" in str(refused.value)
            assert "--overwrite" not in str(refused.value)
        with pytest.raises(UtilgenError, match="another process"), own(4, None):
            pass
        with own(4, "0/2"):
            pass
    with own(5, "0/2") as out:
        with pytest.raises(UtilgenError, match="another process"), own(5, None):
            pass
        with own(5, "1/2"):
            pass
        (out.path / "00000.tar").write_bytes(b"x")
    with pytest.raises(UsageError, match="steps was 5, now 6"), own(6, "0/2"):
        pass


def test_parts_of_a_new_array_that_start_together_agree_on_its_settings(tmp_path: Path) -> None:
    def start(number: int) -> int:
        settings = {"steps": number // 8}
        with OutputDirectory(tmp_path, "x", settings, part=f"{number % 8}/8"):
            barrier.wait()
            return number

    with ThreadPoolExecutor(8) as pool:
        for array in range(4):
            barrier = Barrier(8)
            numbers = range(8 * array, 8 * array + 8)
            assert list(pool.map(start, numbers)) == list(numbers)


def test_a_directory_of_somebody_else_is_neither_mixed_with_nor_emptied(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="did not write"):
        with OutputDirectory(tmp_path, "dpo", {}, overwrite=True):
            pass
    assert (tmp_path / "thesis.tex").exists()


def test_two_processes_cannot_write_one_directory_but_two_parts_can(tmp_path: Path) -> None:
    def own(part: str | None = None) -> OutputDirectory:
        return OutputDirectory(tmp_path / "o", "x", {}, part=part)

    with own():
        with pytest.raises(UtilgenError, match="another process"), own():
            pass
    with own("0/2"), own("1/2"):
        for again in ("1/2", None):
            with pytest.raises(UtilgenError, match="another process"), own(again):
                pass


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    script = (
        "import os, sys; from utilgen_cli.runtime.output import OutputDirectory\n"
        "OutputDirectory(sys.argv[1], 'x', {}).__enter__(); os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", script, tmp_path / "o"], check=False)
    assert killed.returncode == -signal.SIGKILL
    with OutputDirectory(tmp_path / "o", "x", {}) as out:
        assert out.path.exists()


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_torn_checkpoint_falls_back_to_the_one_before(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "checkpoint.safetensors"
    for step in (1, 2):
        save_checkpoint(path, {"w": torch.full((4,), float(step))}, {"step": step})
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes({"cut": data[:-9], "flip": data, "empty": b""}[damage])
    loaded = load_checkpoint(path)
    assert loaded is not None
    tensors, meta = loaded
    assert meta == {"step": 1} and tensors["w"].tolist() == [1.0] * 4
    previous(path).unlink()
    assert load_checkpoint(path) is None


def test_parts_that_start_in_the_same_moment_all_get_their_share(tmp_path: Path) -> None:
    def start(number: int) -> int:
        with OutputDirectory(tmp_path / str(number // 8), "x", {"a": 1}, part=f"{number % 8}/8"):
            return number

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(start, range(160))) == list(range(160))


def test_a_part_does_not_overwrite_the_others(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="other parts"):
        OutputDirectory(tmp_path, "x", {}, overwrite=True, part="0/2")


def test_leftovers_of_a_killed_run_are_no_foreign_files_and_go(tmp_path: Path) -> None:
    for name in (".settings.json.tmp", "00000.tar.tmp", "inner/.a.safetensors.tmp", "inner/a.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{")
    (tmp_path / "settings.json").write_text('{"command": "x"}')
    with OutputDirectory(tmp_path, "x", {}):
        left = sorted(p.name for p in tmp_path.rglob("*") if p.is_file())
    assert left == [".lock", ".lock-settings", "a.json", "settings.json"]


def test_what_can_be_written_as_it_lies_is_not_copied(tmp_path: Path) -> None:
    w = torch.arange(24)
    with Largest() as made:
        save_checkpoint(tmp_path / "one", {"w": w, "row": torch.ones(2, 3, dtype=w.dtype)[1]}, {})
    assert made.of[w.dtype] < 24
    tied = {"w": w, "same": w, "part": w[3:5], "turned": w.view(4, 6).T}
    save_checkpoint(tmp_path / "tied", tied, {})
    found = load_checkpoint(tmp_path / "tied")
    assert found is not None
    assert all(torch.equal(found[0][name], x) for name, x in tied.items())


def test_nan_never_reaches_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UtilgenError, match="not finite"):
        save_checkpoint(tmp_path / "c", {"w": torch.tensor([1.0, float("nan")])}, {})
    assert list(tmp_path.iterdir()) == []


def test_an_optimizer_goes_on_to_the_last_bit(tmp_path: Path) -> None:
    def run(weights: torch.Tensor, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            (weights * torch.arange(3.0) * step).sin().sum().backward()
            optimizer.step()

    straight = torch.ones(3, requires_grad=True)
    run(straight, torch.optim.AdamW([straight], 0.1), range(8))
    first = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.AdamW([first], 0.1)
    run(first, optimizer, range(4))
    save_checkpoint(tmp_path / "c", {"w": first.detach(), **optimizer_tensors(optimizer)}, {})
    tensors, _ = load_checkpoint(tmp_path / "c")  # type: ignore[misc]
    second = tensors["w"].clone().requires_grad_()
    optimizer = torch.optim.AdamW([second], 0.1)
    restore_optimizer(optimizer, tensors)
    run(second, optimizer, range(4, 8))
    assert torch.equal(straight, second)


def test_an_image_has_its_own_random_numbers() -> None:
    def draw(*key: int) -> list[float]:
        return torch.randn(3, generator=sample_generator(*key)).tolist()

    assert draw(0, 1, 2) == draw(0, 1, 2)
    assert len({tuple(draw(s, c, i)) for s in range(3) for c in range(3) for i in range(3)}) == 27


@pytest.fixture
def listening(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Our handlers, nothing received yet, and a command under way."""
    monkeypatch.setattr(signals, "_received", [])
    monkeypatch.setattr(signals, "_command", ["test"])
    before = {number: signal.getsignal(number) for number in signals.NUMBERS}
    signals.install()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_stop_signal_is_kept_where_the_work_asks(listening: None) -> None:
    with signals.deferred():
        signals.check()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.stop_requested()
        with pytest.raises(Stopped, match="SIGUSR1"):
            signals.check()


STOPS = pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGTERM, Stopped), (signal.SIGINT, KeyboardInterrupt)]
)


def stopped(number: int) -> None:
    """A signal that meets the run where it raises."""
    os.kill(os.getpid(), number)
    time.sleep(5)
    pytest.fail("went on")


@STOPS
def test_elsewhere_a_stop_signal_ends_the_command_at_once(
    listening: None, number: int, error: type[BaseException]
) -> None:
    with pytest.raises(error), signals.running("test"):
        try:
            stopped(number)
        except Exception:
            pytest.fail("a library that catches Exception holds the stop up")


@STOPS
def test_a_library_that_makes_an_error_of_a_stop_does_not_hide_it(
    listening: None, number: int, error: type[BaseException]
) -> None:
    """As safetensors does, and diffusers of that."""
    with pytest.raises(error), signals.running("test"):
        try:
            stopped(number)
        except signals.Interrupted:
            raise OSError("Unable to load weights from checkpoint file") from None


def test_an_error_after_a_signal_that_waits_is_told(listening: None) -> None:
    with pytest.raises(OSError, match="disk full"), signals.running("test"), signals.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        raise OSError("disk full")


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("os.kill(me, 15); time.sleep(0.5); os.kill(me, 15); time.sleep(60)", 75),
        ("os.kill(me, 2); time.sleep(0.5); os.kill(me, 2); time.sleep(60)", 130),
        ("os.kill(me, 10); time.sleep(60)", 75),  # no second signal: the grace time ends it
    ],
    ids=["TERM TERM", "INT INT", "deaf"],
)
def test_work_that_does_not_listen_is_left_in_time(script: str, code: int) -> None:
    words = f"""import os, time
from utilgen_cli.runtime import signals
signals.GRACE = 1.0
signals.install(); signals.watch()
me = os.getpid()
with signals.running("test"), signals.deferred():
    {script}"""
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, cwd=ROOT)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith(b"utilgen: test: SIG") and done.stderr.count(b"\n") == 1
    assert time.monotonic() - start < 30


def test_a_run_that_is_stopped_leaves_no_temporary_file(tmp_path: Path) -> None:
    """It ends without taking Python down, so what would be closed by that has to be closed before."""
    (tmp_path / "temporary").mkdir()
    code = f"""import os, sys
from utilgen_cli.app import main
from utilgen_cli.classification import data
data.IN_MEMORY, append = 1, data._Pixels.append
def hit(pixels, rgb):
    append(pixels, rgb)
    if pixels.bytes == 3 * rgb.nbytes:
        print(*os.listdir("temporary"), flush=True)
        os.kill(os.getpid(), 15)
data._Pixels.append = hit
sys.argv[1:] = "value train --smoke -q -o value --real {ROOT}/examples/data/real".split()
main()"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=tmp_path,
                          env={**os.environ, "TMPDIR": "temporary"})  # fmt: skip
    assert done.returncode == 75, done.stderr
    assert done.stdout.endswith(b".pixels\n")
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize(
    ("name", "environment", "seen", "taken"),
    [(None, {}, 2, "cuda:0"), ("cuda", {}, 2, "cuda:0"), ("cuda:1", {}, 2, "cuda:1"),
     (None, {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, 2, "cuda:1"),
     (None, {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "1"}, 1, "cuda:0"),
     (None, {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, 1, "cuda:1")],
)  # fmt: skip
def test_the_gpu_that_is_worked_on_is_the_current_one(
    monkeypatch: pytest.MonkeyPatch, name: str | None, environment: dict[str, str], seen: int,
    taken: str,
) -> None:  # fmt: skip
    """As torch would take it: a device without a number is none to set. (A launcher may show each
    process one GPU alone.)"""
    known: list[torch.device] = []

    def empty(*_: object, device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(device=torch.device("cuda", device.index or 0))

    def set_device(device: torch.device) -> None:
        assert device.index is not None
        known.append(device)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    device = pick_device(name)
    assert device.type == "cuda" and [str(d) for d in known] == [taken]


def test_an_error_is_one_terminal_safe_line() -> None:
    line = str(UtilgenError("a\x1b[31m\nb", "why", "Do this."))
    assert "\n" not in line and "\x1b" not in line
    assert line.endswith(": why. Do this.")


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_of_several_processes_the_first_one_tells_of_a_signal(rank: str, lines: int) -> None:
    code = "from utilgen_cli.runtime import signals; signals.leave(15, 'nothing was under way')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=False,
        env={**os.environ, "RANK": rank, "WORLD_SIZE": "2"},
    )  # fmt: skip
    assert (done.returncode, done.stderr.count(b"\n")) == (75, lines)


def test_gradients_travel_together_in_order() -> None:
    tensors = [torch.zeros(n) for n in (3, 5, 20, 2, 8, 1)]
    assert [[t.numel() for t in b] for b in buckets(tensors, 10)] == [[3, 5], [20], [2, 8], [1]]
    assert buckets([]) == [] and len(buckets([torch.zeros(0)])) == 1


@pytest.mark.parametrize(("environment", "expected"), [
    ({}, 8), ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}, 4), ({"LOCAL_WORLD_SIZE": "4"}, 8),
    ({"WORLD_SIZE": "64", "LOCAL_WORLD_SIZE": "32"}, 1)])  # fmt: skip
def test_the_processes_of_a_machine_share_its_cores(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: int
) -> None:
    monkeypatch.setattr("utilgen_cli.classification.batches.cores", lambda: 16)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert workers_for("crop", gpu) == expected
    assert workers_for("crop", cpu) == workers_for("pad", gpu) == workers_for("crop", gpu, 0) == 0
