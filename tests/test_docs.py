"""What the documents say is so: commands, links, completions, and what CI runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from utilgen_cli.shards.images import decode_member
from utilgen_cli.shards.operands import open_source

from .conftest import DATA, ROOT, Run, make_sample, tar_bytes

README = (ROOT / "README.md").read_text()
COMMANDS = [
    ["pack"], ["invert"], ["generate"], ["value", "train"], ["value", "score"], ["pairs"], ["dpo"],
    ["ilpo"], ["eval"], ["lora"], ["view"], ["check"],
]  # fmt: skip


def built() -> dict[str, Any]:
    """Every command as Typer has it, by its full name."""
    import typer

    from utilgen_cli.app import app

    groups = {"": typer.main.get_command(app)}
    groups["value "] = groups[""].commands["value"]  # type: ignore[attr-defined]
    return {
        prefix + name: group.commands[name]  # type: ignore[attr-defined]
        for prefix, group in groups.items()
        for name in group.list_commands(None)  # type: ignore[attr-defined]
        if name != "value"
    }


def test_the_list_of_commands_is_whole() -> None:
    assert sorted(built()) == sorted(map(" ".join, COMMANDS))


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_each_command_is_in_the_readme_and_its_help_has_an_example(
    command: list[str], utilgen: Run
) -> None:
    name = " ".join(["utilgen", *command])
    assert f"| `{name}` |" in README
    text = re.sub(r"\s+", " ", utilgen(*command, "--help", env=None).stdout.decode())
    assert re.search(rf"Example: .{{0,60}}{name}\b", text)


def test_every_option_has_a_help_text() -> None:
    for name, command in built().items():
        assert command.params
        for parameter in command.params:
            assert parameter.help, f"{name} {parameter.name}"


def named_commands() -> list[tuple[str, str]]:
    """(page, command line) of every utilgen command in the pages' blocks of code."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [
        (page.name, part.strip())
        for page in pages
        for block in re.findall(
            r"(?:^```sh\n.*?^```|(?:^ {4}.*\n)+)", page.read_text(), re.M | re.S
        )
        for line in re.sub(r"\\\n", " ", block).splitlines()
        for part in line.split("#")[0].split("|")
        if part.strip().startswith("utilgen ")
    ]


def test_the_commands_of_the_pages_can_be_typed() -> None:
    """Every option that they use exists, with a value where it takes one."""
    found, commands = named_commands(), built()
    assert len(found) > 12
    for page, line in found:
        words = line.split()[1:]
        name = " ".join(words[:2] if words[0] == "value" else words[:1])
        options = {opt: p for p in commands[name].params for opt in p.opts + p.secondary_opts}
        for i, word in enumerate(words):
            if word.startswith("-") and word != "-":
                assert word in options, f"{page}: {line}: {word}"
                if not options[word].is_flag:
                    assert not words[i + 1].startswith("--"), f"{page}: {line}: {word}"


