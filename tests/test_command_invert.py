"""`utilgen invert` on the shipped model and the shipped few shots."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from utilgen_cli.diffusion.bundle import find_model
from utilgen_cli.diffusion.datadream import read_shots
from utilgen_cli.diffusion.load import class_prompts, load_model
from utilgen_cli.diffusion.policy import load_policy
from utilgen_cli.diffusion.prompt_inversion import deal
from utilgen_cli.diffusion.tokens import read_index
from utilgen_cli.runtime.errors import UsageError
from utilgen_cli.shards.operands import open_source

from .conftest import DATA, Run, make_sample, tar_bytes


@torch.no_grad()
def held_out_loss(tokens: Path | None, policy: Path | None = None) -> float:
    """Denoising loss of 60 validation images that `invert` has not seen."""
    model = load_model("tiny", tokens=tokens)
    samples = list(open_source([str(DATA / "val")]).samples())[::3][:60]
    shots = read_shots(samples, model, lambda s: "")
    embeds = model.encode_prompts(class_prompts(model, tokens))[shots.labels]
    if policy is not None:
        embeds = load_policy(policy).embeds([(int(c), i) for i, c in enumerate(shots.labels)])
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


@pytest.mark.parametrize("command", ["invert", "lora", "pairs", "view"])
def test_a_class_of_two_names_is_refused(utilgen: Run, tmp_path: Path, command: str) -> None:
    """Two folders that were packed apart number their classes apart."""
    scored = b'{"utility": 0.5}'
    samples = [make_sample(i, 0, 32, class_name=name).with_member("utility.json", scored)
               for i, name in enumerate(("cat", "cat", "dog"))]  # fmt: skip
    (tmp_path / "a.tar").write_bytes(tar_bytes(samples))
    model = ["-m", "tiny", "--smoke"] if command in ("invert", "lora") else []
    out = "page.html" if command == "view" else "out"
    done = utilgen(command, "a.tar", *model, "-o", out, check=False)
    assert done.returncode == 65
    assert b"class 0 is 'dog' here and 'cat' before" in done.stderr


def test_what_has_no_name_gets_none(utilgen: Run, tmp_path: Path) -> None:
    """A class is called as any of its images is; of one that nobody names none is told later."""
    samples = [make_sample(i, i % 3, 32, class_name=name)
               for i, name in enumerate(("ant", "bee", None, None, None, None))]  # fmt: skip
    (tmp_path / "a.tar").write_bytes(tar_bytes(samples))
    for more in ([], ["--population", 1]):
        options = ["-m", "tiny", "--smoke", *more, "-o", f"out{len(more)}"]
        assert utilgen("invert", "a.tar", *options).stdout
    assert read_index(tmp_path / "out0")["classes"] == ["ant", "bee", "2"]
    assert load_policy(tmp_path / "out2").unnamed == {2}
    utilgen(
        "generate", "-m", "tiny", "--tokens", "out0", "--per-class", 1, "--smoke", "-o", "drawn"
    )
    drawn = [s.facts.get("class_name") for s in open_source([str(tmp_path / "drawn")]).samples()]
    assert drawn == ["ant", "bee", None]


def test_prompts_denoise_unseen_real_images_and_are_a_policy(utilgen: Run, tmp_path: Path) -> None:
    command = ["invert", DATA / "real", "-m", "tiny", "--population", 2, "--steps", 40]
    done = utilgen(*command, "-o", "prompts")
    assert done.stdout == b"prompts\n"
    assert held_out_loss(None, tmp_path / "prompts") < held_out_loss(None) - 0.0005
    policy = load_policy(tmp_path / "prompts")
    assert policy.prompt_embeds.shape[:2] == (10, 2)
    assert policy.summary["loss_after"] < policy.summary["loss_before"]
    again = json.loads(utilgen(*command, "-o", "prompts", "--json").stdout)
    assert again["loss_after"] == policy.summary["loss_after"]
    draw = ["--per-class", 2, "--steps", 2, "-q", "-o"]
    utilgen("generate", "-m", "tiny", "--policy", "prompts", *draw, "drawn")
    found = [s.facts["class_name"] for s in open_source([str(tmp_path / "drawn")]).samples()]
    assert sorted(found) == sorted(2 * policy.classes)


def test_prompts_are_no_tokens(utilgen: Run, tmp_path: Path) -> None:
    shards = ("invert", DATA / "real", "-m", "tiny", "--smoke", "-q", "-o", "made")
    utilgen(*shards, "--population", "2")
    done = utilgen("generate", "-m", "tiny", "--tokens", "made", "-o", "out", check=False)
    assert (done.returncode, b"holds whole prompts. Draw them with --policy" in done.stderr) == (
        66,
        True,
    )
    other = utilgen(*shards, "--population", "2", "--batch-size", "2", check=False)
    assert b"(finetune.batch_size was 4, now 2)" in other.stderr


def test_shots_are_dealt_out_to_the_prompts_of_their_class() -> None:
    labels = torch.tensor([0, 1, 0, 1, 0, 1, 1])
    assert deal(labels, 2).tolist() == [0, 0, 1, 1, 0, 0, 1]
    with pytest.raises(UsageError, match="--population 4: class 0 has 3 images"):
        deal(labels, 4)
