"""Preferences as a trainer needs them: cached latents, prompts, and a held-out part.

They come as pairs of images, or (for KTO) as single scored images of which some are desirable.
"""

from __future__ import annotations

import hashlib
import math
import re
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..runtime import signals
from ..runtime.errors import BadInput, UsageError
from ..runtime.progress import Progress, silent
from ..runtime.seeds import step_generator
from ..shards.quarantine import check_any
from ..shards.sample import BadSample, Sample
from ..shards.scores import UTILITY, utility_of
from .latents import LatentCache, index_prompts

if TYPE_CHECKING:
    from .load import LatentDiffusion, TokenPrompts

CLASS_TOKEN = re.compile(r"<utilgen-\d{4}>")
MAX_HELD_OUT = 128


@dataclass(frozen=True, slots=True)
class Judged:
    """(winner, loser), or one image with its utility; and what they are of."""

    images: tuple[Sample, ...]
    label: int | None
    prompt: str | None
    class_name: str | None
    utility: float | None = None


@dataclass(frozen=True, slots=True)
class Preferences:
    """latents float32 [N, sides, variants (plain, mirrored), C, h, w]; prompt_index [N].

    Pairs have two sides (win, lose) and `sign` None. Single images have one side; their sign [N]
    is 1 (desirable), -1 (undesirable) or 0 (unused).
    """

    latents: Tensor
    prompts: list[str]
    prompt_index: Tensor
    fingerprint: str
    sign: Tensor | None = None

    def __len__(self) -> int:
        """How many can be learned from."""
        return len(self.prompt_index) if self.sign is None else int((self.sign != 0).sum())


def check_judged(sample: Sample) -> None:
    """BadSample unless it can be learned from as it is. BadInput: it is of another kind."""
    check_any(sample)
    for image in parse_judged(sample).images:
        _ = image.image


def parse_judged(sample: Sample) -> Judged:
    """A sample of `pairs`, in either layout, or one of `value score`. BadInput if it is none."""
    if "jpg_0" in sample.members or "jpg_1" in sample.members:
        return _parse_pickapic(sample)
    facts = sample.facts
    about = sample.label, facts.get("prompt"), facts.get("class_name")
    sides = {}
    for name, data in sample.members.items():
        side, _, extension = name.partition(".")
        if side in ("win", "lose") and extension:
            sides[side] = Sample(f"{sample.key} ({side})", {extension: data}, sample.origin)
    if len(sides) == 2:
        return Judged((sides["win"], sides["lose"]), *about)
    if UTILITY in sample.members:
        return Judged((sample,), *about, utility_of(sample))
    if sides:
        raise _half(sample, *sides)
    raise BadInput(sample.key, "it has no win and lose images", "Make pairs with `utilgen pairs`.")


def _half(sample: Sample, *sides: str) -> BadSample:
    return sample.bad(f"of its two images it has only {', '.join(sides)}", "half a pair")


def _parse_pickapic(sample: Sample) -> Judged:
    names = [name for name in ("jpg_0", "jpg_1") if name in sample.members]
    if len(names) < 2:
        raise _half(sample, *names)
    first, second = (
        Sample(f"{sample.key} ({name})", {"jpg": sample.members[name]}, sample.origin)
        for name in names
    )
    preferred = sample.members.get("label_0", b"").strip()
    if preferred not in (b"0", b"1", b"0.0", b"1.0"):
        raise sample.bad("its label_0 is neither 0 nor 1")
    if float(preferred) == 0:
        first, second = second, first
    try:
        caption = sample.members.get("caption", b"").decode() or None
    except UnicodeDecodeError:
        raise sample.bad("its caption is not UTF-8") from None
    return Judged((first, second), None, caption, None)


def prompt_of(judged: Judged, tokens: TokenPrompts | None, template: str) -> str:
    """The class token's prompt where tokens are given, else the images' own, else the class name's.

    BadInput: its prompt has a class token and none are given (it would mean nothing to the model),
    its class has no token, or there is nothing to say.
    """
    key = judged.images[0].key
    if tokens is not None and judged.label is not None:
        return tokens.of(judged.images[0], judged.label, judged.class_name)
    if judged.prompt:
        if token := CLASS_TOKEN.search(judged.prompt):
            why = f"its prompt has the class token {token[0]}, and no tokens are given"
            raise BadInput(key, why, "Add --tokens with those that it was drawn with.")
        return judged.prompt
    if judged.class_name:
        return template.replace("{}", judged.class_name)
    raise BadInput(key, "it has neither prompt nor class name", "Add --tokens.")


