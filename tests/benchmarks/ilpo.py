"""Time, money and memory of `ilpo`: prompts learnt, noise optimised, images drawn.

    python -m tests.benchmarks ilpo                        the tiny bundle
    python -m tests.benchmarks ilpo --divide 1             Stable Diffusion 2.1 with random weights
        [--size 512 --classes 10 --images 500 --iterations 40 --chunk 1 ...]

What was measured is stretched to 50,000 images of 100 classes: learning goes with the classes,
drawing with the images. Twelve networks are climbed, the folds and snapshots that `value train` takes
by itself: small CNNs beside the tiny bundle, ResNet-50 at --scorer-size beside Stable Diffusion; the
small CLIP of the tiny bundle guards.
What the process holds at its highest is told, and on a GPU what torch held there.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from utilgen_cli.diffusion.bundle import find_model, read_defaults
from utilgen_cli.runtime.files import encode_json
from utilgen_cli.shards.images import encode_image
from utilgen_cli.shards.sample import Sample
from utilgen_cli.shards.writer import write_shard

from .dpo_peer import make_model_apart
from .harness import record, run

IMAGES, CLASSES = 50_000, 100  # of the paper's cost headline
PRICE = 2.50  # dollars for an hour of an H100
CLIP = find_model("tiny") / "open_clip"


def noise_pictures(size: int, classes: Sequence[str], per_class: int = 4) -> Iterator[Sample]:
    """Real "shots", enough for a value model."""
    rng = np.random.default_rng(0)
    for i in range(per_class * len(classes)):
        c = i % len(classes)
        picture = rng.integers(0, 20 + 230 * (c + 1) // len(classes), (size, size, 3), np.uint8)
        yield Sample(f"{i:06d}", {"png": encode_image(picture, "png"), "cls": str(c).encode(),
                                  "json": encode_json({"class_name": classes[c]})})  # fmt: skip


def told(found: dict[str, float], args: argparse.Namespace, classes: int) -> list[str]:
    """What the summary of a run says, as lines."""
    learning, drawing = found["learning_seconds"], found["seconds"]
    a_class, an_image = learning / classes, drawing / found["samples"]
    whole = CLASSES * a_class + IMAGES * an_image
    price = f", {whole / 3600 * PRICE:.2f} dollars at {PRICE:.2f} an hour"
    return [
        f"Prompts of {classes} classes learnt in {learning:.1f} s ({a_class:.2f} s a class: "
        f"{found['iterations']} iterations of {args.population} prompts, {args.search_steps} sampling "
        f"steps), {found['samples']:,} images drawn with noise optimised in {drawing:.1f} s "
        f"({an_image:.3f} s an image), on {found['device']} in {found['precision']}.",
        f"{IMAGES:,} images of {CLASSES} classes at this rate: {whole / 3600:.2f} h "
        f"({CLASSES * a_class / 3600:.2f} h to learn){price if found['device'] == 'cuda' else ''}.",
    ]


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser("ilpo", description=__doc__)
    parser.add_argument("--divide", type=int, help="SD 2.1, every width divided by this")
    parser.add_argument("--size", type=int, default=512, help="pixels a side, with --divide")
    parser.add_argument("--model", type=Path, help="where it is made, or was by a run before")
    parser.add_argument("--classes", type=int, default=10, help="with --divide")
    parser.add_argument("--scorer-size", type=int, default=64, help="with --divide, pixels a side")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--population", type=int, default=4)
    parser.add_argument("--search-steps", type=int, default=5)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--chunk", type=int)
    parser.add_argument("--precision")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args(list(arguments))
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if args.divide:
            names = [f"thing {c}" for c in range(args.classes)]
            model, size = str(args.model or work / "model"), args.size
            make_model_apart(Path(model), size, args.divide, names)
        else:
            model, bundle = "tiny", read_defaults(find_model("tiny"))
            names, size = bundle["classes"], bundle["size"]
        (work / "real").mkdir()
        write_shard(work / "real" / "00000.tar", noise_pictures(min(size, 64), names))
        utilgen = [sys.executable, "-m", "utilgen_cli"]
        scorer = ["--arch", "resnet50", "--size", str(args.scorer_size)] if args.divide else []
        run([*utilgen, "value", "train", "--real", str(work / "real"), *scorer, "--steps", "10",
             "-q", "-o", str(work / "value")], work / "value.log")  # fmt: skip
        facts = json.loads((work / "value" / "value.json").read_text())
        facts["canary"]["auroc"] = None  # noise and ten steps: nobody asks what it learnt
        (work / "value" / "value.json").write_bytes(encode_json(facts))
        options = {
            "--iterations": args.iterations, "--population": args.population, "--noise": "single",
            "--search-steps": args.search_steps, "--steps": args.steps,
            "--per-class": -(-args.images // len(names)), "--clip": CLIP, "--clip-weight": 0,
            "--classes": ",".join(names), "--max-fidelity-drop": 1,
            "--value": work / "value", "-m": model, "-o": work / "out",
        }  # fmt: skip
        words = [str(word) for pair in options.items() for word in pair]
        words += ["--precision", args.precision] if args.precision else []
        words += ["--chunk", str(args.chunk)] if args.chunk else []
        words += ["--compile"] * args.compile
        log = work / "ilpo.log"
        used, _, peak = run([*utilgen, "ilpo", *words, "-q", "--json"], log)
        found = json.loads(log.read_text().splitlines()[-1])
    lines = [
        *told(found, args, len(names)),
        f"{peak:,.0f} MiB at its highest, imports and weights included"
        + (f"; {found['gpu_peak_mib']:,} MiB on the GPU" if "gpu_peak_mib" in found else "")
        + f"; {used:,.0f} processor seconds in all.",
        f"`python -m tests.benchmarks ilpo {' '.join(arguments)}`",
    ]
    widths = f"SD 2.1, widths divided by {args.divide}" if args.divide else "the tiny bundle"
    record(f"ilpo: {widths}, {size} px, {args.steps} steps", "\n\n".join(lines))


if __name__ == "__main__":
    main(sys.argv[1:])
