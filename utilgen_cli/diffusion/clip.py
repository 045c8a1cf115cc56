"""Any open_clip model as a judge of images: differentiable scores, and zero-shot labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as tv

from ..runtime.errors import NoInput, first_line
from ..runtime.offline import offline

AT_ONCE = 64  # real shots that are looked at in one go
MODES = ("bicubic", "bilinear")


@dataclass
class ClipModel:
    """An open_clip model with its preprocessing, differentiable with respect to the images."""

    name: str
    model: nn.Module
    tokenize: Callable[[Sequence[str]], Tensor]
    size: int  # pixels a side
    mean: Tensor  # [1, 3, 1, 1]
    std: Tensor  # [1, 3, 1, 1]
    interpolation: str
    squash: bool  # resize both sides to `size`; otherwise the shorter one, then crop the centre

    def preprocess(self, images_bchw: Tensor) -> Tensor:
        """Resize (antialiased, as PIL does) and normalise images in [0, 1]: [B, 3, size, size]."""
        x = resize(images_bchw.float(), self.size, self.interpolation, self.squash)
        return (x.clamp(0, 1) - self.mean) / self.std

    def image_embeds(self, images_bchw: Tensor) -> Tensor:
        """Unit image embeddings [B, D] of images in [0, 1]; differentiable."""
        features = self.model.encode_image(self.preprocess(images_bchw))  # type: ignore[operator]
        return F.normalize(features, dim=-1)

    @torch.no_grad()
    def text_embeds(self, texts: Sequence[str]) -> Tensor:
        """Unit text embeddings [P, D]."""
        ids = self.tokenize(list(texts)).to(self.mean.device)
        return F.normalize(self.model.encode_text(ids), dim=-1)  # type: ignore[operator]

    @torch.no_grad()
    def zero_shot(self, images_bchw: Tensor, text_embeds: Tensor) -> Tensor:
        """The most similar text for each image: indices [B]."""
        return (self.image_embeds(images_bchw) @ text_embeds.T).argmax(1)


def resize(x_bchw: Tensor, size: int, mode: str, squash: bool) -> Tensor:
    """Resize to [B, 3, size, size]; unless `squash`, keep the aspect and crop the centre."""
    sides = [size, size] if squash else [size]
    x_bchw = tv.resize(x_bchw, sides, tv.InterpolationMode(mode), antialias=True)
    return tv.center_crop(x_bchw, [size, size])


def load_clip(name: str, device: torch.device | str = "cpu") -> ClipModel:
    """Load an open_clip model: a directory, `hf-hub:...`, NAME, or NAME:PRETRAINED.

    Raises NoInput when the name is unknown or the weights cannot be had.
    """
    import open_clip

    identifier, pretrained = resolve(name)
    local = identifier.startswith("local-dir:")
    # what OpenAI trained has another activation, of which a name alone says nothing
    quick = bool(open_clip.get_pretrained_cfg(identifier, pretrained or "").get("quick_gelu"))
    try:
        with offline() if local else nullcontext():
            model = open_clip.create_model(
                identifier, pretrained=pretrained, device=device, require_pretrained=local,
                force_quick_gelu=quick,
            )  # fmt: skip
            tokenizer = open_clip.get_tokenizer(identifier)
    except Exception as error:  # open_clip, the hub and the file system each raise their own
        raise NoInput(
            f"open_clip model {name!r}", first_line(error),
            "Name a local open_clip directory with --clip, or NAME:PRETRAINED as open_clip has it.",
        ) from None  # fmt: skip
    facts: dict[str, Any] = open_clip.get_model_preprocess_cfg(model)
    size = facts["size"] if isinstance(facts["size"], int) else facts["size"][0]

    def channelwise(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=device).view(1, 3, 1, 1)

    return ClipModel(
        name, model.eval().requires_grad_(False), tokenizer, size,
        channelwise(facts["mean"]), channelwise(facts["std"]),
        facts["interpolation"] if facts["interpolation"] in MODES else "bicubic",
        facts["resize_mode"] == "squash",
    )  # fmt: skip


def resolve(name: str) -> tuple[str, str | None]:
    """What open_clip calls `name`: (model identifier, pretrained tag or None)."""
    import open_clip

    if Path(name).is_dir():
        return f"local-dir:{Path(name).resolve()}", None
    if name.startswith(("hf-hub:", "local-dir:")):
        return name, None
    model, _, tag = name.partition(":")
    tags = open_clip.list_pretrained_tags_by_model(model)
    return model, tag or (tags[0] if tags else None)


def image_text_score(clip: ClipModel, texts: Sequence[str]) -> Callable[[Tensor, Tensor], Tensor]:
    """images, labels -> cos(image, text of the class) [B]: 1 - L_CLIP of the paper."""
    embeds = clip.text_embeds(texts)

    def score(images: Tensor, labels: Tensor) -> Tensor:
        return (clip.image_embeds(images) * embeds[labels]).sum(1)

    return score


def image_image_score(
    clip: ClipModel, shots: Tensor, shot_labels: Tensor
) -> Callable[[Tensor, Tensor], Tensor]:
    """images, labels -> mean cos(image, real shots of its class) [B]; shots are [N, 3, H, W]."""
    with torch.no_grad():
        embeds = torch.cat([clip.image_embeds(part) for part in shots.split(AT_ONCE)])
    classes = int(shot_labels.max()) + 1
    centres = torch.stack([embeds[shot_labels == c].mean(0) for c in range(classes)])

    def score(images: Tensor, labels: Tensor) -> Tensor:
        return (clip.image_embeds(images) * centres[labels]).sum(1)

    return score
