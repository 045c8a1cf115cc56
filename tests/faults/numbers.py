"""Numbers: a NaN or an infinity in a loss never reaches a checkpoint, a model or a shard.

Injected by real means: weights of a model file, or a learning rate that no training survives.
`torn`: checkpoints that were cut or flipped; the run goes on from the one before to the same bits.
"""

from __future__ import annotations

import math
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file

from utilgen_cli.runtime.checkpoint import load_checkpoint
from utilgen_cli.shards.operands import read_path

from .registry import Options, campaign, record
from .runs import DATA, Runs, _fill, _split
from .shell import Kept, begin, table, utilgen

TINY = Path(__file__).parents[2] / "utilgen_cli" / "tiny"
WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    "clip": "open_clip/open_clip_model.safetensors",
}
LINES = {
    "generate": "generate -m {model} --per-class 1 --steps 2 -o {out}",
    "invert": "invert {real} -m {model} --smoke -o {out}",
    "lora": "lora {real} -m {model} --smoke -o {out}",
    "dpo": "dpo {pairs} -m {model} --smoke -o {out}",
    "ilpo": "ilpo -m {model} --value {value} --smoke -o {out}",
    "value train": "value train --real {real} --arch open_clip:{model}/open_clip --steps 10 -o {out}",
    "value score": "value score {generate} --value {hurt} --force -o {out}",
    "eval": "eval --real {real} --synthetic base={generate} --test {val} --seeds 1 --steps 10 -o {out}",
}  # fmt: skip
TRIALS = [
    *((command, f"NaN in {part}") for command in ("generate", "invert", "lora", "dpo", "ilpo")
      for part in ("unet", "vae", "text_encoder")),
    ("generate", "inf in unet"), ("generate", "inf in vae"),
    ("value train", "NaN in clip"), ("ilpo", "NaN in clip"),
    ("value score", "NaN in the value model"), ("ilpo", "NaN in the value model"),
    ("invert", "--lr 1e30"), ("lora", "--lr 1e30"), ("dpo", "--lr 1e30"), ("eval", "--lr 1e30"),
    ("value train", "rate 1e30"), ("value train", "rate 1e30, checkpoint each step"),
    ("dpo", "--lr 1e30, checkpoint each step"), ("dpo", "--precision fp16 --lr 1e30"),
]  # fmt: skip