def test_a_command_loads_no_other() -> None:
    script = (
        "import sys; from utilgen_cli.app import main; sys.argv[1:] = ['view', 'missing/']\n"
        "try: main()\nexcept SystemExit as end: print(end.code)\n"
        "print(*(m for m in sys.modules if m.startswith('utilgen_cli.commands.')))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    code, *loaded = done.stdout.decode().split()
    assert code == "66"
    names = {module.rpartition(".")[2] for module in loaded}
    assert names == {"inputs", "keeping", "on_demand", "options", "view"}


@pytest.mark.parametrize("words", [
    "generate -m ./gone", "generate -m tiny --tokens gone", "generate -m tiny --adapter gone",
    "generate -m tiny --policy gone", "value train --real DATA --synthetic gone -o out",
    "value score DATA --value gone", "pairs gone", "dpo DATA --init gone -o out",
    "ilpo -m tiny --value gone", "ilpo -m tiny --value DATA --init gone", "lora gone -o out",
    "eval --real DATA --test DATA --synthetic base=gone", "invert DATA -m gone -o out",
])  # fmt: skip
def test_a_word_about_what_is_missing_waits_for_no_torch(words: str, tmp_path: Path) -> None:
    named = [str(DATA / "val") if word == "DATA" else word for word in words.split()]
    script = (
        f"import sys; from utilgen_cli.app import main; sys.argv[1:] = {named!r}\n"
        "try: main()\nexcept SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, cwd=tmp_path)
    assert done.stdout.split() == [b"66", b"False"]
    said = done.stderr.decode().splitlines()
    assert len(said) == 1 and "gone: no such" in said[0]
    assert not list(tmp_path.iterdir())


def test_a_misspelt_command_is_told_the_nearest(utilgen: Run) -> None:
    done = utilgen("pars", env=None, check=False)
    assert done.returncode == 2
    assert b"Did you mean 'pairs'?" in done.stderr


MADE = {".venv", "build", "quickstart"}  # not ours to check
DOCUMENTS = [p for p in sorted(ROOT.rglob("*.md")) if not MADE & set(p.relative_to(ROOT).parts)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_relative_links_resolve(document: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
        if not re.match(r"[a-z]+:", link):
            assert (document.parent / link).exists(), link


def test_the_completion_files_are_what_the_command_prints(bash: Run, tmp_path: Path) -> None:
    made = bash(f"bash {ROOT}/completions/make.sh {tmp_path}")
    assert made.returncode == 0, made.stderr
    for name in ("utilgen.bash", "_utilgen", "utilgen.fish"):
        assert (tmp_path / name).read_text() == (ROOT / "completions" / name).read_text()


def test_ci_runs_the_commands_of_the_readme() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    first, second = re.findall(r"```sh\n(pip install [^\n]*)\n```", README)
    assert first == "pip install . && bash examples/quickstart.sh"
    assert f"\n{first}" in ci
    assert f"\n{second}\n" in ci


@pytest.mark.parametrize("words", [["--help"], ["value", "score", "--help"], ["pairs", "--help"]])
def test_help_imports_neither_torch_nor_diffusers(words: list[str]) -> None:
    script = (
        f"import sys; from utilgen_cli.app import main; sys.argv[1:] = {words!r}\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "sys.exit(','.join(m for m in ('torch', 'diffusers', 'numpy', 'PIL') if m in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"utilgen" in done.stdout


def test_a_tab_imports_neither_torch_nor_pydantic() -> None:
    script = (
        "import os, sys; os.environ |= {'_UTILGEN_COMPLETE': 'complete_bash', 'COMP_WORDS': 'utilgen va', "
        "'COMP_CWORD': '1'}\nfrom utilgen_cli.app import main\nsys.argv[1:] = []\n"
        "try: main()\nexcept SystemExit: pass\nsys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [b"value"]


def test_quickstart_is_short_and_sound(bash: Run) -> None:
    script = ROOT / "examples" / "quickstart.sh"
    assert len(script.read_text().splitlines()) < 60
    assert bash(f"bash -n {script}").returncode == 0


def test_a_scorer_of_ones_own_is_what_the_page_shows(utilgen: Run, tmp_path: Path) -> None:
    """The program of docs/streams.md, between a command that draws and one that pairs."""
    page = (ROOT / "docs/streams.md").read_text()
    program, *_ = re.findall(r"```python\n(.*?)```", page, re.S)
    drawn = tar_bytes(make_sample(i, i % 2) for i in range(16))
    (tmp_path / "bright.py").write_text(program)
    scored = subprocess.run(
        [sys.executable, "bright.py"], input=drawn, capture_output=True, cwd=tmp_path, check=True
    ).stdout
    utilgen("pairs", "-o", "pairs", "-q", input=scored)
    found = list(open_source([str(tmp_path / "pairs")]).samples())
    assert len(found) == 4
    for pair in found:
        means = [decode_member(pair, n, pair.members[n]).mean() for n in ("win.png", "lose.png")]
        assert means[0] > means[1]


def test_the_page_about_python_runs_as_it_stands(tmp_path: Path) -> None:
    programs = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), re.S)
    assert len(programs) == 4
    for name in ("real", "val"):
        (tmp_path / name).symlink_to(DATA / name)
    program = "".join(programs).replace("steps=400", "steps=40, folds=2")
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert "'verdict': " in done.stdout and "tensor(" in done.stdout
    drawn = list(open_source([str(tmp_path / "synth")]).samples())
    assert [s.key for s in drawn] == ["0000-000000", "0003-000000", "0003-000001"]
