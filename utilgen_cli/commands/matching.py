"""What `pairs --match clip` compares images by."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..runtime.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from ..valuation.pairing import PairingConfig


def describer(
    clip: str | None, config: PairingConfig
) -> Callable[[list[np.ndarray]], np.ndarray] | None:
    """Images -> CLIP embeddings, if that is how to match."""
    if config.match != "clip":
        if clip is not None:
            raise UsageError("--clip", "is for --strategy nearest --match clip", "Leave it out.")
        return None
    if clip is None:
        raise UsageError("--match clip", "names no model", "Add --clip NAME or --clip DIRECTORY.")
    return clip_embeddings(clip)


def clip_embeddings(name: str) -> Callable[[list[np.ndarray]], np.ndarray]:
    """Unit image embeddings, float32 [N, D], of uint8 images of any sizes."""
    import torch

    from ..diffusion.clip import load_clip
    from ..runtime.device import pick_device

    device = pick_device()
    model = load_clip(name, device)

    @torch.no_grad()
    def embed(images: list[np.ndarray]) -> np.ndarray:
        sized = [
            model.preprocess(torch.from_numpy(x.copy()).to(device).permute(2, 0, 1)[None] / 255)
            for x in images
        ]
        found = model.model.encode_image(torch.cat(sized))  # type: ignore[operator]
        rows: np.ndarray = torch.nn.functional.normalize(found, dim=-1).float().cpu().numpy()
        return rows

    return embed