def poison(file: Path, value: float) -> None:
    """Put `value` into the middle of every float tensor of a safetensors file.

    A table of token embeddings is passed over: most of its rows are never used.
    """
    with safe_open(file, framework="pt") as f:
        metadata = f.metadata()
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and "token_embedding" not in name:
            flat = tensor.flatten().clone()
            flat[len(flat) // 2] = value
            tensors[name] = flat.view_as(tensor)
    save_file(tensors, file, metadata)


def poisoned_bundle(work: Path, how: str) -> Path:
    """The shipped model with one bad weight, for "NaN in unet"; itself where nothing is said."""
    value, _, part = how.partition(" in ")
    if part not in WEIGHTS:
        return TINY
    path = work / "bundle"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(TINY, path)
    poison(path / WEIGHTS[part], float(value))
    return path


def poisoned_value(work: Path, whole: Path, how: str) -> Path:
    """The value model, with one bad weight where `how` says so."""
    if "value model" not in how:
        return whole
    path = work / "hurt-value"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(whole, path)
    poison(sorted(path.rglob("classifier*.safetensors"))[-1], math.nan)
    return path


def before(how: str) -> Callable[[], None]:
    """What the process does first: a rate that no option sets, checkpoints without waiting."""

    def change() -> None:
        from utilgen_cli.diffusion import finetune
        from utilgen_cli.valuation import todv

        if "each step" in how:
            finetune.SAVE_EVERY = todv.SAVE_EVERY = 0.0
        if how.startswith("rate"):
            todv.learning_rate = lambda step, config: 1e30

    return change


def not_finite(directory: Path) -> list[str]:
    """Files of the output that hold a NaN or an infinity."""
    found = []
    for path in (p for p in directory.rglob("*") if p.is_file()):
        if path.suffix == ".safetensors" or ".safetensors" in path.name:
            data = path.read_bytes()
            tensors = load(data[:-32] if "checkpoint" in path.name else data)
            if any(t.is_floating_point() and not torch.isfinite(t).all() for t in tensors.values()):
                found.append(path.name)
        if path.suffix == ".json" and any(word in path.read_text() for word in ("NaN", "Infinity")):
            found.append(path.name)
    return found


def finished(directory: Path) -> list[str]:
    """What a user would take for a result: shards with samples, markers that are written last."""
    markers = ("index.json", "lora.json", "dpo.json", "value.json", "policy.json")
    found = [p.name for p in directory.rglob("*.json") if p.name in markers]
    shards = [p for p in directory.glob("*.tar") if any(True for _ in read_path(p))]
    return found + [p.name for p in shards]


def trial(runs: Runs, work: Path, command: str, how: str) -> list[object]:
    """(exit code, one line, files that hold non-finite numbers, results)."""
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    value = poisoned_value(work, runs.whole("value train"), how)
    places = {"out": out, "real": DATA / "real", "val": DATA / "val", "model": poisoned_bundle(work, how),
              "pairs": runs.whole("pairs"), "generate": runs.whole("generate"), "value": value,
              "hurt": value}  # fmt: skip
    words = [_fill(word, places) for word in _split(LINES[command])]
    options = how.partition(",")[0].split() if how.startswith("--") else []
    done = utilgen([*words, *options, "-q"], before=before(how))
    line = done.line if done.clean else done.said[-300:]
    if not out.exists():
        return [done.code, done.clean, line, [], []]
    return [done.code, done.clean, line, not_finite(out), finished(out)]


@campaign("numbers", runs=1)
def numbers(options: Options) -> str:
    """NaN and infinity in every command that computes."""
    runs, kept = Runs((options.work / "runs").resolve()), Kept(options.work / "numbers.json")
    for need in ("pairs", "value train"):
        runs.ready(need)
    for command, how in TRIALS:
        name = f"{command}: {how}"
        if name not in kept.rows and (not options.only or command in options.only):
            kept.add(name, trial(runs, options.work, command, how))
    rows = [
        [name, code, "yes" if clean else "NO", ", ".join(bad) or "none", ", ".join(left) or "none",
         line.partition(": ")[2].replace(str(options.work), "WORK")[:110]]
        for name, (code, clean, line, bad, left) in kept.rows.items()
    ]  # fmt: skip
    head = ("command and injection", "exit", "one line", "files that hold NaN or inf",
            "results that look finished", "said")  # fmt: skip
    return table(head, rows)


TORN = {"dpo": 14, "lora": 12, "invert": 12, "value train": 12}


def with_two_checkpoints(runs: Runs, name: str, work: Path) -> Path:
    """The output of a run that was killed when it had a checkpoint and one before it."""
    out = work / f"two-{name}".replace(" ", "-")
    if not out.exists():
        half = out.with_name(f"{out.name}-half")
        shutil.rmtree(half, ignore_errors=True)
        words = runs.words(name, half)
        pid = begin(words, work / "null", work / "said", before=before("each step"))
        _run_until(pid, [half / "checkpoint.safetensors", half / "checkpoint.safetensors.previous"])
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        half.rename(out)
    return out


def _run_until(pid: int, files: list[Path]) -> None:
    """Stop the process in a moment when all `files` are there."""
    while True:
        time.sleep(0.001)
        if all(path.exists() for path in files):
            os.kill(pid, signal.SIGSTOP)
            if all(path.exists() for path in files):
                return
            os.kill(pid, signal.SIGCONT)


def tear(path: Path, rng: random.Random) -> str:
    """Cut or flip a checkpoint at a random place."""
    data = bytearray(path.read_bytes())
    if rng.random() < 0.5:
        at = rng.randrange(len(data))
        path.write_bytes(data[:at])
        return f"cut at {at} of {len(data)}"
    at = rng.randrange(len(data))
    data[at] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return f"flipped at {at} of {len(data)}"


def torn_run(runs: Runs, name: str, work: Path, rng: random.Random) -> list[object]:
    """(what was done, exit code of the rerun, files that differ from the undisturbed run's)."""
    two, out = with_two_checkpoints(runs, name, work), work / "torn"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(two, out)
    blow = tear(out / "checkpoint.safetensors", rng)
    assert load_checkpoint(out / "checkpoint.safetensors") is not None
    done = utilgen([*runs.words(name, out), "-q"])
    return [blow, done.code, runs.same(name, out) if done.code == 0 else done.line]


@campaign("torn", runs=0)
def torn(options: Options) -> str:
    """The newest checkpoint is cut or flipped: 50 times over all trainers."""
    runs, kept = Runs((options.work / "runs").resolve()), Kept(options.work / "torn.json")
    for name, wanted in TORN.items():
        if options.only and name not in options.only:
            continue
        runs.ready(name)
        for number in range(options.runs or wanted):
            if f"{name} {number}" not in kept.rows:
                rng = random.Random(f"{options.seed}/{name}/{number}")
                kept.add(f"{name} {number}", torn_run(runs, name, options.work, rng))
                record("torn", torn_table(kept))
    return torn_table(kept)


def torn_table(kept: Kept) -> str:
    """A row a trainer."""
    rows = []
    for name in TORN:
        mine = [row for key, row in kept.rows.items() if key.rpartition(" ")[0] == name]
        same = sum(code == 0 and not why for _, code, why in mine)
        cuts = sum(str(blow).startswith("cut") for blow, _, _ in mine)
        rows.append([name, cuts, len(mine) - cuts, f"{same} of {len(mine)}"])
    rows.append(["all", sum(int(r[1]) for r in rows), sum(int(r[2]) for r in rows),
                 f"{sum(int(r[3].split()[0]) for r in rows)} of {len(kept.rows)}"])  # fmt: skip
    head = ("trainer", "cut", "flipped", "same last bits after the rerun")
    return f"The newest of two checkpoints is hurt at a random place.\n\n{table(head, rows)}"
