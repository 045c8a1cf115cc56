"""Model FLOPs utilisation: the operations a picture needs, over what matrix products reach."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from torch.utils.flop_counter import FlopCounterMode

from .guidance import guided_output

if TYPE_CHECKING:
    from .load import LatentDiffusion


@torch.no_grad()
def image_flops(model: LatentDiffusion, steps: int, guidance_scale: float) -> int:
    """Floating-point operations of one image: `steps` U-Net calls (under guidance of two rows) and
    one decoding; counted on one image of each."""
    x = torch.zeros(1, *model.latent_shape, device=model.device)
    text = torch.zeros(
        1, model.tokenizer.model_max_length, model.unet.config.cross_attention_dim,
        device=model.device,
    )  # fmt: skip
    with torch.compiler.set_stance("force_eager"):
        with FlopCounterMode(display=False) as denoising:
            guided_output(model, x, 0, text, text, guidance_scale)
        with FlopCounterMode(display=False) as decoding:
            model.decode(x)
    return steps * denoising.get_total_flops() + decoding.get_total_flops()


@torch.no_grad()
def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large square matrix product: the best of three.

    On the CPU by processor time, so that what others run there does not lower it.
    """

    def now() -> float:
        if device.type == "cpu":
            return time.process_time() / torch.get_num_threads()
        return time.perf_counter()

    n = 8192 if device.type == "cuda" else 768
    a = torch.randn(n, n, device=device).to(dtype)
    best = float("inf")
    for _ in range(4):  # the first one warms up
        start = now()
        product = a @ a
        product[0, 0].item()  # waits for the device
        best = min(best, now() - start)
    return 2 * n**3 / best
