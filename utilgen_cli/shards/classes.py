"""What classes are called: a number means one class in all shards of a task."""

from __future__ import annotations

from ..runtime.errors import BadInput
from .sample import Sample

SAME = "All shards of a task need the same classes."


def note_class(names: dict[int, str], sample: Sample, count: int | None = None) -> int:
    """The label of `sample`; its class's name, if it tells one, joins `names`. BadInput: the class
    has another name there, or is not one of `count`."""
    label = sample.label
    if count is not None and label >= count:
        raise BadInput(sample.key, f"label {label} is not one of the {count} classes", SAME)
    note_name(names, sample.key, label, sample.facts.get("class_name"))
    return label


def note_name(names: dict[int, str], where: str, label: int, name: str | None) -> None:
    """`note_class` of facts that were read before."""
    if name is not None and names.setdefault(label, name) != name:
        raise two_names(where, label, name, names[label])


def two_names(where: str, label: int, here: str, before: str) -> BadInput:
    """The error of a class that has two."""
    return BadInput(where, f"class {label} is {here!r} here and {before!r} before", SAME)
