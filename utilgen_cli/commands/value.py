"""`utilgen value train` and `utilgen value score`: learn and apply how useful a sample is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import (
    Device,
    Json,
    ModelOutput,
    OnError,
    Overwrite,
    Part,
    Quiet,
    Seed,
    Shards,
    Smoke,
    StreamOutput,
    Value,
    Verbose,
)

Force = Annotated[bool, typer.Option("--force", help="Use a value model that failed its canary.")]


def train(
    real: Annotated[list[str], typer.Option("--real", help="Real shards; may repeat.")],
    output: ModelOutput,
    synthetic: Annotated[
        list[str] | None, typer.Option("--synthetic", help="Generated shards; may repeat.")
    ] = None,
    val: Annotated[
        list[str] | None,
        typer.Option("--val", help="More real shards; may repeat. Default: --real alone."),
    ] = None,
    arch: Annotated[
        str, typer.Option(help="small-cnn, a timm name, open_clip:NAME-or-DIR, open_clip-lora:...")
    ] = "small-cnn",
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Start from timm's weights.")
    ] = False,
    size: Annotated[
        int | None, typer.Option(min=8, help="Pixels a side. Default: the images', at most 224.")
    ] = None,
    steps: Annotated[int, typer.Option(min=10, help="Steps of each classifier.")] = 400,
    folds: Annotated[
        int, typer.Option(min=1, help="Classifiers, each without its fold; 1: in-sample losses.")
    ] = 5,
    snapshots: Annotated[
        int,
        typer.Option(min=1, max=100, help="Points of the trajectory: --passes averages over them."),
    ] = 3,
    meta_gradient: Annotated[
        str, typer.Option(help="jvp, or exact-double: the same by double backward, to check.")
    ] = "jvp",
    meta_every: Annotated[
        int, typer.Option(min=1, help="Steps per step of the weight network.")
    ] = 3,
    weight_lr: Annotated[
        float, typer.Option(min=1e-6, max=1e-3, help="Adam rate of the weight network.")
    ] = 1e-3,
    augment: Annotated[
        str,
        typer.Option(
            help="Of training images: none, shift, pad (and mirror) or affine (and turn)."
        ),
    ] = "pad",
    seed: Seed = 0,
    device: Device = None,
    smoke: Smoke = False,
    on_error: OnError = "stop",
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Learn the value of samples: a few-shot classifier and a weight network (TODV).

    Example: utilgen value train --real real/ --synthetic synth/ --val val/ -o value/

    Images of --real and --val take both roles in turn: each classifier learns from some folds and
    is judged on the one held out. The canary (real images under wrong labels) says how well
    wrong labels are told; on generated images, which look otherwise, expect less.
    """
    from ..classification.models import refuse_pretrained
    from ..runtime.device import pick_device
    from ..runtime.progress import reporter
    from ..valuation.todv import ValueConfig
    from .quarantining import quarantine_of, tell
    from .training import finish
    from .valuing import smoke_config, train_into, train_lines

    refuse_pretrained([arch], pretrained)
    config = ValueConfig(
        arch=arch, pretrained=pretrained, steps=steps, folds=folds, snapshots=snapshots,
        meta_gradient=meta_gradient, meta_every=meta_every, weight_lr=weight_lr, augment=augment,
    )  # fmt: skip
    config = smoke_config(config) if smoke else config
    aside = quarantine_of(on_error)
    facts = train_into(
        output, config, {"real": real, "synthetic": synthetic or [], "val": val or []}, size,
        seed, pick_device(device), overwrite, reporter(quiet), aside,
    )  # fmt: skip
    tell(aside, "value train")
    finish(output, facts | aside.summary(), as_json, quiet, train_lines(facts))


def score(
    shards: Shards = None,
    value: Value = Path("value"),
    output: StreamOutput = "-",
    method: Annotated[
        str, typer.Option(help="weight-net, loss (GAP), knn-shapley or influence (TracIn).")
    ] = "weight-net",
    select: Annotated[
        int | None, typer.Option(min=1, help="Pass on only so many: useful, and unlike each other.")
    ] = None,
    agreed: Annotated[
        bool,
        typer.Option(
            "--agreed", help="Pass on only what the value model assigns to its own label."
        ),
    ] = False,
    lookahead: Annotated[
        bool, typer.Option("--lookahead", help="Also value the input as a set.")
    ] = False,
    real: Annotated[
        list[str] | None, typer.Option("--real", help="Real shards, for --lookahead; may repeat.")
    ] = None,
    val: Annotated[
        list[str] | None, typer.Option("--val", help="Validation shards, for --lookahead.")
    ] = None,
    passes: Annotated[
        int, typer.Option(min=1, help="Classifiers asked per sample; 2 or more may disagree.")
    ] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a batch.")] = 256,
    part: Part = None,
    device: Device = None,
    force: Force = False,
    on_error: OnError = "stop",
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Add `utility.json` to every sample: utility, loss, prediction, margin, nearest duplicate.

    Example: utilgen value score synth/ --value value/ -o scored/

    Of each class it prints means, the share that is assigned to its own label (agreement), the
    share that hardly differs from another image (duplicates), and with --passes of 2 or more how
    far the classifiers differ (disagreement).

    What the value model was trained on is judged by the classifier that was held out from it.
    """
    from ..runtime.device import pick_device
    from ..runtime.progress import reporter
    from ..valuation.score import Scorer
    from ..valuation.value_model import load_value
    from .quarantining import quarantine_of, tell
    from .valuing import LISTING, ScoreRequest, run_scoring, score_lines, warn

    request = ScoreRequest(
        output, method, select, lookahead, real or [], val or [], overwrite, part,
        quarantine_of(on_error),
    )  # fmt: skip
    request.check()
    model = load_value(value, pick_device(device), force, "--force takes it all the same.")
    warn(model.warning(), quiet)
    scorer = Scorer(model, method, batch_size, reporter(quiet), passes, agreed)
    summary = run_scoring(shards, value, scorer, request, LISTING)
    tell(request.aside, "value score")
    score_lines(summary, as_json, quiet)
