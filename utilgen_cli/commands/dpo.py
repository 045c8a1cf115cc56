"""`utilgen dpo`: teach the generator to prefer the winners."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options as o
from . import training as t
from .quarantining import quarantine_of

Init = Annotated[Path | None, typer.Option(help="Begin from this result of `dpo` or `lora`.")]
Reference = Annotated[str, typer.Option(help="base (the model itself), or previous (the --init).")]
Loss = Annotated[
    str, typer.Option(help="dpo, ipo, or kto (each image by itself: scored samples do as well).")
]
Desirable = Annotated[
    str | None,
    typer.Option(help="Which scored samples kto wants: quantile:Q (the upper share of a class, and "
                 "the lower one not) or above:U (utility; above:0 is the sign). "
                 "Default: quantile:0.25."),
]  # fmt: skip
Beta = Annotated[
    float,
    typer.Option(help="Strength of the tie to the reference, a factor of squared errors: as in "
                 "diffusers' script, half of --beta_dpo in the authors' (5000 is 2500 here)."),
]  # fmt: skip
Rank = Annotated[int | None, typer.Option(min=1, help="Of LoRA. Default: 16, or that of --init.")]
Full = Annotated[
    bool,
    typer.Option("--full", help="Train the whole U-Net: costs a frozen second copy of it and "
                 "optimiser state for every weight, and writes a whole pipeline."),
]  # fmt: skip


def dpo(
    output: o.ModelOutput,
    shards: o.Shards = None,
    model: o.Model = None,
    tokens: o.Tokens = None,
    init: Init = None,
    reference: Reference = "base",
    loss: Loss = "dpo",
    beta: Beta = 2500.0,
    desirable: Desirable = None,
    rank: Rank = None,
    full: Full = False,
    steps: t.Steps = 200,
    learning_rate: t.LearningRate = 1e-3,
    batch_size: t.BatchSize = 16,
    accumulation: t.Accumulation = 1,
    warmup: t.Warmup = 20,
    schedule: t.Schedule = "constant_with_warmup",
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
    """Tune the generator on preference pairs (Diffusion-DPO), as LoRA or in full.

    Example: utilgen dpo pairs/ -m tiny --tokens tokens/ -o dpo/

    An eighth of the pairs is held out: training stops when the generator gets worse on both
    images of a pair, and the weights that do best on the held-out pairs are kept.
    """
    from ..diffusion.finetune_config import FinetuneConfig
    from ..diffusion.pair_data import check_judged
    from ..diffusion.preference_run import DONE, PreferenceConfig, outcome, train_preference
    from ..runtime.errors import UsageError

    if init is not None and rank is not None:
        raise UsageError("--rank", "--init has one of its own", "Leave one of them out.")
    if full and rank is not None:
        raise UsageError("--rank", "is of LoRA, --full of all weights", "Leave one of them out.")
    if loss != "kto" and desirable is not None:
        raise UsageError("--desirable", "is for --loss kto", "Add it, or leave this out.")
    finetune = FinetuneConfig(
        steps, batch_size, learning_rate, schedule, warmup, gradient_accumulation=accumulation,
        ema=ema, optimizer=optimizer, seed=seed,
    )  # fmt: skip
    summary = t.train_command(
        "dpo", train_preference, DONE,
        lambda name: PreferenceConfig(name, tokens, init, reference, loss, beta,
                                      desirable or "quantile:0.25",
                                      rank or 16, full, flip, checkpointing,
                                      t.smoked(finetune, smoke)),
        shards=shards, model=model, output=output, device=device, precision=precision,
        overwrite=overwrite, quiet=quiet, aside=quarantine_of(on_error, check_judged),
    )  # fmt: skip
    t.finish(output, summary, as_json, quiet, outcome(summary))
