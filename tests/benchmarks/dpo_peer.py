"""`dpo` beside diffusers' research script train_diffusion_dpo.py: the same model, pairs and steps.

    python -m tests.benchmarks dpo_peer --script PATH/train_diffusion_dpo.py [--divide 1 ...]

The script is run as it is, from examples/research_projects/diffusion_dpo of huggingface/diffusers;
it needs datasets, wandb, tensorboard and pyarrow. The model is Stable Diffusion 2.1 with random
weights and every width divided by --divide (1: its true size). Both sides run as processes of their own, in turn; a step's
time is the difference of a long and a short run, so that start-up does not count (with our
encoding of every image, once), one look at the held-out pairs does. On the CPU of a machine that others use,
the processor time of one thread is what an idle machine's clock would show; on a GPU the clock counts, both
sides compute in bf16, and the memory is the GPU's.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from utilgen_cli.runtime.files import encode_json
from utilgen_cli.shards.parquet import write_pickapic
from utilgen_cli.shards.sample import Sample
from utilgen_cli.shards.writer import write_shard

from .harness import GpuPeak, record, run

RANK, HEADS = 16, (5, 10, 20, 20)


@dataclass
class Side:
    """Processor and clock seconds of every (short, long) run, and the highest memory in MiB: on a
    GPU its own, above what lay there before."""

    command: list[str]
    imports: list[str]
    processor: list[tuple[float, float]] = field(default_factory=list)
    clock: list[tuple[float, float]] = field(default_factory=list)
    mebibytes: float = 0.0
    imported: float = 0.0

    def per_step(self, runs: list[tuple[float, float]], steps: int) -> float:
        return median((long - short) / steps for short, long in runs)


def make_unet(size: int, divide: int) -> Any:
    """The U-Net of Stable Diffusion 2.1, every width divided by `divide`, random weights."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=size // 8, block_out_channels=[w // divide for w in (320, 640, 1280, 1280)],
        cross_attention_dim=1024 // divide, attention_head_dim=HEADS, norm_num_groups=32 // min(divide, 4), use_linear_projection=True,
    )  # fmt: skip


def make_vae(size: int, divide: int) -> Any:
    """Its VAE likewise."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=[w // divide for w in (128, 256, 512, 512)], layers_per_block=2,
        norm_num_groups=32 // min(divide, 4), sample_size=size, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip


def make_model(path: Path, size: int, divide: int, classes: Sequence[str] = ("a",)) -> None:
    """A bundle of Stable Diffusion 2.1, every width divided by `divide`, random weights (drawn by
    the GPU where there is one); one that is there already is taken, if it is such a one."""
    if (path / "utilgen.json").exists():
        found = json.loads((path / "unet" / "config.json").read_text())
        if (found["sample_size"], found["block_out_channels"][0]) != (size // 8, 320 // divide):
            sys.exit(f"{path} holds another model. Name another place, or remove it.")
        return
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        pipeline = make_pipeline(size, divide)
    pipeline.save_pretrained(path)
    (path / "utilgen.json").write_text(encode_json({"size": size, "classes": classes}).decode())


def make_model_apart(*arguments: Any) -> None:
    """`make_model` in a process of its own: what it leaves in memory would count as that of what is
    started after it, and on a GPU would stay there."""
    maker = get_context("spawn").Process(target=make_model, args=arguments)
    maker.start()
    maker.join()
    if maker.exitcode:
        sys.exit(f"{arguments[0]} was not made")


def make_pipeline(size: int, divide: int) -> Any:
    """diffusers' pipeline of it."""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    from ..random_bundle import make_scheduler, make_tokenizer

    tokenizer = make_tokenizer()
    vocabulary = len(tokenizer)
    text = CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=1024 // divide, intermediate_size=4096 // divide,
        num_hidden_layers=23, num_attention_heads=16 // divide, max_position_embeddings=40, bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1, pad_token_id=vocabulary - 1,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=make_vae(size, divide), text_encoder=CLIPTextModel(text), tokenizer=tokenizer,
        unet=make_unet(size, divide),
        scheduler=make_scheduler("v_prediction"), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def make_pairs(path: Path, size: int, pairs: int) -> None:
    """The same noise pictures as our shards, and as the Parquet file that the script reads."""
    rng = np.random.default_rng(0)
    rows: list[dict[str, bytes]] = []
    for i in range(pairs):
        sides = []
        for high in (256, 100):
            out = io.BytesIO()
            Image.fromarray(rng.integers(0, high, (size, size, 3), np.uint8)).save(out, "JPEG")
            sides.append(out.getvalue())
        caption = str(i % 10).encode()
        rows.append({"jpg_0": sides[0], "jpg_1": sides[1], "label_0": b"1", "caption": caption})
    samples = (
        Sample(f"{i:06d}", {"win.jpg": row["jpg_0"], "lose.jpg": row["jpg_1"], "cls": b"0",
                            "json": encode_json({"prompt": row["caption"].decode()})})
        for i, row in enumerate(rows)
    )  # fmt: skip
    (path / "ours").mkdir()
    (path / "theirs").mkdir()
    write_shard(path / "ours" / "00000.tar", samples)
    write_pickapic((Sample("", row) for row in rows), path / "theirs" / "train-00000.parquet")


