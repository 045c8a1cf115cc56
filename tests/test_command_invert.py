"""`utilgen invert` on the shipped model and the shipped few shots."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from utilgen_cli.diffusion.bundle import find_model
from utilgen_cli.diffusion.datadream import read_shots
from utilgen_cli.diffusion.load import class_prompts, load_model
from utilgen_cli.shards.operands import open_source

from .conftest import DATA, Run, make_sample, tar_bytes


@torch.no_grad()
def held_out_loss(tokens: Path | None) -> float:
    """Denoising loss of 60 validation images that `invert` has not seen."""
    model = load_model("tiny", tokens=tokens)
    samples = list(open_source([str(DATA / "val")]).samples())[::3][:60]
    shots = read_shots(samples, model, lambda s: "")
    embeds = model.encode_prompts(class_prompts(model, tokens))[shots.labels]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(shots.latents[:, 0].shape, generator=generator)
    t = torch.randint(300, 1000, (len(noise),), generator=generator)
    x = model.scheduler.add_noise(shots.latents[:, 0], noise, t)
    return float((model.unet(x, t, embeds).sample - noise).square().mean())


def test_tokens_denoise_unseen_real_images_better_than_class_names(
    utilgen: Run, tmp_path: Path
) -> None:
    done = utilgen("invert", DATA / "real", "-m", "tiny", "--steps", 40, "-o", "tokens")
    assert done.stdout == b"tokens\n"
    assert held_out_loss(tmp_path / "tokens") < held_out_loss(None) - 0.0005
    index = json.loads((tmp_path / "tokens" / "index.json").read_text())
    assert index["loss_after"] < index["loss_before"]
    files = [str(tmp_path / "tokens" / f / "learned_embeds.safetensors") for f in index["folders"]]
    pipe = StableDiffusionPipeline.from_pretrained(find_model("tiny"))
    pipe.load_textual_inversion(files)
    table = pipe.text_encoder.get_input_embeddings().weight
    for file, token in zip(files, index["tokens"], strict=True):
        row = table[pipe.tokenizer.convert_tokens_to_ids(token)]
        assert torch.equal(row, load_file(file)[token][0].to(row.dtype))
    again = utilgen("invert", DATA / "real", "-m", "tiny", "--steps", 40, "-o", "tokens", "--json")
    assert json.loads(again.stdout) == index


def test_a_class_without_images_is_an_error_of_one_line(utilgen: Run, tmp_path: Path) -> None:
    samples = [make_sample(i, label, size=32) for i, label in enumerate((0, 0, 2))]
    done = utilgen("invert", "-m", "tiny", "--smoke", "-o", "tokens", input=tar_bytes(samples),
                   check=False)  # fmt: skip
    assert (done.returncode, done.stdout) == (65, b"")
    assert "class 1: has no images" in done.stderr.decode().splitlines()[-1]
    assert not (tmp_path / "tokens" / "index.json").exists()
