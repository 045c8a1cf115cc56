"""What happens before a command is under way: Ctrl-C, and descriptors that are not open."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from .conftest import DATA, ROOT

UTILGEN = [sys.executable, "-m", "utilgen_cli"]


def test_ctrl_c_while_the_first_libraries_are_loaded_shows_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("import os, time; os.kill(os.getpid(), 2); time.sleep(9)")
    done = subprocess.run([*UTILGEN, "--help"], capture_output=True, cwd=ROOT, check=False,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)})  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def test_with_stderr_closed_a_command_does_its_work_and_no_file_takes_its_place(
    tmp_path: Path,
) -> None:
    words = f'exec "$@" pairs "{DATA}/missing" -o "{tmp_path}/p" 2>&-'
    done = subprocess.run(["bash", "-c", words, "-", *UTILGEN], cwd=ROOT, check=False)
    assert done.returncode == 66
    words = f'exec "$@" generate -m tiny --smoke --per-class 1 --classes bag -o "{tmp_path}/o" 2>&-'
    done = subprocess.run(["bash", "-c", words, "-", *UTILGEN], cwd=ROOT, check=False)
    assert done.returncode == 0
    assert (tmp_path / "o" / "00000_stats.json").exists()
