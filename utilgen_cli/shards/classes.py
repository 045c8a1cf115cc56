"""What classes are called: a number means one class in all shards of a task."""

from __future__ import annotations

from collections.abc import Iterable

from ..runtime.errors import BadInput, NoInput
from .sample import Sample

SAME = "All shards of a task need the same classes: draw with `--classes REAL_SHARDS`."


def class_names(samples: Iterable[Sample], where: str) -> list[str]:
    """The names of the classes 0, 1, ... of the samples. NoInput: there are none. BadInput: one of
    these numbers has no name, or two."""
    names: dict[int, str] = {}
    labels = {note_class(names, sample) for sample in samples}
    if not labels:
        raise NoInput(where, "no samples in it", "Name shards made by utilgen pack.")
    for label in range(max(labels) + 1):
        if label not in names:
            why = f"class {label} has no {'name' if label in labels else 'image'} there"
            raise BadInput(where, why, "Name the classes: cat,dog,...")
    return [names[label] for label in range(len(names))]


def note_class(names: dict[int, str], sample: Sample, count: int | None = None) -> int:
    """The label of `sample`; its class's name, if it tells one, joins `names`. BadInput: the class
    has another name there, or is not one of `count`."""
    label = sample.label
    if count is not None and label >= count:
        raise BadInput(sample.place, f"label {label} is not one of the {count} classes", SAME)
    note_name(names, sample.place, label, sample.facts.get("class_name"))
    return label


def note_name(names: dict[int, str], where: str, label: int, name: str | None) -> None:
    """`note_class` of facts that were read before."""
    if name is not None and names.setdefault(label, name) != name:
        raise two_names(where, label, name, names[label])


def two_names(where: str, label: int, here: str, before: str) -> BadInput:
    """The error of a class that has two."""
    return BadInput(where, f"class {label} is {here!r} here and {before!r} before", SAME)
