"""What Stable Diffusion 2.1 costs in floating-point operations, counted on tensors without values.

    python -m tests.benchmarks operations [--size 512 --steps 25 --divide 1]

Our own code runs on the device `meta`, under torch's counter, so the counts are exact and need no
GPU: matrix products, convolutions and attention, two operations a multiply-add. The classifier and
the text encoder (once a class) are not counted.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

from utilgen_cli.diffusion.ddim import sample
from utilgen_cli.diffusion.instance import InstanceConfig
from utilgen_cli.diffusion.load import LatentDiffusion
from utilgen_cli.diffusion.noise import NoiseConfig, sample_optimised
from utilgen_cli.diffusion.rollout import Rollout

from ..random_bundle import make_scheduler
from .dpo_peer import make_unet, make_vae
from .harness import record
from .ilpo import CLASSES, IMAGES

HOURS = 4.7  # of the paper's cost headline
H100 = 989  # TFLOP/s of dense bf16 products, by its maker's data sheet


def on_meta(size: int, divide: int) -> LatentDiffusion:
    """The model without values: what draws, not what encodes text."""
    with torch.device("meta"):
        unet, vae = make_unet(size, divide), make_vae(size, divide)
    return LatentDiffusion(
        "SD 2.1", None, None, vae.requires_grad_(False), unet.requires_grad_(False),
        make_scheduler("v_prediction"), size, 25, 7.5, None, "", None,
        torch.device("meta"), torch.float32,
    )  # fmt: skip


def tera(work: Callable[[], object]) -> float:
    """Operations of the work, in 10^12."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e12


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser("operations", description=__doc__)
    parser.add_argument("--divide", type=int, default=1, help="divide every width by this")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=25)
    args = parser.parse_args(list(arguments))
    model = on_meta(args.size, args.divide)
    x = torch.empty(1, *model.latent_shape, device="meta")
    cond = torch.empty(1, 77, model.unet.config.cross_attention_dim, device="meta")
    config = InstanceConfig()
    search = config.search
    rollout = Rollout(model, cond, config.sampling_steps, 7.5)

    def learn() -> None:
        chosen = set(range(rollout.steps))
        run, images = rollout.draw(x, cond, chosen)
        rollout.pull_back(run, cond, chosen, torch.zeros_like(images))

    def judge() -> None:
        with torch.no_grad():
            rollout.images(x, cond, set())

    with torch.no_grad():
        row = tera(lambda: model.unet(x, 0, cond))
        decode = tera(lambda: model.decode(x))
        plain = tera(lambda: sample(model, x, cond, cond, args.steps, 7.5))
        better = tera(
            lambda: sample_optimised(model, x, (cond, cond), args.steps, 7.5, NoiseConfig("single"))
        )
    learnt, judged = tera(learn), tera(judge)
    looks = search.iterations // search.evaluate_every + 1
    drawn = config.population * search.images * search.iterations
    a_class = drawn * learnt + looks * search.validation_images * judged
    whole = IMAGES * (better + decode) + CLASSES * a_class
    rate = whole / (HOURS * 3600)
    rows = [
        ("U-Net, one latent", row),
        ("VAE, one image decoded", decode),
        (f"`generate`: an image, {args.steps} steps under guidance", plain + decode),
        ("the same without the common part", args.steps * 2 * row + decode),
        (f"`ilpo`: an image, {args.steps} steps, noise optimised (single)", better + decode),
        (f"`ilpo`: a prompt's step, {rollout.steps} sampling steps, larger than a chunk", learnt),
        (f"`ilpo`: a class learnt ({drawn} such, {looks} looks)", a_class),
        (f"{IMAGES:,} images of {CLASSES} classes", whole),
    ]
    lines = ["| what | TFLOP |", "|---|---|", *(f"| {name} | {n:,.3f} |" for name, n in rows)]
    lines += [
        "",
        f"In {HOURS} h that is {rate:,.0f} TFLOP/s, {rate / H100:.0%} of the {H100} that an H100's "
        f"maker states for dense bf16; at all of them, {whole / H100 / 3600:.2f} h.",
        "",
        f"`python -m tests.benchmarks operations {' '.join(arguments)}`".replace(" `", "`"),
    ]
    record(f"Operations: SD 2.1 at {args.size} px, counted", "\n".join(lines))


if __name__ == "__main__":
    main()
