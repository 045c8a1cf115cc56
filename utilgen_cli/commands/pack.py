"""`utilgen pack`: a folder of images, or a CSV of paths and labels, as shards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Json, OnError, Overwrite, Quiet, ShardSize, Verbose


def pack(
    folder: Annotated[
        Path, typer.Argument(help="FOLDER/CLASS/*.jpg, or a CSV file with columns path,label.")
    ],
    output: Annotated[
        str, typer.Option("-o", "--output", help="`-` or a directory of shards.")
    ] = "-",
    size: Annotated[
        int | None, typer.Option("--size", min=8, help="Crop and scale to this many pixels a side.")
    ] = None,
    shots: Annotated[
        int | None, typer.Option("--shots", min=1, help="Only so many images a class.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Which shots are taken.")] = 0,
    shard_size: ShardSize = 1000,
    on_error: OnError = "stop",
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Pack labelled images into WebDataset shards.

    Example: utilgen pack photos/ -o real/    (photos/cat/1.jpg, photos/dog/2.png, ...)
    """
    from ..shards.folder import list_images, listing_digest, pack_images, readable
    from .quarantining import quarantine_of, tell
    from .streams import report, run_source

    aside = quarantine_of(on_error)
    listed = list_images(folder, shots, seed, None if output == "-" else Path(output))
    images, classes = readable(listed, aside), listed.classes
    settings = {"folder": str(folder), "size": size, "shots": shots, "seed": seed,
                "shard_size": shard_size, "images": len(images),
                "contents": listing_digest(listed, images), **aside.settings()}  # fmt: skip
    run_source(
        lambda part: pack_images(part, classes, size), images, output, "pack",
        settings, overwrite, shard_size,
    )  # fmt: skip
    tell(aside, "pack")
    if (line := listed.line()) and not quiet:
        report({}, False, f"pack: {line}")
    found = {"classes": classes, **listed.summary(), **aside.summary()}
    report({"samples": len(images), **found}, as_json,
           f"packed {len(images)} images of {len(classes)} classes")  # fmt: skip
