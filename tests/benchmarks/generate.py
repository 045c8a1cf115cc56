"""`generate` beside diffusers' StableDiffusionPipeline called in the obvious loop, PNG written.

    python -m tests.benchmarks generate                    the tiny bundle
    python -m tests.benchmarks generate --divide 1 [--size 512 --steps 25 --scale 7.5 --batches 1 4 8 16]
                                                           SD 2.1 with random weights: for a GPU

The same model, DDIM, steps, CFG and precision. The loop draws class by class in batches, as users
write it; ours draws every class in mixed batches and encodes off the critical path. With --compile
ours runs a second time with its U-Net compiled; what compiling takes is told, not counted.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from utilgen_cli.diffusion.bundle import find_model
from utilgen_cli.diffusion.generate import GenerateConfig, Generator
from utilgen_cli.diffusion.utilisation import image_flops, matrix_rate
from utilgen_cli.runtime.device import pick_device, pick_dtype
from utilgen_cli.shards.writer import write_shard

from .dpo_peer import make_model
from .harness import interleaved, record, table

CLASSES = 2


def peer(
    pipe: StableDiffusionPipeline, prompts: list[str], batch: int, args: argparse.Namespace,
    size: int, out: Path,
) -> None:  # fmt: skip
    for prompt in prompts:
        for first in range(0, args.per_class, batch):
            drawn = pipe(
                prompt, num_images_per_prompt=min(batch, args.per_class - first), height=size,
                width=size, num_inference_steps=args.steps, guidance_scale=args.scale,
            ).images  # fmt: skip
            for i, image in enumerate(drawn):
                image.save(out / f"{abs(hash(prompt))}-{first + i}.png")


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser("generate")
    parser.add_argument("--divide", type=int, help="SD 2.1, every width divided by this")
    parser.add_argument("--size", type=int, default=512, help="pixels a side, with --divide")
    parser.add_argument("--model", type=Path, help="where it is made, or was by a run before")
    parser.add_argument("--per-class", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--scale", type=float, default=2.0)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 4, 8, 16])
    parser.add_argument("--precision")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args(list(arguments))
    device = pick_device()
    dtype = pick_dtype(args.precision, device)
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        out, model = Path(name), find_model("tiny")
        if args.divide:
            model = args.model or out / "model"
            make_model(model, args.size, args.divide, ["a", "b"])
        pipe = StableDiffusionPipeline.from_pretrained(model, dtype=dtype).to(device)
        pipe.set_progress_bar_config(disable=True)

        def loaded(compile: bool) -> Generator:
            config = GenerateConfig(
                str(model), steps=args.steps, guidance_scale=args.scale, compile=compile
            )
            return Generator(config, device=device, dtype=dtype)

        ours = loaded(False)
        size, prompts = ours.model.size, ours.prompts[:CLASSES]
        plan = [(c, i) for i in range(args.per_class) for c in range(CLASSES)]

        def loop(batch: int) -> Callable[[], None]:
            return lambda: peer(pipe, prompts, batch, args, size, out)

        def draw(generator: Generator) -> Callable[[], object]:
            return lambda: write_shard(out / "00000.tar", generator.draw(plan))

        sides: dict[str, Callable[[], object]] = {
            f"diffusers loop, batch {b}": loop(b) for b in args.batches
        }
        sides["utilgen generate"] = draw(ours)
        if args.compile:
            start = time.monotonic()
            sides["utilgen generate --compile"] = draw(loaded(True))
            loading = time.monotonic() - start
        timings = interleaved(sides, args.repeats)
        flops = image_flops(ours.model, args.steps, args.scale)
        floor = flops / matrix_rate(device, dtype)
    precision, images = str(dtype).removeprefix("torch."), CLASSES * args.per_class
    lines = [
        table(timings, "utilgen generate"),
        f"{flops / 1e9:.3g} GFLOP an image; {1 / floor:.1f} images/s if all ran at the rate of "
        f"matrix products, {images / timings['utilgen generate'].median:.2f} as they were drawn",
    ]
    if args.compile:
        lines[-1] += f"; loading and compiling took {loading:.0f} s"
    lines.append(f"`python -m tests.benchmarks {' '.join(['generate', *arguments])}`")
    what = f"SD 2.1 (widths divided by {args.divide})" if args.divide else "tiny"
    title = f"Generate {images} images, {what}, {size} px, {args.steps} DDIM steps, CFG {args.scale:g}, {precision}"  # fmt: skip
    record(title, "\n\n".join(lines))


if __name__ == "__main__":
    main(sys.argv[1:])
