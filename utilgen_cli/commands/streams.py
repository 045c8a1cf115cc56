"""How commands write samples: one tar on stdout, shards in a directory, a listing on a terminal."""

from __future__ import annotations

import json
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

from ..runtime import signals
from ..runtime.contents import STATS
from ..runtime.errors import UsageError, printable
from ..runtime.files import encode_json, sync_directory, write_json
from ..runtime.output import OutputDirectory
from ..runtime.ranks import one_process
from ..runtime.stdout import claim_stdout, say, stdout_is_terminal
from ..shards.operands import Source, parse_part
from ..shards.parquet import write_pickapic
from ..shards.partial import clear_leftovers, resume_shard
from ..shards.sample import Sample
from ..shards.sums import PUBLISHED, is_as_written, read_stats, stats_path
from ..shards.writer import write_shard, write_tar

Stage = Callable[[Iterable[Sample]], Iterator[Sample]]
T = TypeVar("T")
Item = tuple[int, int]  # (class index, image index)
INCOMING = ".incoming"
COUNTED = "counted"  # in a shard's statistics, and .counted.json of a directory: what was counted
SHARD_SIZE = 1000  # samples of a stream that come into one shard
SHARE = "Share it with --part rank, or run it without torchrun."
CELL = 80  # characters of a listing's cell
KEEP = "Keep the result with `-o DIR`, or pipe it into the next command."


@dataclass(frozen=True)
class Listing:
    """How a terminal shows samples instead of a tar."""

    columns: Sequence[str]
    row: Callable[[Sample], Sequence[object]]


class Tally(Protocol):
    """What is counted beside the samples, and kept with them for the run that finds them done."""

    def take(self) -> dict[str, Any]:
        """The counts so far, as JSON; counting begins anew."""

    def add(self, counts: dict[str, Any]) -> None:
        """Add what was taken before."""


Tallies = Mapping[str, Tally]
UNCOUNTED: Tallies = MappingProxyType({})


def refuse_terminal(output: str) -> None:
    """UsageError, before any work, if a tar would go to a terminal."""
    if output == "-" and stdout_is_terminal():
        raise UsageError("stdout", "is a terminal, and a tar is not for reading", KEEP)


def run_filter(
    source: Source,
    stage: Stage,
    output: str,
    command: str,
    settings: dict[str, Any],
    overwrite: bool = False,
    listing: Listing | None = None,
    part: str | None = None,
    tallies: Tallies = UNCOUNTED,
) -> int:
    """Put every sample through `stage`; how many came out.

    Whole shards already there are kept, and count in the `tallies` as they did when they were made.
    """
    if part is None:
        one_process(SHARE)
    _refuse_same_names(source.shards() if output != "-" else [])
    source = source.part(part)
    if output == "-":
        if listing is not None and stdout_is_terminal():
            return _list(stage(source.samples()), listing)
        refuse_terminal(output)
        return write_tar(_stopping(stage(source.samples())), claim_stdout())
    with OutputDirectory(output, command, settings, overwrite, _named(part)) as out:
        if source.is_stdin:
            return _write_all(stage(source.samples()), out.path, tallies)
        return _map_shards(source, stage, out.path, tallies)


def run_reduction(
    samples: Iterable[Sample],
    output: str,
    command: str,
    settings: dict[str, Any],
    overwrite: bool = False,
    listing: Listing | None = None,
    drain: bool = False,
    tallies: Tallies = UNCOUNTED,
) -> int:
    """Write samples that depend on all of the input (`pairs`): nothing appears before the end.

    A run that was done already has its counts again in the `tallies`. It reads its input all the
    same if `drain`: an upstream wants to end.
    """
    one_process()
    if output == "-":
        if listing is not None and stdout_is_terminal():
            return _list(samples, listing)
        refuse_terminal(output)
        return write_tar(_stopping(samples), claim_stdout())
    with OutputDirectory(output, command, settings, overwrite) as out:
        if not _is_published(out.path):
            return _write_all(samples, out.path, tallies)
        if drain:
            deque(samples, maxlen=0)
            _take(tallies)
            tell_not_compared(command, out.path)
        _add(tallies, json.loads(_counted_path(out.path).read_bytes()))
        return 0


def tell_not_compared(command: str, directory: Path) -> None:
    """What a pipe's reader says whose result was there before."""
    line = f"{command}: {directory} was done before; the pipe was not compared with it. "
    report({}, False, line + "Add --overwrite to redo it.")


def run_source(
    draw: Callable[[list[T]], Iterator[Sample]],
    plan: Sequence[T],
    output: str,
    command: str,
    settings: dict[str, Any],
    overwrite: bool = False,
    shard_size: int = 1000,
    part: str | None = None,
    facts: Callable[[], dict[str, Any]] = dict,
) -> int:
    """Make the samples of `plan`, shard by shard; whole shards already there are kept."""
    if part is None:
        one_process(SHARE)
    shards = [list(plan[i : i + shard_size]) for i in range(0, len(plan), shard_size)]
    index, count = parse_part(part) if part else (0, 1)
    mine = list(enumerate(shards))[index::count]
    if output == "-":
        refuse_terminal(output)
        items = [item for _, shard in mine for item in shard]
        return write_tar(_stopping(draw(items)), claim_stdout())
    with OutputDirectory(output, command, settings, overwrite, _named(part)) as out:
        total = 0
        for number, shard in mine:
            path = out.path / f"{number:05d}.tar"
            if is_as_written(path):
                clear_leftovers(path)
            else:
                total += resume_shard(path, lambda n, items=shard: draw(items[n:]), facts)  # type: ignore[misc]
        return total


