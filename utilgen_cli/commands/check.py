"""`utilgen check`: are the shards of a directory whole and as they were written?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Json, OnError, Quiet, Verbose


def check(
    shards: Annotated[list[Path], typer.Argument(help="Directories of shards, or shard files.")],
    remove: Annotated[
        bool,
        typer.Option("--remove", help="Remove broken shards of utilgen; a rerun makes them anew."),
    ] = False,
    on_error: OnError = "stop",
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Verify that shards are whole, hold unique keys and match their checksums.

    Pictures without checksums are decoded. With --on-error skip single bad samples are counted and
    a shard counts as broken only when it is cut or its structure is damaged.

    Example: utilgen check synth/ && echo whole
    """
    from ..runtime.errors import BadInput
    from ..runtime.progress import reporter
    from ..shards.check import check_shards
    from ..shards.quarantine import check_any
    from .quarantining import quarantine_of, tell
    from .streams import report

    aside = quarantine_of(on_error, check_any)
    found = check_shards(shards, reporter(quiet), remove, aside)
    tell(aside, "check")
    summary = {"shards": found.shards, "samples": found.samples, "broken": found.broken}
    summary |= {"removed": found.removed} if remove else {}
    summary |= aside.summary()
    whole = f"checked {found.shards} shards, {found.samples} samples"
    report(summary, as_json, "" if found.broken else whole, to_stdout=True)
    if found.broken:
        first = found.broken[0]
        remedy = "Run the command that made it again; --remove takes away what utilgen made."
        if found.removed:
            remedy = f"Removed {found.removed} shards; run the command that made them again."
        raise BadInput(first["shard"], first["why"].removeprefix(f"{first['shard']}: "), remedy)
