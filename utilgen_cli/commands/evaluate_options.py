"""Options of `utilgen eval`, and the files they name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..classification.comparison import Inputs
    from ..shards.operands import Source
    from ..shards.quarantine import Quarantine

Real = Annotated[str, typer.Option(help="Real training shards.")]
Test = Annotated[str, typer.Option(help="Test shards: opened when all training is over.")]
Validation = Annotated[
    str | None,
    typer.Option("--val", help="Validation shards: why a set helps; and --validate-every."),
]
Synthetic = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=SHARDS", help="A synthetic set; may repeat.", show_default=False),
]
Arch = Annotated[
    list[str] | None,
    typer.Option(
        help="small-cnn, a timm name, or open_clip:NAME-or-directory (open_clip-lora:... to adapt "
        "the tower); may repeat. Default: the "
        "preset's, small-cnn for quick and resnet50 for the others.",
        show_default=False,
    ),
]
Seeds = Annotated[int, typer.Option(min=1, help="Trainings of every arm.")]
FirstSeed = Annotated[int, typer.Option("--seed", min=0, help="Seed of the first of them.")]
Times = Annotated[
    list[float] | None,
    typer.Option(
        min=0.0, help="Synthetic images per real image; may repeat. Default: all there are.",
        show_default=False,
    ),
]  # fmt: skip
Baseline = Annotated[str, typer.Option(help="Arm that the others are compared with.")]
Preset = Annotated[
    str, typer.Option(help="quick, paper (ResNet-50 from scratch) or torchvision-v1.")
]
Steps = Annotated[
    int | None, typer.Option(min=1, help="Optimiser steps of every arm. Default: the preset's.")
]
BatchSizeTrained = Annotated[
    int | None, typer.Option("--batch-size", min=2, help="Images a step. Default: the preset's.")
]
LearningRate = Annotated[
    float | None, typer.Option("--lr", min=0.0, help="Peak learning rate. Default: the preset's.")
]
Size = Annotated[
    int | None,
    typer.Option(min=8, help="Pixels a side. Default: 32 for small-cnn alone, else 224."),
]
RealShare = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="Real share of each batch of an arm with both.")
]
ValAsTrain = Annotated[
    bool,
    typer.Option(
        "--val-as-train/--no-val-as-train",
        help="Add the validation images to the real training images of every arm that has some.",
    ),
]
Validate = Annotated[
    int, typer.Option(min=0, help="Steps between looks at --val, keeping the best; 0: last step.")
]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="Start timm models from ImageNet.")]
Augment = Annotated[
    str | None,
    typer.Option(
        help="none, shift (by an eighth), pad (and mirror), affine (and turn, scale, gamma), or "
        "torchvision's crop, trivial, rand. "
        "Default: the preset's, pad for quick and crop for the others.",
        show_default=False,
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        min=0, help="Processes that crop and augment images. Default: on a GPU up to 8, where "
        "images are cropped one by one; else none.",
    ),
]  # fmt: skip
DataParallel = Annotated[
    bool,
    typer.Option(
        "--data-parallel",
        help="Under torchrun all processes train each classifier together; else they share out "
        "the classifiers.",
    ),
]
Keep = Annotated[
    Path | None,
    typer.Option("-o", "--output", help="Directory of finished runs; a stopped run goes on there."),
]
Report = Annotated[
    Path | None, typer.Option(help="PAGE.html, or a directory that gets report.html and eval.json.")
]
ValueModel = Annotated[
    Path | None, typer.Option("--value", help="Value model, to show its weight function.")
]
Scored = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=SHARDS", help="Scored shards of a set whose own have no utility; may repeat.",
        show_default=False,
    ),
]  # fmt: skip
Price = Annotated[float | None, typer.Option(min=0.0, help="Price of an hour of this machine.")]


def named(pairs: Sequence[str] | None, option: str) -> dict[str, str]:
    """NAME=SHARDS as a dictionary, in order. UsageError: no name, a name twice, or `real`."""
    from ..runtime.errors import UsageError

    found: dict[str, str] = {}
    for pair in pairs or ():
        name, equals, shards = pair.partition("=")
        if not equals or not name.strip() or not shards:
            raise UsageError(f"{option} {pair}", "not NAME=SHARDS", f"Say {option} base=synth/.")
        if name in found or name in ("real", "validation", "test"):
            raise UsageError(f"{option} {pair}", f"the name {name} is taken", "Use another name.")
        found[name] = shards
    return found


def open_inputs(
    real: str,
    synthetic: list[str] | None,
    val: str | None,
    test: str,
    scored: list[str] | None,
    aside: Quarantine | None = None,
) -> tuple[Inputs, dict[str, Source]]:
    """The sources of all sets, and those whose images the report shows."""
    from ..classification.comparison import Inputs
    from ..runtime.errors import UsageError

    sets = {name: _files(s, aside) for name, s in named(synthetic, "--synthetic").items()}
    shown = {name: _files(s, aside) for name, s in named(scored, "--scored").items()}
    unknown = sorted(set(shown) - set(sets))
    if unknown:
        raise UsageError(f"--scored {unknown[0]}", "no --synthetic has this name", "Name it alike.")
    validation = _files(val, aside) if val else None
    inputs = Inputs(_files(real, aside), sets, _files(test, aside), validation)
    return inputs, sets | shown


def _files(operand: str, aside: Quarantine | None) -> Source:
    from ..runtime.errors import UsageError
    from ..shards.operands import open_source

    if operand == "-":
        raise UsageError("-", "eval reads its shards more than once", "Name files or directories.")
    return open_source([operand], aside)


def read_value(directory: Path | None) -> dict[str, Any] | None:
    """What the value.json of a value model says, if one was named."""
    from ..valuation.value_model import read_facts

    return None if directory is None else read_facts(directory)


def show(summary: dict[str, Any], as_json: bool) -> None:
    """The result on stdout: JSON for programs, a table for people."""
    from ..report.table import render
    from ..runtime.stdout import say, stdout_is_terminal
    from .streams import report

    if as_json:
        report(summary, True, "", to_stdout=True)
    else:
        say(render(summary, stdout_is_terminal()))
