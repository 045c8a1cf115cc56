"""`utilgen --help`, a TAB, and an error, beside an empty Typer program."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from .harness import interleaved, record, table

EMPTY = "import typer\napp = typer.Typer()\n@app.command()\ndef main(): pass\napp()\n"


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        empty = Path(name) / "empty.py"
        empty.write_text(EMPTY)
        utilgen = [sys.executable, "-c", "from utilgen_cli.app import main; main()"]
        tab = {"_UTILGEN_COMPLETE": "complete_bash", "COMP_WORDS": "utilgen va", "COMP_CWORD": "1"}

        def call(words: list[str], **env: str) -> Callable[[], object]:
            return lambda: subprocess.run(
                words, capture_output=True, check=False, env={**os.environ, **env}
            )

        sides = {
            "empty Typer program, --help": call([sys.executable, str(empty), "--help"]),
            "utilgen --help": call([*utilgen, "--help"]),
            "utilgen TAB": call(utilgen, **tab),
            "utilgen pairs missing/": call([*utilgen, "pairs", "missing/"]),
            "utilgen generate --tokens missing/": call(
                [*utilgen, "generate", "-m", "tiny", "--tokens", "missing/", "-o", "nowhere"]
            ),
        }
        timings = interleaved(sides, repeats=15)
        record("Start-up", table(timings, "empty Typer program, --help", "ms", 1e3))


if __name__ == "__main__":
    main()
