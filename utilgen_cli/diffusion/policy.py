"""A learnt policy (of `ilpo`, or `invert --population`): M prompt embeddings a class, and how to
treat the starting noise.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .. import __version__
from ..runtime.artefact import seal
from ..runtime.checkpoint import save_tensors
from ..runtime.device import sent
from ..runtime.errors import BadInput, NoInput
from ..runtime.files import write_json
from .noise import NoiseConfig, sample_optimised

if TYPE_CHECKING:
    from .load import LatentDiffusion

FORMAT = 1
EMBEDS, FACTS = "policy.safetensors", "policy.json"


@dataclass
class Policy:
    """Image i of class c is drawn with member i mod M of its class."""

    prompt_embeds: Tensor  # [C, M, L, D], float32
    classes: list[str]
    prompts: list[str]  # what each class started from
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    settings: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    unnamed: frozenset[int] = frozenset()  # stand in `classes` by their number

    def members(self, items: Sequence[tuple[int, int]]) -> list[int]:
        """The member that draws each (class index, image index)."""
        return [image % self.prompt_embeds.shape[1] for _, image in items]

    def embeds(self, items: Sequence[tuple[int, int]]) -> Tensor:
        """Prompt embeddings [B, L, D] for (class index, image index) items."""
        classes = [c for c, _ in items]
        return self.prompt_embeds[classes, self.members(items)]

    def check(self, model: LatentDiffusion, classes: Sequence[str], name: str = "policy") -> None:
        """BadInput unless the policy was learnt for this text width and these classes."""
        width, found = model.unet.config.cross_attention_dim, self.prompt_embeds.shape[-1]
        if found != width:
            raise BadInput(
                name,
                f"has embeddings of width {found}, {model.name} takes {width}",
                "Use it with the model that it was learnt on.",
            )
        if list(classes) != self.classes:
            raise BadInput(
                name, "was learnt for other classes", f"Add --classes {','.join(self.classes)}."
            )

    def sample(
        self,
        model: LatentDiffusion,
        noise: Tensor,
        items: Sequence[tuple[int, int]],
        uncond: Tensor,
        steps: int,
        guidance_scale: float,
        sampler: str = "ddim",
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents [B, 4, h, w] of the items from their starting noise, and figures of the noise."""
        prompts = (sent(self.embeds(items), noise.device).to(model.dtype), uncond)
        return sample_optimised(model, noise, prompts, steps, guidance_scale, self.noise, sampler)

    def save(self, directory: Path) -> None:
        """Write policy.safetensors, then policy.json, which marks the policy as whole."""
        directory.mkdir(parents=True, exist_ok=True)
        save_tensors(directory / EMBEDS, {"prompt_embeds": self.prompt_embeds})
        seal(directory)
        facts = {
            "format": FORMAT,
            "utilgen": __version__,
            "classes": self.classes,
            "prompts": self.prompts,
            "population": self.prompt_embeds.shape[1],
            "noise": self.noise.facts(),
            "settings": self.settings,
            "summary": self.summary,
            "history": self.history,
            **({"unnamed": sorted(self.unnamed)} if self.unnamed else {}),
        }
        write_json(directory / FACTS, facts)


def policy_facts(path: Path) -> dict[str, Any]:
    """What policy.json says, unchecked: nothing where it is missing or none."""
    try:
        found = json.loads((path / FACTS).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def load_policy(path: Path | str) -> Policy:
    """Read what `Policy.save` wrote. NoInput if it is not there, BadInput if it is not a policy."""
    path = Path(path)
    if not (path / FACTS).exists():
        raise NoInput(
            str(path), "holds no policy.json", "Make one with utilgen ilpo --save-policy."
        )
    try:
        facts = json.loads((path / FACTS).read_text())
        embeds = load_file(path / EMBEDS)["prompt_embeds"].to(torch.float32)
        if facts["format"] != FORMAT or embeds.dim() != 4:
            raise ValueError("unknown format")
        return Policy(
            embeds, list(facts["classes"]), list(facts["prompts"]), NoiseConfig(**facts["noise"]),
            facts["settings"], facts["history"], facts["summary"],
            frozenset(facts.get("unnamed", ())),
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise BadInput(
            str(path), f"not a policy ({error})", "Make it anew with utilgen ilpo."
        ) from None
