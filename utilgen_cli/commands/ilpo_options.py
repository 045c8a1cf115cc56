"""Options of `utilgen ilpo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Objective = Annotated[
    str,
    typer.Option(
        help="utility, loss or entropy (GAP's), clip, or MODULE:FUNCTION (images of some classes, "
        "their labels -> a score each)."
    ),
]
Real = Annotated[
    Path | None,
    typer.Option(help="Real shots, for --anchor-weight, --set-term and --clip-image-weight."),
]
SetTerm = Annotated[
    str, typer.Option(help="Value of the set: none, gradient-match or coverage (need --real).")
]
SetWeight = Annotated[float, typer.Option(min=0, help="Weight of --set-term.")]
Diversity = Annotated[float, typer.Option(min=0, help="Weight of the spread within a class.")]
Clip = Annotated[
    str | None,
    typer.Option(
        help="open_clip NAME[:PRETRAINED] or directory, which also watches the labels. Default: "
        "the model's, else ViT-B-32:openai."
    ),
]
ClipWeight = Annotated[
    float, typer.Option(min=0, help="lambda: weight of cos(image, text of the class).")
]
ClipImageWeight = Annotated[
    float, typer.Option(min=0, help="Weight of cos(image, real shots of the class).")
]
AnchorWeight = Annotated[
    float,
    typer.Option(
        min=0,
        help="Weight of denoising the real shots (--real): it keeps the prompts close to them.",
    ),
]
Parameters = Annotated[
    str,
    typer.Option(help="embeds (the encoded prompt), or tokens (the class's, before encoding)."),
]
Population = Annotated[
    int | None, typer.Option(min=1, help="Prompts a class. Default: 4, or those of --init.")
]
Init = Annotated[
    Path | None,
    typer.Option(
        "--init",
        help="Prompts to begin with, as `invert --population` or --save-policy made them; as many "
        "a class as it has.",
    ),
]
Iterations = Annotated[
    int, typer.Option(min=0, help="Optimisation steps of the prompts; 0 leaves them.")
]
Images = Annotated[int, typer.Option(min=1, help="Images a prompt and iteration.")]
Rate = Annotated[float, typer.Option(min=0, help="Step size, relative to the prompts' RMS.")]
GradStepsOption = Annotated[
    str,
    typer.Option(
        "--grad-steps", help="Sampling steps with gradient: all, last:K, random:K or x0@T."
    ),
]
SearchSteps = Annotated[int, typer.Option(min=1, help="Sampling steps while optimising.")]
Chunk = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Images whose graph of one step is held at once. Default: what the GPU holds.",
    ),
]
MaxFidelityDrop = Annotated[
    float, typer.Option(help="End the run when label fidelity by CLIP falls by more (share).")
]
Noise = Annotated[
    str,
    typer.Option(help="Noise optimisation: none, single (at T), zigzag (every step), full."),
]
OmegaL = Annotated[float, typer.Option(help="Guidance of its denoising half, at 50 steps.")]
OmegaW = Annotated[float, typer.Option(help="Guidance of its inverting half.")]
Refine = Annotated[int, typer.Option(min=0, help="Fixed-point iterations of an inverse step.")]
SavePolicy = Annotated[
    Path | None,
    typer.Option(help="Keep prompts and settings here, for `generate --policy`."),
]
