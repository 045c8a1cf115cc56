"""Preference pairs as a trainer needs them: cached latents, prompts, and a held-out part."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..runtime import signals
from ..runtime.errors import BadInput
from ..runtime.progress import Progress, silent
from ..runtime.seeds import step_generator
from ..shards.sample import Sample
from .latents import LatentCache, index_prompts

if TYPE_CHECKING:
    from .load import LatentDiffusion

CLASS_TOKEN = re.compile(r"<utilgen-\d{4}(_\d+)?>")
MAX_HELD_OUT = 128


@dataclass(frozen=True, slots=True)
class Pair:
    """One pair: the two images as samples of one image member, and what they are of."""

    win: Sample
    lose: Sample
    label: int | None
    prompt: str | None
    class_name: str | None


@dataclass(frozen=True, slots=True)
class PairData:
    """latents float32 [N, 2 (win, lose), variants (plain, mirrored), C, h, w]; prompt_index [N]."""

    latents: Tensor
    prompts: list[str]
    prompt_index: Tensor
    fingerprint: str

    def __len__(self) -> int:
        return len(self.prompt_index)


def parse_pair(sample: Sample) -> Pair:
    """A sample of `pairs`, in either layout. BadInput if it is no pair."""
    if "jpg_0" in sample.members:
        return _parse_pickapic(sample)
    images = {}
    for name, data in sample.members.items():
        side, _, extension = name.partition(".")
        if side in ("win", "lose") and extension:
            images[side] = Sample(f"{sample.key} ({side})", {extension: data}, sample.origin)
    if len(images) != 2:
        raise BadInput(
            sample.key, "it has no win and lose images", "Make pairs with `utilgen pairs`."
        )
    facts = sample.facts
    return Pair(
        images["win"], images["lose"], sample.label, facts.get("prompt"), facts.get("class_name")
    )


def _parse_pickapic(sample: Sample) -> Pair:
    first, second = (
        Sample(f"{sample.key} ({name})", {"jpg": sample.members.get(name, b"")}, sample.origin)
        for name in ("jpg_0", "jpg_1")
    )
    preferred = sample.members.get("label_0", b"").strip()
    if preferred not in (b"0", b"1", b"0.0", b"1.0"):
        raise sample.bad("its label_0 is neither 0 nor 1")
    if float(preferred) == 0:
        first, second = second, first
    return Pair(first, second, None, sample.members.get("caption", b"").decode() or None, None)


def prompt_of(pair: Pair, class_prompts: list[str] | None, template: str) -> str:
    """The class token's prompt where tokens are given, else the pair's own.

    A prompt with class tokens means nothing to a model without them: then the class name stands
    in its place. BadInput if there is nothing to say.
    """
    if class_prompts is not None and pair.label is not None:
        if pair.label >= len(class_prompts):
            why = f"its class {pair.label} has no token"
            raise BadInput(pair.win.key, why, "Invert the same classes.")
        return class_prompts[pair.label]
    if pair.prompt and not CLASS_TOKEN.search(pair.prompt):
        return pair.prompt
    if pair.class_name:
        return template.replace("{}", pair.class_name)
    raise BadInput(pair.win.key, "it has neither prompt nor class name", "Add --tokens.")


def read_pairs(
    samples: Iterable[Sample],
    model: LatentDiffusion,
    prompt: Callable[[Pair], str],
    *,
    flip: bool = False,
    progress: Progress = silent,
) -> PairData:
    """Encode every image once. BadInput: no pair, or something that is none."""
    cache, digest = LatentCache(model, flip), hashlib.blake2b(digest_size=16)
    prompts = []
    with progress("read pairs", None) as task:
        for sample in samples:
            signals.check()
            pair = parse_pair(sample)
            prompts.append(prompt(pair))
            for side in (pair.win, pair.lose):
                cache.add(side)
                digest.update(side.image[1])
            digest.update(prompts[-1].encode())
            task.advance()
    if not prompts:
        raise BadInput("pairs", "there are none", "Look at what `utilgen pairs` says.")
    latents = cache.finish()
    known, index = index_prompts(prompts)
    return PairData(latents.unflatten(0, (-1, 2)), known, index, digest.hexdigest())


def split_pairs(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """(training rows, held-out rows): an eighth is held out, 128 at most, none below 16 pairs."""
    order = torch.randperm(count, generator=step_generator(seed, 0, "held-out"))
    held_out = min(MAX_HELD_OUT, count // 8) if count >= 16 else 0
    return order[held_out:].sort().values, order[:held_out].sort().values
