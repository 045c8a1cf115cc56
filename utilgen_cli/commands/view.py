"""`utilgen view`: a contact sheet of shards, as an HTML page or a PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import OnError, Quiet, Shards, Verbose


def view(
    shards: Shards = None,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="PAGE.html or SHEET.png to write.")
    ] = Path("view.html"),
    limit: Annotated[int, typer.Option(min=1, help="Images shown a class.")] = 24,
    lowest: Annotated[
        bool, typer.Option("--lowest", help="Lowest utility first, not highest.")
    ] = False,
    title: Annotated[str | None, typer.Option(help="Heading. Default: what is shown.")] = None,
    on_error: OnError = "stop",
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show shards: a self-contained page of images a class, sorted by utility if they have it.

    Example: utilgen view scored/ -o page.html
    """
    from ..report.view import check_shown, view_page, view_png
    from ..runtime.errors import UsageError, printable
    from ..runtime.files import write_atomic
    from ..runtime.stdout import say
    from ..shards.operands import open_source
    from .quarantining import quarantine_of, tell

    if output.suffix not in (".html", ".png"):
        raise UsageError(f"-o {output}", "neither a page nor a picture", "End it in .html or .png.")
    aside = quarantine_of(on_error, check_shown)
    source = open_source(shards, aside)
    if output.suffix == ".png":
        data = view_png(source.samples(), limit, lowest)
    else:
        named = printable(title or ", ".join(shards or ["standard input"]))
        data = view_page(source.samples(), named, limit, lowest).encode()
    tell(aside, "view")
    write_atomic(output, data)
    say(str(output))
