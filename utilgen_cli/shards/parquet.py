"""Pairs as the Parquet file that public preference scripts read: the columns of Pick-a-Pic."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from ..runtime.errors import UsageError
from ..runtime.files import appearing_whole
from .sample import Sample

GROUP = 256  # rows that are held at a time


def write_pickapic(samples: Iterable[Sample], path: Path) -> int:
    """Write samples of `pairs --layout pickapic` to `path`; how many.

    Columns: jpg_0 and jpg_1 (bytes of the encoded images), label_0 (1: the first is preferred),
    caption. The name appears once the file is whole. UsageError: pyarrow is not installed.
    UtilgenError: another process writes the file.
    """
    pyarrow, parquet = _pyarrow()
    schema = pyarrow.schema(
        [("jpg_0", pyarrow.binary()), ("jpg_1", pyarrow.binary()),
         ("label_0", pyarrow.float32()), ("caption", pyarrow.string())]
    )  # fmt: skip
    count = 0
    with (
        appearing_whole(path, path.with_name(f".{path.name}.tmp")) as file,
        parquet.ParquetWriter(file, schema) as writer,
    ):
        for rows in _groups(map(_row, samples)):
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))
            count += len(rows)
    return count


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UsageError("Parquet", "needs pyarrow", "pip install pyarrow.") from None
    return pyarrow, pyarrow.parquet


def _row(sample: Sample) -> dict[str, Any]:
    found = sample.members
    label, caption = float(found["label_0"]), found["caption"].decode()
    return {"jpg_0": found["jpg_0"], "jpg_1": found["jpg_1"], "label_0": label, "caption": caption}


def _groups(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    while group := list(islice(rows, GROUP)):
        yield group