def make_sides(script: str, work: Path, size: int, batch: int) -> dict[str, Side]:
    """The peer, and ours with the whole batch at once or in halves."""
    model, python = str(work / "model"), sys.executable
    peer = [
        python, script, "--pretrained_model_name_or_path", model, "--dataset_name",
        str(work / "theirs"), "--dataset_split_name", "train", "--output_dir", str(work / "peer"),
        "--cache_dir", str(work / "cache"), "--resolution", str(size), "--no_hflip", "--rank",
        str(RANK), "--train_batch_size", str(batch), "--lr_warmup_steps", "0", "--seed", "0",
        *(["--mixed_precision", "bf16"] if torch.cuda.is_available() else []), "--max_train_steps",
    ]  # fmt: skip
    imports = "import utilgen_cli.diffusion.preference_run, peft, diffusers.loaders;"
    imports += "from diffusers import StableDiffusionPipeline"

    def ours(*options: str) -> list[str]:
        return [
            python, "-m", "utilgen_cli", "dpo", str(work / "ours"), "-m", model, "--overwrite",
            "-o", str(work / "out"), "-q", "--rank", str(RANK), *options, "--steps",
        ]  # fmt: skip

    sides = {
        "train_diffusion_dpo.py": Side(peer, [python, script, "--help"]),
        "utilgen dpo": Side(ours("--batch-size", str(batch)), [python, "-c", imports]),
    }
    less = ours("--batch-size", str(batch), "--gradient-checkpointing")
    sides["utilgen dpo --gradient-checkpointing"] = Side(less, [python, "-c", imports])
    if batch % 2 == 0:
        halves = ours("--batch-size", str(batch // 2), "--gradient-accumulation", "2")
        sides["utilgen dpo, the batch in halves"] = Side(halves, [python, "-c", imports])
    return sides


def table(sides: dict[str, Side], steps: int) -> str:
    """Ratios are to the peer: speed, and memory above what importing the libraries takes."""
    peer = next(iter(sides.values()))
    clock = "clock" if torch.cuda.is_available() else "processor"
    lines = [
        f"| side | {clock} s/step | steps/s | speed | peak MiB | above imports | share |",
        "|---|---|---|---|---|---|---|",
    ]
    theirs = peer.per_step(getattr(peer, clock), steps)
    for name, side in sides.items():
        step, above = side.per_step(getattr(side, clock), steps), side.mebibytes - side.imported
        lines.append(
            f"| {name} | {step:.3f} | {1 / step:.2f} | {theirs / step:.2f} "
            f"| {side.mebibytes:.0f} | {above:.0f} | "
            f"{above / (peer.mebibytes - peer.imported):.2f} |"
        )
    clocks = ", ".join(
        f"{name} {side.per_step(side.clock, steps):.3f}" for name, side in sides.items()
    )
    return "\n".join([*lines, "", f"Clock seconds a step: {clocks}."])


def main(options: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser("dpo_peer")
    parser.add_argument("--script", required=True, help="diffusers' train_diffusion_dpo.py")
    parser.add_argument("--divide", type=int, default=8, help="of every width")
    parser.add_argument("--size", type=int, default=256, help="pixels a side")
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--pairs-a-step", type=int, default=4)
    parser.add_argument("--steps", type=int, nargs=2, default=[2, 10], help="short and long run")
    parser.add_argument("--repeats", type=int, default=2)
    chosen = parser.parse_args(options)
    batch, size, steps = chosen.pairs_a_step, chosen.size, chosen.steps
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        make_model_apart(work / "model", size, chosen.divide)
        make_pairs(work, size, chosen.pairs)
        sides = make_sides(chosen.script, work, size, batch)
        on_gpu = torch.cuda.is_available()
        for side in sides.values():
            side.imported = 0 if on_gpu else run(side.imports, work / "log")[2]
        for repeat in range(chosen.repeats):
            for label, side in sides.items():
                with GpuPeak() as peak:
                    short, long = (run([*side.command, str(n)], work / "log") for n in steps)
                side.processor.append((short[0], long[0]))
                side.clock.append((short[1], long[1]))
                side.mebibytes = max(side.mebibytes, peak.mebibytes if on_gpu else long[2])
                print(repeat, label, short, long, file=sys.stderr, flush=True)
        title = f"dpo beside diffusers' script: SD 2.1, widths divided by {chosen.divide}, "
        title += f"{size} px, {batch} pairs a step"
        record(title, table(sides, steps[1] - steps[0]))


if __name__ == "__main__":
    main(sys.argv[1:])
