"""Peak memory of `ilpo` at the size of Stable Diffusion 2.1: random weights, fp32, on the CPU.

    python -m tests.benchmarks ilpo_memory [--size 512] [--search-steps 5]

The prompts of two classes climb one step of utility by a ResNet-50, with the U-Net and the VAE
recomputed (`--checkpointing --chunk 1`), and one image a class is drawn with noise optimisation. What the
process holds at its highest is told; the small CLIP of the tiny bundle guards.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

import utilgen_cli
from utilgen_cli.runtime.files import encode_json
from utilgen_cli.shards.images import encode_image
from utilgen_cli.shards.sample import Sample
from utilgen_cli.shards.writer import write_shard

from .dpo_peer import make_model
from .harness import record, run

CLASSES = ["a", "b"]
CLIP = Path(utilgen_cli.__file__).parent / "tiny" / "open_clip"  # the guard's; a small one


def noise_pictures(size: int, per_class: int) -> Iterator[Sample]:
    rng = np.random.default_rng(0)
    for i in range(per_class * len(CLASSES)):
        picture = rng.integers(0, 256 if i % 2 else 100, (size, size, 3), np.uint8)
        facts = encode_json({"class_name": CLASSES[i % 2]})
        yield Sample(f"{i:03d}", {"png": encode_image(picture, "png"), "cls": str(i % 2).encode(),
                                  "json": facts})  # fmt: skip


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument(
        "--divide", type=int, default=1, help="every width divided by this: a trial"
    )
    parser.add_argument("--search-steps", type=int, default=5)
    args = parser.parse_args(list(arguments))
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_model(work / "model", args.size, args.divide)
        facts = {"size": args.size, "classes": CLASSES}
        (work / "model" / "utilgen.json").write_text(encode_json(facts).decode())
        (work / "real").mkdir()
        write_shard(work / "real" / "00000.tar", noise_pictures(args.size, 4))
        utilgen = [sys.executable, "-m", "utilgen_cli"]
        where = ["-m", str(work / "model"), "-q", "--per-class", "1", "--steps", "2"]
        run([*utilgen, "value", "train", "--real", str(work / "real"), "--arch", "resnet50",
             "--size", "64", "--smoke", "-q", "-o", str(work / "value")], work / "value.log")  # fmt: skip
        used, _, peak = run(
            [*utilgen, "ilpo", *where, "--value", str(work / "value"), "--clip-weight", "0", "--clip", str(CLIP),
             "--population", "1", "--iterations", "1", "--search-steps", str(args.search_steps),
             "--checkpointing", "--chunk", "1", "--noise", "single", "-o", str(work / "out")],
            work / "ilpo.log",
        )  # fmt: skip
    line = (
        f"{peak:,.0f} MiB at its highest, imports and weights included; {used:.0f} processor seconds. "
        f"{args.search_steps} sampling steps while optimising, guidance as the model's default; "
        "the graph of one image at a time is held."
    )
    record(f"ilpo at SD 2.1's size, widths divided by {args.divide}, {args.size} px", line)


if __name__ == "__main__":
    main(sys.argv[1:])