def read_preferences(
    samples: Iterable[Sample],
    model: LatentDiffusion,
    prompt: Callable[[Judged], str],
    *,
    loss: str = "dpo",
    desirable: str = "quantile:0.25",
    flip: bool = False,
    progress: Progress = silent,
) -> Preferences:
    """Encode every image once. BadInput: nothing to learn from, or what `loss` cannot take."""
    cache, digest = LatentCache(model, flip), hashlib.blake2b(digest_size=16)
    prompts: list[str] = []
    utilities, labels = array("d"), array("q")
    with progress("read pairs", None) as task:
        for sample in samples:
            signals.check()
            judged = parse_judged(sample)
            single = judged.utility is not None
            _check_kind(judged, loss, mixed=bool(prompts) and single != bool(utilities))
            prompts.append(prompt(judged))
            if judged.utility is not None:
                utilities.append(judged.utility)
                labels.append(sample.label)
            for image in judged.images:
                cache.add(image)
                digest.update(image.image[1])
            digest.update(prompts[-1].encode())
            task.advance()
    if not prompts:
        raise BadInput("pairs", "there are none", "Look at what `utilgen pairs` says.")
    sign = None
    if utilities:
        sign = signs(np.array(utilities), np.array(labels), desirable)
        digest.update(sign.numpy().tobytes())
    known, index = index_prompts(prompts)
    latents = cache.finish().unflatten(0, (-1, 2 if sign is None else 1))
    return Preferences(latents, known, index, digest.hexdigest(), sign)


def _check_kind(judged: Judged, loss: str, mixed: bool) -> None:
    key, single = judged.images[0].key, judged.utility is not None
    if single and loss != "kto":
        advice = "Make pairs with `utilgen pairs`, or learn from single images with --loss kto."
        raise BadInput(key, f"it is a scored sample, and --loss {loss} compares pairs", advice)
    if mixed:
        raise BadInput(key, "pairs and scored samples are mixed", "Use one kind at a time.")


def parse_desirable(text: str) -> tuple[str, float]:
    """(`quantile` or `above`, its number) from `--desirable`. UsageError: not understood."""
    kind, _, number = text.partition(":")
    advice = "Use quantile:Q (Q to 0.5) or above:U (above:0 is the sign)."
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if kind not in ("quantile", "above") or not math.isfinite(value):
        raise UsageError(f"--desirable {text}", "not understood", advice)
    if kind == "quantile" and not 0 < value <= 0.5:
        raise UsageError(f"--desirable {text}", "the share is not in (0, 0.5]", advice)
    return kind, value


def signs(utility: np.ndarray, label: np.ndarray, desirable: str) -> Tensor:
    """1 where an image is desirable, -1 where it is not, 0 where it is left out; float [N].

    quantile:Q takes the upper and lower share of every class, above:U divides all images.
    BadInput if one side is empty.
    """
    kind, number = parse_desirable(desirable)
    sign = np.where(utility > number, 1.0, -1.0) if kind == "above" else np.zeros(len(utility))
    for c in np.unique(label) if kind == "quantile" else ():
        members = np.flatnonzero(label == c)
        order = members[np.argsort(-utility[members], kind="stable")]
        count = min(max(1, int(number * len(order))), len(order) // 2)
        high, low = order[:count], order[len(order) - count :]
        if count and utility[high[-1]] > utility[low[0]]:
            sign[high], sign[low] = 1.0, -1.0
    wanted, unwanted = int((sign > 0).sum()), int((sign < 0).sum())
    if not wanted or not unwanted:
        why = f"--desirable {desirable} makes {wanted} desirable and {unwanted} undesirable samples"
        raise BadInput("utilities", why, "Use e.g. --desirable quantile:0.25.")
    return torch.from_numpy(sign).float()


def split_rows(preferences: Preferences, seed: int) -> tuple[Tensor, Tensor]:
    """(training rows, held-out rows): an eighth is held out, 128 at most, none below 16.

    Of single images an eighth of each sign is.
    """
    if preferences.sign is None:
        sides = [torch.arange(len(preferences))]
    else:
        sides = [torch.nonzero(preferences.sign == s).flatten() for s in (1, -1)]
    train, held_out = [], []
    for rows in sides:
        order = rows[torch.randperm(len(rows), generator=step_generator(seed, 0, "held-out"))]
        count = min(MAX_HELD_OUT // len(sides), len(rows) // 8) if len(preferences) >= 16 else 0
        held_out.append(order[:count])
        train.append(order[count:])
    if any(len(rows) == 0 for rows in held_out):
        train, held_out = train + held_out, [torch.empty(0, dtype=torch.long)]
    return torch.cat(train).sort().values, torch.cat(held_out).sort().values
