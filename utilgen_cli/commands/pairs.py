"""`utilgen pairs`: high- against low-utility samples of the same class."""

from __future__ import annotations

from typing import Annotated

import typer

from . import options as o


def pairs(
    shards: o.Shards = None,
    output: o.StreamOutput = "-",
    strategy: Annotated[
        str,
        typer.Option(
            help="top-bottom: the best against the worst; random-margin: any two that differ; "
            "nearest: high and low that look alike, to differ in utility and not in pose; "
            "agreement: any that the value model sees as its class against any that it does not."
        ),
    ] = "top-bottom",
    quantile: Annotated[
        float,
        typer.Option(
            help="Share of a class that can win, and that can lose (to 0.5), "
            "of top-bottom and nearest."
        ),
    ] = 0.25,
    min_margin: Annotated[float, typer.Option(help="Least difference in utility of a pair.")] = 0.0,
    max_per_class: Annotated[
        int | None, typer.Option(min=1, help="Most pairs a class. Default: no limit.")
    ] = None,
    match: Annotated[
        str,
        typer.Option(
            help="What nearest compares: value (features written by `value score`), clip "
            "(--clip), grey (8 x 8 levels); auto: value where they are, else grey."
        ),
    ] = "auto",
    clip: Annotated[
        str | None, typer.Option(help="open_clip NAME[:PRETRAINED] or directory, for --match clip.")
    ] = None,
    layout: Annotated[
        str,
        typer.Option(
            help="utilgen, or pickapic: jpg_0 jpg_1 label_0 caption; public scripts read it from "
            "-o FILE.parquet."
        ),
    ] = "utilgen",
    seed: o.Seed = 0,
    on_error: o.OnError = "stop",
    overwrite: o.Overwrite = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Pair high- with low-utility samples of each class, for `utilgen dpo`.

    Example: utilgen value score synth/ | utilgen pairs -o pairs/
    """
    from dataclasses import asdict
    from pathlib import Path

    from ..runtime.contents import directory_named
    from ..runtime.errors import UsageError
    from ..runtime.progress import reporter
    from ..shards.operands import open_source
    from ..valuation.pairing import PairingConfig, PairingReport, pair_samples
    from .matching import describer
    from .quarantining import check_scored, quarantine_of, tell
    from .streams import Listing, report, run_parquet, run_reduction

    if strategy != "nearest" and (clip is not None or match != "auto"):
        option = f"--match {match}" if clip is None else "--clip"
        raise UsageError(option, "is for --strategy nearest", "Add it, or leave this out.")
    match = "clip" if clip and match == "auto" else match
    config = PairingConfig(strategy, quantile, min_margin, max_per_class, seed, layout, match)
    found = PairingReport()
    listing = Listing(
        ("winner", "loser", "class", "win_utility", "lose_utility"),
        lambda s: [s.facts[n] for n in ("win_key", "lose_key")]
        + [s.facts.get("class_name", s.label)]
        + [s.facts[n] for n in ("win_utility", "lose_utility")],
    )  # fmt: skip
    aside = quarantine_of(on_error, check_scored)
    source = open_source(shards, aside)
    settings = {
        **asdict(config),
        "clip": clip,
        "clip files": directory_named(clip),
        "input": list(source.paths),
        **aside.settings(),
    }
    made = pair_samples(source.samples(), config, found, reporter(quiet), describer(clip, config))
    if output.endswith(".parquet"):
        if layout != "pickapic":
            raise UsageError(
                f"-o {output}", "Parquet is for public scripts", "Add --layout pickapic."
            )
        run_parquet(made, Path(output), overwrite)
    else:
        run_reduction(made, output, "pairs", settings, overwrite,
                      listing if layout == "utilgen" else None, source.is_stdin,
                      {"pairs": found, "quarantine": aside})  # fmt: skip
    if found.classes and not as_json and not quiet:
        for line in found.lines():
            report({}, False, line)
    tell(aside, "pairs")
    report({**found.as_dict(), **aside.summary()}, as_json, "")
