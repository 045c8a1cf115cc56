"""Nothing in the package can run what came in with the data."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from .conftest import ROOT

PACKAGE = sorted((ROOT / "utilgen_cli").rglob("*.py"))
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_PREFIXES = ("os.system", "os.popen", "os.exec", "os.spawn", "subprocess.", "torch.load",
                      "torch.jit.load", "torch.hub.", "np.load", "numpy.load", "yaml.load",
                      "tempfile.mktemp", "Image.show")  # fmt: skip
FLOORS = {"diffusers": "0.38", "transformers": "5.3", "torch": "2.6"}  # known holes below


@pytest.mark.parametrize("path", PACKAGE, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_pickle_no_eval_no_shell(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not {a.name.split(".")[0] for a in node.names} & FORBIDDEN_MODULES
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            assert (node.module or "").split(".")[0] not in FORBIDDEN_MODULES
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in FORBIDDEN_CALLS, f"line {node.lineno}"
            assert not name.startswith(FORBIDDEN_PREFIXES), f"line {node.lineno}"
            for keyword in node.keywords:
                trusted = keyword.arg in ("shell", "trust_remote_code")
                assert not trusted or ast.unparse(keyword.value) == "False", f"line {node.lineno}"


def test_versions_with_known_holes_are_excluded() -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    floors = {r.name: r.specifier for r in map(Requirement, wanted)}
    for name, floor in FLOORS.items():
        older = f"{floor.rpartition('.')[0]}.{int(floor.rpartition('.')[2]) - 1}.99"
        assert not floors[name].contains(older), f"{name} {older} has known holes"
        assert Version(version(name)) >= Version(floor)


ROOMS = {
    "shards": {"shards", "runtime"},
    "runtime": {"runtime"},
    "diffusion": {"diffusion", "shards", "runtime"},
    "classification": {"classification", "shards", "runtime"},
    "valuation": {"valuation", "classification", "shards", "runtime"},
    "report": {"report", "classification", "shards", "runtime"},
}


@pytest.mark.parametrize("room", ROOMS)
def test_the_library_rooms_import_downwards_and_never_the_command_line(room: str) -> None:
    for path in (ROOT / "utilgen_cli" / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 2 and node.module:
                assert node.module.split(".")[0] in ROOMS[room], f"{path.name}: {node.module}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                module = getattr(node, "module", None) or ""
                names = {a.name for a in node.names} | {module}
                assert "typer" not in names, path.name
                if room not in ("runtime", "report"):  # progress bars, tables: for people
                    assert not any(n.split(".")[0] == "rich" for n in names), path.name
            if isinstance(node, ast.Attribute) and room not in ("runtime",):
                assert ast.unparse(node) != "sys.stdout", path.name


def test_shards_need_no_torch() -> None:
    script = (
        "import sys; import utilgen_cli.shards.check, utilgen_cli.shards.folder, "
        "utilgen_cli.shards.images, utilgen_cli.commands.streams; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
