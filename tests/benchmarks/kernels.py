"""Which kernels serve Stable Diffusion 2.1 here: attention and its gradient, and the memory layout.

    python -m tests.benchmarks kernels [--divide 1 --size 512 --rows 4 --precision bf16]

The first table holds the gradient that `ilpo` climbs, that of a U-Net call at its prompt, by each
of torch's attention kernels beside the plain one in float32: fused kernels with a wrong
gradient have been reported for H100s (pytorch issues 150700, 196678). The second has the time of a call and of a decode with rows or
channels innermost (`prefer_channels_last`), not compiled. Random weights; what a machine lacks is
left out.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from utilgen_cli.runtime.device import pick_device, pick_dtype

from .dpo_peer import make_unet, make_vae
from .harness import interleaved, record, table

PLAIN = SDPBackend.MATH
FUSED = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION)
LAYOUTS = {"rows innermost": torch.contiguous_format, "channels innermost": torch.channels_last}


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser("kernels", description=__doc__)
    parser.add_argument("--divide", type=int, default=1, help="divide every width by this")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--precision")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(list(arguments))
    device = pick_device()
    dtype = pick_dtype(args.precision, device)
    torch.manual_seed(0)
    unet, vae = (
        make(args.size, args.divide).to(device).requires_grad_(False)
        for make in (make_unet, make_vae)
    )
    side = args.size // 8
    x = torch.randn(args.rows, 4, side, side, device=device)
    prompt = torch.randn(args.rows, 77, unet.config.cross_attention_dim, device=device)

    def gradient() -> Tensor:
        leaf, kind = prompt.detach().requires_grad_(), unet.dtype
        output = unet(x.to(kind), torch.full((), 500, device=device), leaf.to(kind)).sample
        (found,) = torch.autograd.grad(output.float().square().mean(), leaf)
        return found

    with sdpa_kernel(PLAIN):
        true = gradient()
    unet.to(dtype), vae.to(dtype)
    usable: dict[str, Callable[[], Tensor]] = {}
    far = {}
    for kernel in (PLAIN, *FUSED):

        def once(kernel: SDPBackend = kernel) -> Tensor:
            with sdpa_kernel(kernel):
                return gradient()

        try:
            found = once()
        except RuntimeError:  # no such kernel here, or none for such heads
            continue
        far[kernel.name] = float((found - true).norm() / true.norm())
        usable[kernel.name] = once
    lines = [
        table(interleaved(usable, args.repeats), PLAIN.name, "ms", 1e3),
        "Relative distance of the gradient from the plain kernel's in float32: "
        + ", ".join(f"{name} {value:.2g}" for name, value in far.items()) + ".",
    ]  # fmt: skip

    @torch.no_grad()
    def call(module: nn.Module) -> None:
        if hasattr(module, "decode"):
            module.decode(x.to(dtype))
        else:
            module(x.to(dtype), torch.full((), 500, device=device), prompt.to(dtype))

    for what, module in (("A U-Net call", unet), ("A decode", vae)):
        laid = {name: copy.deepcopy(module).to(memory_format=how) for name, how in LAYOUTS.items()}
        sides = {name: partial(call, one) for name, one in laid.items()}
        timings = table(interleaved(sides, args.repeats), next(iter(sides)), "ms", 1e3)
        lines += [f"{what}, {args.rows} rows:", timings]
    lines.append(f"`python -m tests.benchmarks {' '.join(['kernels', *arguments])}`")
    title = f"Kernels: SD 2.1, widths divided by {args.divide}, {args.size} px, {str(dtype).removeprefix('torch.')}"
    record(title, "\n\n".join(lines))
