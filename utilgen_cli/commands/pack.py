"""`utilgen pack`: a folder of images, or a CSV of paths and labels, as shards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

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
    without: Annotated[
        list[str] | None,
        typer.Option(
            "--without",
            help="Leave out the images that these shards were packed from; may repeat.",
            show_default=False,
        ),
    ] = None,
    shard_size: ShardSize = 1000,
    on_error: OnError = "stop",
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Pack labelled images into WebDataset shards.

    Example: utilgen pack photos/ -o real/    (photos/cat/1.jpg, photos/dog/2.png, ...)

    To divide one folder: `pack photos/ --shots 8 -o real/`, then `pack photos/ --without real/
    --shots 8 -o val/`, then `pack photos/ --without real/ --without val/ -o test/`.
    """
    from ..shards.folder import list_images, listing_digest, pack_images, packed_before, readable
    from ..shards.operands import expand_braces, open_source
    from .quarantining import quarantine_of, tell
    from .streams import report, run_source

    aside = quarantine_of(on_error)
    before = [packed_before(open_source([each]).samples()) for each in without or ()]
    beside = [Path(name) for each in without or () for name in expand_braces(each)]
    made = [] if output == "-" else [Path(output)]
    listed = list_images(folder, shots, seed, [*beside, *made], before)
    images, classes = readable(listed, aside), listed.classes
    settings: dict[str, Any] = {
        "folder": str(folder), "size": size, "shots": shots, "seed": seed,
        "shard_size": shard_size, "images": len(images),
        "contents": listing_digest(listed, images), **aside.settings(),
    }  # fmt: skip
    if without:
        settings["without"] = beside
    run_source(
        lambda part: pack_images(part, listed, size), images, output, "pack",
        settings, overwrite, shard_size,
    )  # fmt: skip
    tell(aside, "pack")
    if (line := listed.line()) and not quiet:
        report({}, False, f"pack: {line}")
    found = {"classes": classes, **listed.summary(), **aside.summary()}
    report({"samples": len(images), **found}, as_json,
           f"packed {len(images)} images of {len(classes)} classes: {some(classes)}")  # fmt: skip


def some(names: list[str], most: int = 20) -> str:
    """The names, or the first of them."""
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
