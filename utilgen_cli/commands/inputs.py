"""What a command line names is looked for before anything heavy is loaded."""

from __future__ import annotations

from typing import Any

from ..runtime.errors import NoInput

SHARDS = ("shards", "real", "val", "test", "synthetic", "scored")
NAMED = {"eval": ("synthetic", "scored")}  # NAME=SHARDS
TUNED = "`utilgen dpo` or `utilgen lora`"
PROMPTS = "`utilgen invert --population` or `utilgen ilpo --save-policy`"
MADE_BY = {  # option, or command and option
    "tokens": "`utilgen invert`", "adapter": TUNED, "policy": PROMPTS,
    "value": "`utilgen value train`", "dpo init": TUNED, "ilpo init": PROMPTS,
}  # fmt: skip


def look_for_inputs(command: str, options: dict[str, Any]) -> None:
    """NoInput for shards, a directory or a model that is not there; a hub is not asked. BadInput
    for a directory that lacks one of its shards."""
    operands = []
    for name in SHARDS:
        found = [str(operand) for operand in _listed(options.get(name))]
        if name in NAMED.get(command, ()):
            found = [operand.partition("=")[2] for operand in found]
        operands += [operand for operand in found if operand not in ("", "-")]
    if operands:
        from ..shards.operands import open_source

        open_source(operands, whole=command != "check")  # which tells all that are gone
    for key, maker in MADE_BY.items():
        of, _, name = key.rpartition(" ")
        for path in _listed(options.get(name)) if of in ("", command) else ():
            if not path.exists():
                why = "no such file or directory" if maker == TUNED else "no such directory"
                raise NoInput(f"--{name} {path}", why, f"Make one with {maker}.")
    if model := options.get("model"):
        from ..diffusion.bundle import local_model

        local_model(model)


def _listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]
