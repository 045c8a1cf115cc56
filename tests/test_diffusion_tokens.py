"""Class tokens are plain textual inversions, learnt without touching anything else."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from utilgen_cli.diffusion import ddim, finetune
from utilgen_cli.diffusion.datadream import DenoisingObjective, Shots, read_shots
from utilgen_cli.diffusion.finetune_config import FinetuneConfig
from utilgen_cli.diffusion.inversion import (
    CaptionedDraw,
    InversionConfig,
    TokenObjective,
    class_name_embeds,
    invert_tokens,
)
from utilgen_cli.diffusion.load import LatentDiffusion, class_prompts, load_model
from utilgen_cli.diffusion.lora import TEXT_TARGETS, UNET_TARGETS, add_lora
from utilgen_cli.diffusion.prompts import PromptEmbeds, TokenEmbeds
from utilgen_cli.diffusion.tokens import class_folder, load_tokens, read_index, save_tokens
from utilgen_cli.runtime.errors import BadInput, NoInput, Stopped, UsageError

from .conftest import make_sample
from .random_bundle import CLASSES, SIZE, WIDTH, make_bundle
from .test_diffusion_load import write_lora

CPU: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle"))


def make_tokens(path: Path, vectors: int, width: int = WIDTH) -> Path:
    embeds = torch.randn(3, vectors, width, generator=torch.Generator().manual_seed(0))
    save_tokens(path, CLASSES, embeds, {"model": "tiny"})
    return path


def files(path: Path) -> list[str]:
    index = read_index(path)
    return [str(path / folder / "learned_embeds.safetensors") for folder in index["folders"]]


@pytest.mark.parametrize("vectors", [1, 3])
def test_tokens_draw_what_they_draw_in_diffusers(
    bundle: Path, tmp_path: Path, vectors: int
) -> None:
    tokens = make_tokens(tmp_path / "tokens", vectors)
    write_lora(bundle, tmp_path / "lora", ["unet", "text_encoder"], 0)
    model = load_model(str(bundle), tokens=tokens, adapters=[tmp_path / "lora"])
    pipe = StableDiffusionPipeline.from_pretrained(bundle)
    pipe.load_textual_inversion(files(tokens))
    pipe.load_lora_weights(str(tmp_path / "lora"))
    pipe.set_progress_bar_config(disable=True)
    prompts = class_prompts(model, tokens)
    assert prompts[2] == "a photo of a <utilgen-0002>"
    noise = ddim.initial_noise(model, 0, [(0, 0), (1, 0), (2, 0)])
    theirs = pipe(
        prompts, num_inference_steps=3, guidance_scale=3.0, latents=noise, height=SIZE, width=SIZE,
        output_type="pt",
    ).images  # fmt: skip
    cond, uncond = model.encode_prompts(prompts), model.encode_prompts([""])
    ours = model.decode(ddim.sample(model, noise, cond, uncond, 3, 3.0))
    assert (ours - theirs).abs().max() * 255 < 0.1
    named = model.encode_prompts([f"a photo of a {name}" for name in CLASSES])
    assert (cond - named).abs().max() > 0.1


def test_known_tokens_are_listed_once_for_all_prompts(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(str(bundle), tokens=make_tokens(tmp_path, 2))
    kind, listed = type(model.tokenizer), []
    known = kind.added_tokens_encoder.fget
    spy = property(lambda tokenizer: listed.append(1) or known(tokenizer))
    monkeypatch.setattr(kind, "added_tokens_encoder", spy)
    one = model.token_ids(["a photo of a <utilgen-0002>"])
    once = len(listed)
    assert torch.equal(model.token_ids(["a photo of a <utilgen-0002>"] * 50), one.expand(50, -1))
    assert len(listed) == 2 * once


def test_each_file_holds_one_key_and_the_vectors(tmp_path: Path) -> None:
    tokens = make_tokens(tmp_path, 2)
    saved = [load_file(file) for file in files(tokens)]
    assert [list(tensors) for tensors in saved] == [[f"<utilgen-{i:04d}>"] for i in range(3)]
    loaded = load_tokens(tokens)
    assert all(torch.equal(loaded[k], v) for tensors in saved for k, v in tensors.items())


@given(st.lists(st.text(), min_size=1, max_size=5))
def test_any_class_name_has_a_safe_folder_of_its_own(names: list[str]) -> None:
    folders = [class_folder(i, name) for i, name in enumerate(names)]
    assert all(re.fullmatch(r"[0-9]{4}(-[a-z0-9-]*[a-z0-9])?", folder) for folder in folders)
    assert len(set(folders)) == len(names)
    assert max(map(len, folders)) <= 45


def escape(path: Path) -> None:
    index = json.loads((path / "index.json").read_text())
    index["folders"][0] = "../elsewhere"
    (path / "index.json").write_text(json.dumps(index))


def shorten(path: Path) -> None:
    index = json.loads((path / "index.json").read_text())
    index["classes"].pop()
    (path / "index.json").write_text(json.dumps(index))


def two_keys(path: Path) -> None:
    save_file({"a": torch.ones(1, 2), "b": torch.ones(1, 2)}, files(path)[1])


def lose(path: Path) -> None:
    Path(files(path)[1]).unlink()


@pytest.mark.parametrize("damage", [escape, shorten, two_keys, lose])
def test_broken_tokens_are_bad_input(tmp_path: Path, damage: Any) -> None:
    damage(make_tokens(tmp_path, 1))
    with pytest.raises(BadInput) as caught:
        load_tokens(tmp_path)
    assert "\n" not in str(caught.value)


def test_tokens_of_another_model_are_refused(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="were not made for model"):
        load_model(str(bundle), tokens=make_tokens(tmp_path, 1, width=WIDTH + 1))


# --- learning ---


def shots(count: int = 4, classes: int = 3) -> list[Any]:
    return [
        make_sample(i, c, size=SIZE, class_name=CLASSES[c])
        for c in range(classes)
        for i in range(10 * c, 10 * c + count)
    ]


@pytest.fixture
def model(bundle: Path) -> LatentDiffusion:
    return load_model(str(bundle))


@pytest.fixture
def read(model: LatentDiffusion) -> Shots:
    return read_shots(shots(), model, lambda s: "", flip=True)


def draw_of(objective: TokenObjective, rows: int) -> CaptionedDraw:
    return objective.draw(rows, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("vectors", [1, 3])
def test_theta_reads_like_the_vocabulary(model: LatentDiffusion, read: Shots, vectors: int) -> None:
    start = torch.randn(3, vectors, WIDTH, generator=torch.Generator().manual_seed(1))
    objective = TokenObjective(model, read, start)
    labels, captions = torch.tensor([0, 2, 1, 2]), torch.tensor([0, 1, 3, 0])
    prompts = [
        objective.captions[k].replace("{}", f"<utilgen-{c:04d}>")
        for c, k in zip(labels.tolist(), captions.tolist(), strict=True)
    ]
    theirs = model.encode_prompts(prompts)
    assert torch.allclose(objective.context(labels, captions), theirs, atol=1e-6)


def test_the_gradient_is_that_of_the_embedding_table(model: LatentDiffusion, read: Shots) -> None:
    objective = TokenObjective(model, read, class_name_embeds(model, CLASSES, 2))
    rows = torch.tensor([0, 5, 9, 10])
    draw = draw_of(objective, 4)
    (ours,) = torch.autograd.grad(objective.loss(rows, draw)[0], objective.theta)
    table = model.text_encoder.get_input_embeddings().weight.requires_grad_(True)
    x0 = read.latents[rows, draw.flip.long()]
    noisy = model.scheduler.add_noise(x0, draw.noise, draw.timesteps)
    prompts = [
        objective.captions[k].replace("{}", f"<utilgen-{c:04d}>")
        for c, k in zip(read.labels[rows].tolist(), draw.captions.tolist(), strict=True)
    ]
    prediction = model.unet(noisy, draw.timesteps, model.encode_prompts(prompts)).sample
    (theirs,) = torch.autograd.grad((prediction - draw.noise).square().mean(), table)
    assert torch.allclose(ours, theirs[objective.vocabulary], rtol=1e-4, atol=1e-8)
    assert ours.abs().max() > 1e-5


def test_no_gradient_depends_on_the_order_of_threads(model: LatentDiffusion, read: Shots) -> None:
    """That of an indexed tensor does, on a CPU: a run of invert, lora or ilpo with two threads ended
    each time a little elsewhere."""
    classes, members = torch.tensor([0, 2, 2, 1, 2]), torch.tensor([0, 1, 1, 0, 1])
    embeds = PromptEmbeds(model, CLASSES, 2, 0)
    assert torch.equal(embeds(classes, members), embeds.theta[classes, members])
    tokens = TokenEmbeds(model, CLASSES, 2, 0, model.template)
    objective = TokenObjective(model, read, class_name_embeds(model, CLASSES, 2))
    rows = torch.tensor([0, 1, 9, 10, 1])
    found = {
        "prompts": embeds(classes, members), "their tokens": tokens(classes, members),
        "class tokens": objective.context(classes, members),
    }  # fmt: skip
    shots = replace(read, prompts=["a dress", "a bag"], prompt_index=torch.arange(99) % 2)
    add_lora(model.unet, 2, UNET_TARGETS)
    add_lora(model.text_encoder, 2, TEXT_TARGETS)
    lora = DenoisingObjective(model, shots)
    found["lora"] = lora.loss(rows, lora.draw(5, torch.Generator().manual_seed(0)))[0]
    for name, result in found.items():
        nodes, seen = [result.grad_fn], set()
        while nodes:
            node = nodes.pop()
            if node is not None and node not in seen:
                seen.add(node)
                nodes += [after for after, _ in node.next_functions]
        names = {node.name() for node in seen}
        assert "EmbeddingBackward0" in names and "IndexBackward0" not in names, name


def test_captions_vary_and_half_are_the_model_s_own(model: LatentDiffusion, read: Shots) -> None:
    objective = TokenObjective(model, read, class_name_embeds(model, CLASSES, 1))
    captions = draw_of(objective, 4000).captions
    shares = torch.bincount(captions, minlength=len(objective.captions)) / 4000
    assert objective.captions[0] == model.template
    assert abs(shares[0] - 0.5) < 0.03
    assert (shares[1:] - 1 / 6).abs().max() < 0.03


def test_theta_starts_from_the_words_of_the_class(model: LatentDiffusion) -> None:
    table = model.text_encoder.get_input_embeddings().weight
    ids = model.tokenizer("bag", add_special_tokens=False).input_ids  # one a letter
    assert torch.allclose(class_name_embeds(model, ["bag"], 1)[0], table[ids].mean(0)[None])
    assert torch.equal(class_name_embeds(model, ["bag"], 3)[0], table[ids])
    assert torch.equal(class_name_embeds(model, ["bag"], 4)[0], table[[*ids, ids[-1]]])
    assert torch.isfinite(class_name_embeds(model, [""], 1)).all()


def config_of(bundle: Path, steps: int = 6, **changes: Any) -> InversionConfig:
    training = FinetuneConfig(steps, 6, 1e-1, "cosine", weight_decay=0.0)
    return InversionConfig(str(bundle), finetune=training, **changes)


def contents(path: Path) -> dict[str, bytes]:
    return {file.split("/")[-2]: Path(file).read_bytes() for file in files(path)}


def test_a_stopped_run_goes_on_to_the_same_bytes(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = invert_tokens(shots(), tmp_path / "whole", config_of(bundle), **CPU)
    asked = iter([False, False, True])
    with monkeypatch.context() as patch:
        patch.setattr(finetune.signals, "stop_requested", lambda: next(asked))

        def check() -> None:
            raise Stopped("TERM", "stopped", "Run again.")

        patch.setattr(finetune.signals, "check", check)
        with pytest.raises(Stopped):
            invert_tokens(shots(), tmp_path / "again", config_of(bundle), **CPU)
    assert not (tmp_path / "again" / "index.json").exists()
    resumed = invert_tokens(shots(), tmp_path / "again", config_of(bundle), **CPU)
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")
    assert resumed["loss_after"] == whole["loss_after"]
    assert not list((tmp_path / "again").glob("checkpoint*"))


def test_another_seed_learns_other_tokens(bundle: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("again", 0), ("b", 1)):
        config = InversionConfig(str(bundle), finetune=FinetuneConfig(3, 6, 1e-1, seed=seed))
        invert_tokens(shots(), tmp_path / name, config, **CPU)
    assert contents(tmp_path / "a") == contents(tmp_path / "again")
    assert contents(tmp_path / "a") != contents(tmp_path / "b")


def test_a_class_without_images_is_named(bundle: Path, tmp_path: Path) -> None:
    missing = [s for s in shots() if s.label != 1]
    with pytest.raises(BadInput, match=r"class 1.*has no images"):
        invert_tokens(missing, tmp_path, config_of(bundle), **CPU)
    with pytest.raises(BadInput, match=r"class 3 \(hat\).*has no images"):
        config = config_of(bundle, classes=(*CLASSES, "hat"))
        invert_tokens(shots(), tmp_path, config, **CPU)
    with pytest.raises(UsageError, match="differ"):
        config = config_of(bundle, classes=("x", "y", "z"))
        invert_tokens(shots(), tmp_path, config, **CPU)
    with pytest.raises(BadInput, match="not among"):
        invert_tokens(shots(), tmp_path, config_of(bundle, classes=("dress", "bag")), **CPU)


def test_no_images_at_all_is_bad_input(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="there are none"):
        invert_tokens([], tmp_path, config_of(bundle), **CPU)


def test_missing_tokens_are_no_input(tmp_path: Path) -> None:
    with pytest.raises(NoInput, match="utilgen invert"):
        read_index(tmp_path)
