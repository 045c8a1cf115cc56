"""One LoRA adapter a class (`lora --per class`): every row of a batch gets that of its class.

The low-rank parts of all classes are stacked, A [C, r, in] and B [C, out, r], so that a batch of
mixed classes takes two batched products more a layer, and no image depends on its neighbours.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..runtime.device import sent
from ..runtime.errors import BadInput
from .tokens import class_folder

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from .load import LatentDiffusion

FACTS = "lora.json"
WEIGHTS = "pytorch_lora_weights.safetensors"
_DOWN_UP = r"lora(?:_linear_layer)?\.(down|up)"  # as diffusers names them; or as peft does
KEY = re.compile(rf"(unet|text_encoder)\.(.+?)\.(?:{_DOWN_UP}|lora_(A|B))\.weight")


def class_folders(adapter: Path) -> dict[int, Path] | None:
    """Class index -> folder, if `adapter` holds one adapter a class."""
    try:
        facts = json.loads((adapter / FACTS).read_text())
        if facts["per"] != "class":
            return None
        return {int(name[:4]): adapter / name for name in facts["adapters"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None


class ClassAdapters:
    """Hooks on the adapted layers of a model; nothing changes outside of `acting`."""

    def __init__(self, model: LatentDiffusion, folders: dict[int, Path], name: str) -> None:
        self.name, self.index = name, {c: i for i, c in enumerate(sorted(folders))}
        self.device, self.folders = model.device, folders
        self._rows: Tensor | None = None
        stacks: dict[tuple[str, str], dict[str, list[Tensor]]] = {}
        for c in self.index:
            for (part, layer, side), weight in read_lora(folders[c]).items():
                stacks.setdefault((part, layer), {"A": [], "B": []})[side].append(weight)
        for (part, layer), sides in stacks.items():
            self._attach(model, part, layer, sides)

    def _attach(
        self, model: LatentDiffusion, part: str, layer: str, sides: dict[str, list[Tensor]]
    ) -> None:
        try:
            module = getattr(model, part).get_submodule(layer)
            a, b = (sent(torch.stack(sides[side]), self.device).to(model.dtype) for side in "AB")
            fits = len(a) == len(b) == len(self.index)
            fits = fits and (b.shape[1], a.shape[2]) == tuple(module.weight.shape)
        except (AttributeError, RuntimeError):
            fits = False
        if not fits:
            raise BadInput(f"adapter {self.name}", f"does not fit model {model.name} ({layer})")

        def add(_: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            if self._rows is None:
                return output
            x = inputs[0]  # [B, T, in]
            rows = self._rows.repeat(len(x) // len(self._rows))  # both halves of a guided batch
            return output + (x @ a[rows].mT) @ b[rows].mT

        module.register_forward_hook(add)

    @contextmanager
    def acting(self, classes: Sequence[int]) -> Iterator[None]:
        """Inside, row i of a batch (and of each repeat of it) has the adapter of `classes[i]`."""
        before = self._rows
        self._rows = sent(torch.tensor([self.index[int(c)] for c in classes]), self.device)
        try:
            yield
        finally:
            self._rows = before

    def check(self, classes: Sequence[str]) -> None:
        """BadInput unless there is an adapter for every class, and it is that of the class."""
        missing = [name for c, name in enumerate(classes) if c not in self.index]
        if missing:
            why = f"has no adapter for {', '.join(missing[:5])}"
            raise BadInput(f"adapter {self.name}", why, "Give `lora` shots of every class.")
        for c, name in enumerate(classes):
            if self.folders[c].name != class_folder(c, name):
                why = f"has {self.folders[c].name} where class {c} is {name!r}"
                raise BadInput(
                    f"adapter {self.name}", why, "Name the classes that it was made for."
                )


def acting(model: LatentDiffusion, classes: Sequence[int]) -> AbstractContextManager[None]:
    """`ClassAdapters.acting` of the model's, if it has any."""
    adapters = model.class_adapters
    return nullcontext() if adapters is None else adapters.acting(classes)


def read_lora(folder: Path) -> dict[tuple[str, str, str], Tensor]:
    """(unet or text_encoder, layer, A or B) -> weight. BadInput if it cannot be read."""
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        why = f"cannot be read ({error})"
        raise BadInput(f"adapter {folder}", why, "Run lora again.") from None
    found = {}
    for key, weight in tensors.items():
        match = KEY.fullmatch(key)
        if match is None:
            raise BadInput(f"adapter {folder}", f"has the unknown key {key}", "Run lora again.")
        part, layer, old, new = match.groups()
        found[part, layer, new or {"down": "A", "up": "B"}[old]] = weight
    return found
