"""The page and the PNG of `utilgen view`."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice

from ..runtime.errors import NoInput
from ..shards.quarantine import check_any
from ..shards.sample import Sample
from ..shards.scores import check_utility
from .html import page, tag
from .sheets import ClassSheet, collect, contact_png, halves, pair_list, plain_sheet

MAX_PAIRS = 200


def check_shown(sample: Sample) -> None:
    """BadSample unless it has a picture, or two of a pair, and all that is shown can be read."""
    check_any(sample)
    _ = sample.label
    check_utility(sample)
    if halves(sample) is None:
        _ = sample.image


def view_page(samples: Iterable[Sample], title: str, limit: int, lowest: bool = False) -> str:
    """A contact sheet a class as one HTML page; preference pairs as winner and loser."""
    first, rest = _peek(samples)
    if halves(first) is not None:
        return _pairs_page(rest, title, limit)
    sheets = collect(rest, limit)
    return page(
        title,
        tag("h1", title),
        tag("p", _described(sheets, lowest), class_="lead"),
        tag("div", plain_sheet(sheets, lowest), class_="view"),
    )


def view_png(samples: Iterable[Sample], limit: int, lowest: bool = False) -> bytes:
    """A contact sheet as PNG, a row a class."""
    _, rest = _peek(samples)
    return contact_png(collect(rest, limit), lowest)


def _pairs_page(samples: Iterator[Sample], title: str, limit: int) -> str:
    shown = islice(samples, min(limit * 10, MAX_PAIRS))
    pairs = [pair for s in shown if (pair := halves(s))]
    deque(samples, maxlen=0)  # to the end mark: a stream that was cut is refused
    lead = f"{len(pairs)} pairs: the winner, then the loser."
    body = pair_list(pairs, ("wins", "loses"))
    return page(title, tag("h1", title), tag("p", lead, class_="lead"), body)


def _peek(samples: Iterable[Sample]) -> tuple[Sample, Iterator[Sample]]:
    iterator = iter(samples)
    first = next(iterator, None)
    if first is None:
        raise NoInput("shards", "no samples in them", "Name shards made by utilgen.")

    def again() -> Iterator[Sample]:
        yield first
        yield from iterator

    return first, again()


def _described(sheets: list[ClassSheet], lowest: bool) -> str:
    count = sum(s.count for s in sheets)
    order = "in the order of the shards"
    if any(s.scored for s in sheets):
        order = f"{'lowest' if lowest else 'highest'} utility first"
    shown = sum(len(s.highest) for s in sheets)
    return f"{shown:,} of {count:,} images in {len(sheets)} classes, {order}."
