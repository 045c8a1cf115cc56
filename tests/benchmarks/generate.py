"""`generate` beside diffusers' StableDiffusionPipeline called in the obvious loop, PNG written.

The same model, DDIM, steps, CFG and precision. The loop draws class by class in batches, as users
write it; ours draws every class in mixed batches and encodes off the critical path.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from utilgen_cli.diffusion.bundle import find_model
from utilgen_cli.diffusion.generate import GenerateConfig, Generator
from utilgen_cli.diffusion.utilisation import image_flops, matrix_rate
from utilgen_cli.shards.writer import write_shard

from .harness import interleaved, record, table

CLASSES, PER_CLASS, STEPS, SCALE = 2, 16, 20, 2.0
BATCHES = (1, 4, 8, 16)
REPEATS, WARM = 2, 1


def peer(pipe: StableDiffusionPipeline, prompts: list[str], batch: int, out: Path) -> None:
    for prompt in prompts:
        for first in range(0, PER_CLASS, batch):
            drawn = pipe(
                prompt, num_images_per_prompt=min(batch, PER_CLASS - first), height=32, width=32,
                num_inference_steps=STEPS, guidance_scale=SCALE,
            ).images  # fmt: skip
            for i, image in enumerate(drawn):
                image.save(out / f"{abs(hash(prompt))}-{first + i}.png")


def main() -> None:
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        out = Path(name)
        pipe = StableDiffusionPipeline.from_pretrained(find_model("tiny"), dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        config = GenerateConfig("tiny", steps=STEPS, guidance_scale=SCALE)
        ours = Generator(config, device=torch.device("cpu"), dtype=torch.float32)
        prompts = [f"a photo of a {name}" for name in (ours.model.classes or [])[:CLASSES]]
        plan = [(c, i) for i in range(PER_CLASS) for c in range(CLASSES)]

        def loop(batch: int) -> Callable[[], None]:
            return lambda: peer(pipe, prompts, batch, out)

        sides = {f"diffusers loop, batch {b}": loop(b) for b in BATCHES}
        sides["utilgen generate"] = lambda: write_shard(out / "00000.tar", ours.draw(plan)) and None
        timings = interleaved(sides, REPEATS, WARM)
        flops = image_flops(ours.model, STEPS, SCALE)
        floor = flops / matrix_rate(torch.device("cpu"), torch.float32)
        body = (
            f"{table(timings, 'utilgen generate')}\n\n{flops / 1e9:.3g} GFLOP an image; "
            f"{1 / floor:.1f} images/s if all ran at the rate of matrix products"
        )
        images = CLASSES * PER_CLASS
        record(f"Generate {images} images, tiny, {STEPS} DDIM steps, CFG {SCALE:g}", body)


if __name__ == "__main__":
    main()
