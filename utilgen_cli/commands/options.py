"""Options that commands share, so that one name means one thing everywhere."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Annotated

import typer


def _verbose(value: bool) -> bool:
    """Without -v only utilgen's own messages are shown."""
    if not value:
        logging.disable(logging.ERROR)
        warnings.simplefilter("ignore")
    return value


Shards = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="SHARDS",
        help="Shards: files, directories, brace patterns or `-`. Default: standard input.",
        show_default=False,
    ),
]
StreamOutput = Annotated[
    str, typer.Option("-o", "--output", help="`-` for one tar on stdout, or a directory of shards.")
]
ModelOutput = Annotated[Path, typer.Option("-o", "--output", help="Directory to make.")]
Model = Annotated[
    str | None,
    typer.Option(
        "-m", "--model", envvar="UTILGEN_MODEL",
        help="tiny, sd15, sd21-base, sd21, a hub id, or a diffusers directory.",
    ),
]  # fmt: skip
Value = Annotated[
    Path, typer.Option("--value", envvar="UTILGEN_VALUE", help="Directory of the value model.")
]
Tokens = Annotated[
    Path | None, typer.Option("--tokens", help="Class tokens, as `utilgen invert` makes them.")
]
Adapters = Annotated[
    list[Path] | None,
    typer.Option(
        "--adapter", help="Result of `dpo` or `lora`, or a LoRA's .safetensors; may repeat.",
        show_default=False,
    ),
]  # fmt: skip
Classes = Annotated[
    str | None,
    typer.Option(
        "--classes", help="Class names: a comma list, a file with one a line, or the real shards."
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="The same seed gives the same result.")]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:N or mps. Default: the best here.")
]
Precision = Annotated[
    str | None,
    typer.Option("--precision", help="fp32, fp16 or bf16. Default: bf16 on CUDA, else fp32."),
]
Compile = Annotated[
    bool, typer.Option("--compile", help="Compile the U-Net for drawing: a minute first.")
]
BatchSizeDrawn = Annotated[
    int | None,
    typer.Option("--batch-size", min=1, help="Images at once on a GPU (the CPU takes few always)."),
]
Part = Annotated[
    str | None,
    typer.Option("--part", help="I/N: every N-th shard from the I-th (from 0); or rank, slurm."),
]
ShardSize = Annotated[int, typer.Option("--shard-size", min=1, help="Samples a shard.")]
PerClass = Annotated[int, typer.Option("--per-class", min=1, help="Images a class.")]
Start = Annotated[int, typer.Option("--start", min=0, help="Index of each class's first image.")]
SamplingSteps = Annotated[
    int | None,
    typer.Option("--steps", min=1, help="Denoising steps. Default: the model's, else 25."),
]
GuidanceScale = Annotated[
    float | None,
    typer.Option(
        "--guidance-scale", min=0,
        help="Classifier-free guidance, 1: none. Default: the model's, else 7.5.",
    ),
]  # fmt: skip
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Redo what is there already.")]
Smoke = Annotated[
    bool,
    typer.Option("--smoke", help="A trial of the works: few steps and images, whatever is asked."),
]
OnError = Annotated[
    str,
    typer.Option(help="Single bad samples: stop at the first, or skip them, counted by reason."),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print a machine-readable summary: on stdout of models, eval and "
                 "check; of streams and shards as the last line of stderr."),
]  # fmt: skip
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No progress.")]
Verbose = Annotated[
    bool,
    typer.Option("-v", "--verbose", help="Show the libraries' messages too.", callback=_verbose),
]
