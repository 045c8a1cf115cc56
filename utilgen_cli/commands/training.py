"""Options that `dpo` and `lora` share, and the frame in which both run."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..runtime.errors import UsageError
from ..shards.operands import STDIN, Source, open_source
from ..shards.sample import Sample
from .quarantining import tell

if TYPE_CHECKING:
    from ..diffusion.finetune_config import FinetuneConfig
    from ..shards.quarantine import Quarantine

Rank = Annotated[int, typer.Option("--rank", min=1, help="Rank of the LoRA adapter.")]
Steps = Annotated[int, typer.Option("--steps", min=1, help="Optimiser steps.")]
LearningRate = Annotated[
    float, typer.Option("--lr", help="Learning rate of AdamW; 1e-4 or less for Stable Diffusion.")
]
BatchSize = Annotated[
    int, typer.Option("--batch-size", min=1, help="Pairs (lora: images) a batch and process.")
]
Warmup = Annotated[int, typer.Option("--warmup", min=0, help="Steps of linear warm-up.")]
Accumulation = Annotated[
    int, typer.Option("--gradient-accumulation", min=1, help="Batches an optimiser step.")
]
Checkpointing = Annotated[
    bool, typer.Option("--gradient-checkpointing", help="Less memory for about a third more time.")
]
Flip = Annotated[bool, typer.Option("--flip", help="Train on mirror images too.")]
Ema = Annotated[
    float | None, typer.Option("--ema", min=0.0, max=0.99999, help="Decay of averaged weights.")
]
Optimizer = Annotated[str, typer.Option("--optimizer", help="adamw, or adamw8bit (bitsandbytes).")]
Schedule = Annotated[
    str, typer.Option("--schedule", help="constant_with_warmup, cosine, linear, ... (diffusers).")
]

SMOKE_STEPS, SMOKE_BATCH = 4, 4
Train = Callable[..., dict[str, Any]]


def model_of(model: str | None, source: Source) -> tuple[str, Iterable[Sample]]:
    """The named model, or else the one that drew the first sample; and all the samples."""
    samples: Iterator[Sample] = source.samples()
    if model is not None:
        return model, samples
    first = next(samples, None)
    named = first.facts.get("model") if first is not None else None
    if not isinstance(named, str):
        raise UsageError("-m", "no model is named, and the input names none", "Add e.g. -m tiny.")
    return named, chain([first], samples)  # type: ignore[list-item]


def smoked(config: FinetuneConfig, smoke: bool) -> FinetuneConfig:
    """With --smoke a trial of the works: a few steps."""
    if not smoke:
        return config
    steps, batch_size = min(config.steps, SMOKE_STEPS), min(config.batch_size, SMOKE_BATCH)
    return replace(config, steps=steps, batch_size=batch_size)


def train_command(
    command: str,
    train: Train,
    marker: str,
    make_config: Callable[[str], Any],
    *,
    shards: list[str] | None,
    model: str | None,
    output: Path,
    device: str | None,
    precision: str | None,
    overwrite: bool,
    quiet: bool,
    aside: Quarantine,
) -> dict[str, Any]:
    """Open the input, run `train` in the output directory unless it is done, return its summary.

    `make_config` gets the model's name; its result is what the directory is made with.
    """
    from ..diffusion.bundle import model_files
    from ..runtime.device import pick_device, pick_dtype
    from ..runtime.progress import reporter
    from .streams import tell_not_compared

    where = pick_device(device)
    source = open_source(shards, aside)
    name, samples = model_of(model, source)
    config = make_config(name)
    settings = {**asdict(config), "input": list(source.paths), "precision": precision,
                "model files": model_files(name), **aside.settings()}  # fmt: skip
    work = {"device": where, "dtype": pick_dtype(precision, where), "progress": reporter(quiet)}
    worked = []

    def run(path: Path) -> dict[str, Any]:
        worked.append(path)
        return train(samples, path, config, **work)

    summary = _in_directory(output, command, settings, marker, overwrite, run)
    if source.is_stdin:
        deque(samples, maxlen=0)  # a run that was done already lets its upstream end as well
        if not worked:
            tell_not_compared(command, output)
    tell(aside, command)
    return summary | aside.summary()


def _in_directory(
    output: Path,
    command: str,
    settings: dict[str, Any],
    marker: str,
    overwrite: bool,
    work: Callable[[Path], dict[str, Any]],
) -> dict[str, Any]:
    """Under torchrun only the first process owns the directory."""
    import torch.distributed as dist

    from ..runtime.distributed import init
    from ..runtime.output import OutputDirectory

    rank, processes = init()
    if processes > 1 and settings["input"] == [STDIN]:
        raise UsageError("SHARDS", "several processes cannot share a pipe", "Name shards.")
    if rank:
        dist.barrier()  # until the first process holds the directory
        found = _result(output / marker) or work(output)
        dist.barrier()  # until it has written the result
        return _result(output / marker) or found
    with OutputDirectory(output, command, settings, overwrite) as out:
        done = out.is_done(marker)
        if processes > 1:
            dist.barrier()
        found = (_result(out.path / marker) if done else None) or work(out.path)
        if processes > 1:
            dist.barrier()
        return found


def _result(path: Path) -> dict[str, Any] | None:
    """What a finished run wrote last."""
    import json

    return json.loads(path.read_text()) if path.exists() else None


def finish(
    output: Path, summary: dict[str, Any], as_json: bool, quiet: bool, lines: list[str]
) -> None:
    """The directory (or the summary as JSON) on stdout, what to know on stderr; once a run."""
    from ..runtime.distributed import world
    from ..runtime.stdout import say
    from .streams import report

    if world()[0]:
        return
    for line in [] if quiet else lines:
        report({}, False, line)
    if as_json:
        report(summary, True, "", to_stdout=True)
    else:
        say(str(output))
