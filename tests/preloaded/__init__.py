"""`utilgen` for tests, without its seconds of imports: forked from a process that has them behind it.

Every command is a process of its own, with its own descriptors, directory, environment, signals and
exit, and imports utilgen itself; only torch and the libraries beside it are there already, and the
hash seed is that process's. What is about starting, limits of a process, or numbers that must not depend on it, runs
`python -m utilgen_cli` instead.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def preloaded(directory: Path) -> Iterator[Path]:
    """A directory for PATH with a `utilgen` that starts at once; its process ends with the block or with ours."""
    address = directory / "socket"
    command = directory / "bin" / "utilgen"
    command.parent.mkdir()
    client = Path(__file__).with_name("client.py")
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -IS "{client}" "{address}" "$@"\n')
    command.chmod(0o755)
    words = [sys.executable, "-m", f"{__name__}.server", str(address)]
    root = Path(__file__).parents[2]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, cwd=root, stdin=pipe, stdout=pipe) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        yield command.parent
