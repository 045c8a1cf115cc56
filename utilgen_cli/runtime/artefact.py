"""A finished model: its files are listed before its marker is written, and held against the list.

`.files.json` has the size and SHA-256 of the weights and of the JSON in folders (a class's, a
pipeline's), and no times: the same model made again has the same list. A model without a list is
one of a version that wrote none, and is believed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .contents import CHECKPOINT as CHECKPOINT
from .contents import is_output
from .files import file_sum, write_json

FILES = ".files.json"


def seal(directory: Path, **facts: Any) -> None:
    """List the files of a model that is whole, and `facts` of how it was made."""
    files = {
        str(path.relative_to(directory)): [path.stat().st_size, file_sum(path)]
        for path in _files(directory)
    }
    write_json(directory / FILES, {"files": files, **facts})


def sealed(directory: Path) -> dict[str, Any] | None:
    """The list and the facts; None where there is no list."""
    path = directory / FILES
    return json.loads(path.read_text()) if path.exists() else None


def is_done(marker: Path) -> bool:
    """True if the marker is there, and each file of the list beside it is as it was written."""
    if not marker.exists():
        return False
    try:
        files = (sealed(marker.parent) or {"files": {}})["files"]
        paths = {marker.parent / name: expected for name, expected in files.items()}
        return all(path.stat().st_size == size for path, (size, _) in paths.items()) and all(
            file_sum(path) == digest for path, (_, digest) in paths.items()
        )
    except (FileNotFoundError, NotADirectoryError):
        return False  # a file is gone; one that cannot be read now may be whole
    except (ValueError, KeyError, TypeError, AttributeError):
        return False  # the list is none


def clear_checkpoints(directory: Path) -> None:
    """Remove what a run keeps until it is done: a kill may have come before that."""
    for path in _own(directory):
        if path.name.startswith(CHECKPOINT):
            path.unlink()


def _own(directory: Path) -> Iterator[Path]:
    """All files, but for those of other outputs that lie in it."""
    for folder, folders, names in os.walk(directory):
        folders[:] = [name for name in folders if not is_output(Path(folder, name))]
        yield from (Path(folder, name) for name in names)


def _files(directory: Path) -> Iterator[Path]:
    """What utilgen writes; a note or a log that somebody laid beside it is not looked at."""
    for path in _own(directory):
        name = path.relative_to(directory)
        hidden = path.name.startswith(CHECKPOINT) or any(part[0] == "." for part in name.parts)
        ours = path.suffix == ".safetensors" or (len(name.parts) > 1 and path.suffix == ".json")
        if ours and not hidden and path.is_file():
            yield path