def plan_items(classes: int, per_class: int, start: int = 0) -> list[Item]:
    """Image-major: every class's image `start`, then every class's next, and so on."""
    return [(c, i) for i in range(start, start + per_class) for c in range(classes)]


def _named(part: str | None) -> str | None:
    return None if part is None else "{}/{}".format(*parse_part(part))


def run_parquet(samples: Iterable[Sample], path: Path, overwrite: bool = False) -> int:
    """Write pairs in the Pick-a-Pic layout into one Parquet file; how many."""
    one_process()
    if path.exists() and not overwrite:
        raise UsageError(str(path), "is there already", "Add --overwrite, or name another.")
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_pickapic(_stopping(samples), path)


def _stopping(samples: Iterable[Sample]) -> Iterator[Sample]:
    """A stopped stream has no end mark, so that its reader knows."""
    for sample in samples:
        signals.check()
        yield sample


def _map_shards(source: Source, stage: Stage, directory: Path, tallies: Tallies) -> int:
    total, counted = 0, []

    def counts() -> dict[str, Any]:
        return {COUNTED: _take(tallies)}

    for shard in source.shards():
        path = directory / _output_name(shard)
        if not is_as_written(path):
            total += write_shard(path, stage(source.read(shard)), counts)
            signals.check()
        counted.append((read_stats(path) or {}).get(COUNTED, {}))
    for before in counted:  # at the end, since what is taken begins anew
        _add(tallies, before)
    return total


def _take(tallies: Tallies) -> dict[str, Any]:
    return {name: tally.take() for name, tally in tallies.items()}


def _add(tallies: Tallies, counts: dict[str, Any]) -> None:
    for name, tally in tallies.items():
        if name in counts:
            tally.add(counts[name])


def _counted_path(directory: Path) -> Path:
    return directory / f".{COUNTED}.json"


def _output_name(shard: Path) -> str:
    return Path(shard.name).with_suffix(".tar").name


def _refuse_same_names(shards: list[Path]) -> None:
    names = [_output_name(shard) for shard in shards]
    if len(set(names)) < len(names):
        twice = next(name for name, n in Counter(names).items() if n > 1)
        raise UsageError("-o", f"two input shards would become {twice}", "Use one -o a directory.")


def _is_published(directory: Path) -> bool:
    """True if the last whole stream's counts are there, and its shards as they were written."""
    path = directory / PUBLISHED
    if not path.exists() or not _counted_path(directory).exists():
        return False
    return all(is_as_written(directory / name) for name in json.loads(path.read_text()))


def _write_all(samples: Iterable[Sample], directory: Path, tallies: Tallies = UNCOUNTED) -> int:
    """Shards that get their names only when the whole stream has arrived; others are removed."""
    staged: list[Path] = []
    total = 0
    iterator = iter(_stopping(samples))
    staging = directory / INCOMING
    staging.mkdir(exist_ok=True)
    try:
        for first in iterator:
            path = staging / f"{len(staged):05d}.tar"
            total += write_shard(path, _at_most(SHARD_SIZE, first, iterator))
            staged.append(path)
        counts = _take(tallies)
        _publish(staged, directory, counts)
        _add(tallies, counts)
    finally:
        for path in staging.iterdir():
            path.unlink()
        staging.rmdir()
    return total


def _publish(staged: list[Path], directory: Path, counts: dict[str, Any]) -> None:
    """All of them, or (after a kill) some, and their list is not there."""
    with signals.deferred():
        (directory / PUBLISHED).unlink(missing_ok=True)
        for path in staged:
            path.replace(directory / path.name)
            stats_path(path).replace(stats_path(directory / path.name))
        names = [path.name for path in staged]
        whole = {directory / name for name in names}
        whole |= {stats_path(shard) for shard in whole}
        for kind in (STATS, ".tar"):  # in this order, since statistics call for their shard
            for old in set(directory.glob(f"*{kind}")) - whole:
                old.unlink()
        write_json(_counted_path(directory), counts)
        write_json(directory / PUBLISHED, names)
        sync_directory(directory)


def _at_most(count: int, first: Sample, rest: Iterator[Sample]) -> Iterator[Sample]:
    yield first
    for _, sample in zip(range(count - 1), rest, strict=False):
        yield sample


def _list(samples: Iterable[Sample], listing: Listing) -> int:
    """A readable listing on stdout, and how to keep the result."""
    say("  ".join(f"{column:<14}" for column in listing.columns).rstrip())
    count = 0
    for sample in samples:
        cells = (_cell(value) for value in listing.row(sample))
        say("  ".join(f"{cell:<14}" for cell in cells).rstrip())
        count += 1
    say(f"{count} samples. {KEEP}")
    return count


def _cell(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else printable(str(value), CELL)


def report(summary: dict[str, Any], as_json: bool, line: str, to_stdout: bool = False) -> None:
    """The end of a command: JSON if asked for (stderr for streams), else one line on stderr."""
    if as_json and to_stdout:
        claim_stdout().write(encode_json(summary))
        claim_stdout().flush()
    elif as_json:
        sys.stderr.write(encode_json(summary).decode())
    elif line:
        print(f"utilgen: {printable(line)}", file=sys.stderr)
