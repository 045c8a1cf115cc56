"""Class tokens: `invert`'s result, one textual-inversion file a class, and how a model takes them.

tokens/index.json                           classes, tokens, folders, vectors, how they were made
tokens/0007-sneaker/learned_embeds.safetensors   one key, "<utilgen-0007>": float [vectors, D]
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from ..runtime.artefact import seal
from ..runtime.checkpoint import save_tensors
from ..runtime.errors import BadInput, NoInput
from ..runtime.files import write_json
from .policy import FACTS as POLICY

if TYPE_CHECKING:
    from .load import LatentDiffusion

INDEX = "index.json"
EMBEDS = "learned_embeds.safetensors"


def token_name(class_index: int) -> str:
    """The placeholder token of a class."""
    return f"<utilgen-{class_index:04d}>"


def vector_names(token: str, vectors: int) -> list[str]:
    """The vocabulary entries of a token, as diffusers names those of a multi-vector token."""
    return [token, *(f"{token}_{i}" for i in range(1, vectors))]


def class_folder(class_index: int, class_name: str) -> str:
    """A directory name that is safe whatever the class is called: `0007-ankle-boot`."""
    ascii_name = unicodedata.normalize("NFKD", class_name).encode("ascii", "ignore").decode()
    slug = re.sub(r"[^A-Za-z0-9]+", "-", ascii_name).strip("-")[:40].lower()
    return f"{class_index:04d}-{slug}".rstrip("-")


def save_tokens(path: Path, classes: Sequence[str], embeds: Tensor, facts: dict[str, Any]) -> None:
    """Write embeds [C, V, D] of the classes; index.json comes last and says how they were made."""
    folders = [class_folder(i, name) for i, name in enumerate(classes)]
    tokens = [token_name(i) for i in range(len(classes))]
    for folder, token, vectors in zip(folders, tokens, embeds, strict=True):
        save_tensors(path / folder / EMBEDS, {token: vectors})
    seal(path)
    index = {"classes": list(classes), "tokens": tokens, "folders": folders}
    write_json(path / INDEX, {**facts, **index, "vectors": embeds.shape[1]})


def read_index(path: Path) -> dict[str, Any]:
    """tokens/index.json, checked: `classes`, `tokens` and `folders` of one length."""
    file = path / INDEX
    if not file.is_file():
        if (path / POLICY).exists():
            raise NoInput(f"tokens {path}", "holds whole prompts", "Draw them with --policy.")
        raise NoInput(f"tokens {path}", f"has no {INDEX}", "Make it with utilgen invert.")
    try:
        index: dict[str, Any] = json.loads(file.read_text())
        columns = [list(index[key]) for key in ("classes", "tokens", "folders")]
    except (ValueError, TypeError, KeyError) as error:
        raise BadInput(str(file), f"cannot be read ({error})") from None
    if len({len(column) for column in columns}) != 1 or not all(
        isinstance(name, str) for column in columns for name in column
    ):
        raise BadInput(str(file), "classes, tokens and folders do not match")
    if not all(re.fullmatch(r"[\w-]+", folder) for folder in index["folders"]):
        raise BadInput(str(file), "names a folder outside of it")
    return index


def load_tokens(path: Path) -> dict[str, Tensor]:
    """Token -> float [vectors, D] of every class, in class order."""
    index = read_index(path)
    return {
        token: _read_embeds(path / folder / EMBEDS, token)
        for token, folder in zip(index["tokens"], index["folders"], strict=True)
    }


def _read_embeds(file: Path, token: str) -> Tensor:
    try:
        tensors = load_safetensors(file.read_bytes())
    except (OSError, SafetensorError) as error:
        why = f"cannot be read ({error})"
        raise BadInput(str(file), why, "Run utilgen invert again.") from None
    if list(tensors) != [token]:
        raise BadInput(str(file), f"holds {sorted(tensors)}, not {token}")
    return tensors[token].reshape(-1, tensors[token].shape[-1]).float()


def add_tokens(model: LatentDiffusion, path: Path) -> None:
    """Teach tokenizer and text encoder the tokens of `path`, as load_textual_inversion does."""
    embeds = load_tokens(path)
    width = model.text_encoder.config.hidden_size
    if any(vectors.shape[1] != width for vectors in embeds.values()):
        raise BadInput(f"tokens {path}", f"were not made for model {model.name}", "Invert again.")
    extend_vocabulary(model, embeds)


def extend_vocabulary(model: LatentDiffusion, embeds: dict[str, Tensor]) -> Tensor:
    """Add each token with its vectors [V, D]; the new vocabulary ids come back, int64 [C, V]."""
    names = [name for token, v in embeds.items() for name in vector_names(token, len(v))]
    known = set(model.tokenizer.get_vocab())
    if taken := known.intersection(names):
        raise BadInput("tokens", f"{min(taken)} is in the tokenizer already")
    model.tokenizer.add_tokens(names)
    model.text_encoder.resize_token_embeddings(len(model.tokenizer), mean_resizing=False)
    ids = torch.tensor(model.tokenizer.convert_tokens_to_ids(names))
    weight = model.text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        weight[ids] = torch.cat(list(embeds.values())).to(weight)
    return ids.reshape(len(embeds), -1)
