"""What a run left: the same as another's, and nothing that is half written under a final name."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

BOOKKEEPING = (".lock", "settings.json")


def digest(directory: Path) -> dict[str, str]:
    """What must come back the same: every file, with times left out of JSON."""
    found = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        if path.name.startswith(BOOKKEEPING):
            continue
        data = path.read_bytes()
        if path.suffix == ".json":
            data = json.dumps(without_times(json.loads(data)), sort_keys=True).encode()
        found[str(path.relative_to(directory))] = hashlib.sha256(data).hexdigest()
    return found


def without_times(value: object) -> object:
    """JSON without the entries that tell of time spent."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if "second" not in k and k != "date"}
    if isinstance(value, list):
        return [without_times(v) for v in value]
    return value


def torn(directory: Path) -> list[str]:
    """Files under a final name that are not whole (a hidden or temporary name promises nothing)."""
    if not directory.exists():
        return []
    files = [p for p in directory.rglob("*") if p.is_file() and not p.name.startswith(".")]
    return [str(p.relative_to(directory)) for p in files if not _whole(p)]


def _whole(path: Path) -> bool:
    if path.suffix == ".tar":
        listed = subprocess.run(["tar", "tf", path], capture_output=True, check=False)
        return listed.returncode == 0 and path.read_bytes().endswith(bytes(1024))
    if path.suffix == ".json":
        try:
            json.loads(path.read_bytes())
        except ValueError:
            return False
    if path.suffix == ".safetensors":
        return _whole_tensors(path.read_bytes(), 32 if "checkpoint" in path.name else 0)
    return True


def _whole_tensors(data: bytes, digest_size: int) -> bool:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    ends = [t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"]
    return len(data) == 8 + length + max(ends, default=0) + digest_size
