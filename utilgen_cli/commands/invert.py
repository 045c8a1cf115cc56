"""`utilgen invert`: a token a class, or several whole prompts, from the few real images."""

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
    adapter: o.Adapters = None,
    vectors: Annotated[int, typer.Option(min=1, max=8, help="Embeddings a token.")] = 1,
    population: Annotated[
        int,
        typer.Option(
            min=0,
            help="Learn so many whole prompts a class, not a token: a policy, for generate "
            "--policy and ilpo --init.",
        ),
    ] = 0,
    classes: o.Classes = None,
    steps: t.Steps = 300,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--lr",
            help="Learning rate of AdamW; of prompts relative to their RMS. Default: 0.01 for "
            "tokens, 0.02 for prompts.",
            show_default=False,
        ),
    ] = None,
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

    With --population whole prompts, each learnt from its own share of the class's images:

    utilgen invert real/ -m tiny --population 4 --batch-size 64 -o prompts/
    """
    from ..diffusion.bundle import parse_classes
    from ..diffusion.finetune_config import FinetuneConfig
    from ..diffusion.inversion import INDEX, InversionConfig, invert_tokens
    from ..diffusion.prompt_inversion import DONE, invert_prompts
    from ..runtime.errors import UsageError

    if population and vectors > 1:
        raise UsageError(f"--vectors {vectors}", "are of tokens", "Leave it out, or --population.")
    if learning_rate is None:
        learning_rate = 2e-2 if population else 1e-2
    finetune = FinetuneConfig(
        steps, batch_size, learning_rate, schedule,
        weight_decay=0.0, gradient_accumulation=accumulation, ema=ema, seed=seed,
    )  # fmt: skip
    names = parse_classes(classes)
    summary = t.train_command(
        "invert", invert_prompts if population else invert_tokens, DONE if population else INDEX,
        lambda name: InversionConfig(name, vectors, population, names, flip, checkpointing,
                                     tuple(adapter or ()), t.smoked(finetune, smoke)),
        shards=shards, model=model, output=output, device=device, precision=precision,
        overwrite=overwrite, quiet=quiet, aside=quarantine_of(on_error),
    )  # fmt: skip
    learnt = f"{population} prompts for each of {len(summary['classes'])} classes"
    learnt = learnt if population else f"{len(summary['classes'])} tokens"
    line = "{loss_before:.4f} -> {loss_after:.4f}".format(**summary)
    t.finish(output, summary, as_json, quiet, [f"{learnt}: denoising loss {line}"])
