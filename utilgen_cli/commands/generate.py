"""`utilgen generate`: draw images of every class."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from . import options as o


def generate(
    model: o.Model = None,
    tokens: o.Tokens = None,
    adapter: o.Adapters = None,
    policy: Annotated[
        Path | None,
        typer.Option("--policy", help="Learnt prompts, of `invert --population` or `ilpo`."),
    ] = None,
    per_class: o.PerClass = 1,
    start: o.Start = 0,
    steps: o.SamplingSteps = None,
    guidance_scale: o.GuidanceScale = None,
    sampler: Annotated[
        str, typer.Option(help="ddim, or for few steps (10 or so) dpm++ or unipc.")
    ] = "ddim",
    classes: o.Classes = None,
    prompt: Annotated[
        str | None, typer.Option(help="Prompt, {} is the class. Default: 'a photo of a {}'.")
    ] = None,
    batch_size: o.BatchSizeDrawn = None,
    compile: o.Compile = False,
    format: Annotated[str, typer.Option(help="png, webp (lossless) or jpg.")] = "png",
    output: o.StreamOutput = "-",
    shard_size: o.ShardSize = 1000,
    part: o.Part = None,
    seed: o.Seed = 0,
    device: o.Device = None,
    precision: o.Precision = None,
    smoke: o.Smoke = False,
    overwrite: o.Overwrite = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Draw images of every class, each from its own seed.

    Example: utilgen generate -m tiny --tokens tokens/ --per-class 80 -o synth/
    """
    from .streams import plan_items, refuse_terminal, report, run_source

    refuse_terminal(output)
    from ..diffusion.bundle import parse_classes
    from ..diffusion.generate import (
        GenerateConfig,
        LazyGenerator,
        known_classes,
        model_named,
        warnings_of,
    )
    from ..runtime.progress import reporter

    per_class, steps = (min(per_class, 2), min(steps or 4, 4)) if smoke else (per_class, steps)
    config = GenerateConfig(
        model_named(model, tokens), seed, tokens, tuple(adapter or ()), policy,
        parse_classes(classes), prompt, steps, guidance_scale, sampler, batch_size, format,
        compile,
    )  # fmt: skip
    plan = plan_items(len(known_classes(config)), per_class, start)
    config = replace(config, images=len(plan))
    generator = LazyGenerator(config, device, precision, reporter(quiet))
    for line in [] if quiet else warnings_of(config, generator.dtype):
        report({}, False, f"generate: {line}")
    settings = {
        **config.settings(),
        "precision": precision,
        "per_class": per_class,
        "start": start,
        "shard_size": shard_size,
    }
    run_source(generator.draw, plan, output, "generate", settings, overwrite, shard_size, part,
               generator.about)  # fmt: skip
    report(generator.summary(), as_json, "" if quiet else generator.line())
