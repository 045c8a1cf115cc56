"""`utilgen lora`: adapt the generator to the few real shots (DataDream)."""

from __future__ import annotations

from typing import Annotated

import typer

from . import options as o
from . import training as t
from .quarantining import quarantine_of

Per = Annotated[str, typer.Option(help="dataset: one adapter; class: a folder with one a class.")]


def lora(
    output: o.ModelOutput,
    shards: o.Shards = None,
    model: o.Model = None,
    tokens: o.Tokens = None,
    per: Per = "dataset",
    rank: t.Rank = 16,
    steps: t.Steps = 400,
    learning_rate: t.LearningRate = 1e-4,
    batch_size: t.BatchSize = 16,
    accumulation: t.Accumulation = 1,
    warmup: t.Warmup = 0,
    schedule: t.Schedule = "cosine",
    ema: t.Ema = None,
    optimizer: t.Optimizer = "adamw",
    flip: t.Flip = False,
    checkpointing: t.Checkpointing = False,
    precision: o.Precision = None,
    device: o.Device = None,
    seed: o.Seed = 0,
    smoke: o.Smoke = False,
    on_error: o.OnError = "stop",
    overwrite: o.Overwrite = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Adapt U-Net and text encoder to the few real shots (DataDream's recipe), as LoRA.

    Example: utilgen lora real/ -m tiny -o lora/
    """
    from ..diffusion.datadream import DONE, LoraConfig, train_lora
    from ..diffusion.finetune_config import FinetuneConfig

    finetune = FinetuneConfig(
        steps, batch_size, learning_rate, schedule, warmup, gradient_accumulation=accumulation,
        ema=ema, optimizer=optimizer, seed=seed,
    )  # fmt: skip
    summary = t.train_command(
        "lora", train_lora, DONE,
        lambda name: LoraConfig(name, tokens, rank, per, flip, checkpointing,
                                t.smoked(finetune, smoke)),
        shards=shards, model=model, output=output, device=device, precision=precision,
        overwrite=overwrite, quiet=quiet, aside=quarantine_of(on_error),
    )  # fmt: skip
    line = f"adapted to {summary['images']} images of {summary['classes']} classes"
    t.finish(output, summary, as_json, quiet, [line])
