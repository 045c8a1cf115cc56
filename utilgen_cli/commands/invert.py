"""`utilgen invert`: one token a class from the few real images."""

from __future__ import annotations

from typing import Annotated

import typer

from . import options as o
from . import training as t
from .quarantining import quarantine_of


def invert(
    output: o.ModelOutput,
    shards: o.Shards = None,
    model: o.Model = None,
    vectors: Annotated[int, typer.Option(min=1, max=8, help="Embeddings a token.")] = 1,
    classes: o.Classes = None,
    steps: t.Steps = 300,
    learning_rate: t.LearningRate = 1e-2,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a batch (and process).")] = 16,
    accumulation: t.Accumulation = 1,
    schedule: t.Schedule = "cosine",
    ema: t.Ema = None,
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
    """Learn a token for every class from its real images (textual inversion, all at once).

    Example: utilgen invert real/ -m tiny -o tokens/
    """
    from ..diffusion.bundle import parse_classes
    from ..diffusion.finetune_config import FinetuneConfig
    from ..diffusion.inversion import INDEX, InversionConfig, invert_tokens

    finetune = FinetuneConfig(
        steps, batch_size, learning_rate, schedule, weight_decay=0.0,
        gradient_accumulation=accumulation, ema=ema, seed=seed,
    )  # fmt: skip
    names = parse_classes(classes)
    summary = t.train_command(
        "invert", invert_tokens, INDEX,
        lambda name: InversionConfig(name, vectors, names, flip, checkpointing,
                                     t.smoked(finetune, smoke)),
        shards=shards, model=model, output=output, device=device, precision=precision,
        overwrite=overwrite, quiet=quiet, aside=quarantine_of(on_error),
    )  # fmt: skip
    before, after = summary["loss_before"], summary["loss_after"]
    line = f"{len(summary['classes'])} tokens: denoising loss {before:.4f} -> {after:.4f}"
    t.finish(output, summary, as_json, quiet, [line])
