"""Classifiers: differentiable in the image, seeded, and saved without pickle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from utilgen_cli.classification.clip import adapted_layers, has_named_weights
from utilgen_cli.classification.models import build_classifier, load_classifier, save_classifier
from utilgen_cli.runtime.errors import BadInput, NoInput, UsageError

from .conftest import ROOT
from .policy_parts import publish_clip

CLIP = ROOT / "utilgen_cli" / "tiny" / "open_clip"
ARCHS = ["small-cnn", "test_resnet", "test_vit"]


@pytest.mark.parametrize("arch", ARCHS)
def test_images_of_any_size_give_logits_and_a_gradient(arch: str) -> None:
    model = build_classifier(arch, 4, 32).eval()
    for side in (24, 32, 50):
        images = torch.rand(2, 3, side, side, requires_grad=True)
        logits = model(images)
        assert logits.shape == (2, 4)
        [gradient] = torch.autograd.grad(logits[0, 1], images)
        assert gradient[0].abs().sum() > 0
        assert gradient[1].abs().sum() == 0  # eval mode: samples do not see each other


@pytest.mark.parametrize("arch", ARCHS)
def test_logits_are_the_linear_head_on_the_features(arch: str) -> None:
    model = build_classifier(arch, 4, 32).eval()
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(
        model(images), model.features(images) @ model.head.weight.T + model.head.bias
    )


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = build_classifier("small-cnn", 3, 32, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    two = build_classifier("small-cnn", 3, 32, seed=5)
    three = build_classifier("small-cnn", 3, 32, seed=6)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.head.weight, three.head.weight)


def test_a_head_is_the_same_with_and_beside_a_tower() -> None:
    first, other = (build_classifier(f"open_clip:{CLIP}", 4, 32, seed=seed) for seed in (3, 4))
    beside = build_classifier(f"open_clip:{CLIP}", 4, 32, seed=3, like=other)
    assert beside.tower is other.tower
    assert torch.equal(beside.head.weight, first.head.weight)
    assert not torch.equal(other.head.weight, first.head.weight)


def test_a_tower_is_named_by_a_directory_or_a_tag() -> None:
    """An empty tag names none: the tower is random."""
    named = {f"open_clip:{CLIP}": True, "open_clip:ViT-B-32/openai": True,
             "open_clip:ViT-B-32": False, "open_clip:ViT-B-32/": False,
             f"open_clip-lora:{CLIP}": False, "resnet18": False}  # fmt: skip
    assert {arch: has_named_weights(arch) for arch in named} == named


def test_grey_images_are_taken_as_rgb() -> None:
    model = build_classifier("small-cnn", 3, 32).eval()
    grey = torch.rand(2, 1, 32, 32)
    torch.testing.assert_close(model(grey), model(grey.expand(-1, 3, -1, -1)))


@pytest.mark.parametrize("arch", ARCHS)
def test_a_saved_classifier_comes_back_bit_for_bit(arch: str, tmp_path: Path) -> None:
    model = build_classifier(arch, 4, 32, seed=3)
    model.train()(torch.rand(8, 3, 32, 32))  # moves the running statistics
    save_classifier(tmp_path / "c.safetensors", model)
    images = torch.rand(3, 3, 32, 32)
    assert torch.equal(load_classifier(tmp_path / "c.safetensors")(images), model.eval()(images))


def test_a_saved_classifier_can_be_read_without_utilgen(tmp_path: Path) -> None:
    save_classifier(tmp_path / "c.safetensors", build_classifier("small-cnn", 4, 32))
    with safe_open(tmp_path / "c.safetensors", framework="np") as f:
        facts = json.loads(f.metadata()["classifier"])
        assert f.get_tensor("head.weight").shape == (4, 128)
    assert (facts["arch"], facts["num_classes"], facts["transform"]["size"]) == ("small-cnn", 4, 32)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no classifier")
    with pytest.raises(BadInput):
        load_classifier(tmp_path / "text")
    with pytest.raises(NoInput):
        load_classifier(tmp_path / "missing")


def test_a_head_without_its_weights_is_refused_beside_a_tower(tmp_path: Path) -> None:
    like, path = build_classifier(f"open_clip:{CLIP}", 2, 32), tmp_path / "c.safetensors"
    save_classifier(path, like, whole=False)
    assert load_classifier(path, like).tower is like.tower
    with safe_open(path, framework="pt") as f:
        save_file({"head.bias": f.get_tensor("head.bias")}, path, f.metadata())
    with pytest.raises(BadInput, match="holds other weights"):
        load_classifier(path, like)


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    model = build_classifier("small-cnn", 2, 16)
    model.head = torch.nn.Linear(model.head.in_features, 3)
    save_classifier(tmp_path / "c.safetensors", model)
    with pytest.raises(BadInput, match="other weights"):
        load_classifier(tmp_path / "c.safetensors")


def test_an_unknown_architecture_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="--arch resnet51"):
        build_classifier("resnet51", 4, 32)
    with pytest.raises(NoInput, match="open_clip:nowhere"):
        build_classifier("open_clip:nowhere", 4, 32)


@pytest.mark.skipif(not CLIP.is_dir(), reason="the bundle is not here")
def test_a_clip_tower_stays_as_it_is_under_its_head(tmp_path: Path) -> None:
    model = build_classifier(f"open_clip:{CLIP}", 4, 32).train()
    before = {k: v.clone() for k, v in model.tower.state_dict().items()}
    images = torch.rand(4, 3, 32, 32)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    torch.nn.functional.cross_entropy(model(images), torch.arange(4)).backward()
    optimizer.step()
    assert all(torch.equal(before[k], v) for k, v in model.tower.state_dict().items())
    save_classifier(tmp_path / "clip.safetensors", model)
    back = load_classifier(tmp_path / "clip.safetensors")
    torch.testing.assert_close(back(images), model.eval()(images))


@pytest.mark.skipif(not CLIP.is_dir(), reason="the bundle is not here")
def test_lora_starts_as_the_tower_and_trains_adapters_and_head_alone(tmp_path: Path) -> None:
    model = build_classifier(f"open_clip-lora:{CLIP}", 4, 32, seed=1).train()
    linear = build_classifier(f"open_clip:{CLIP}", 4, 32, seed=1).eval()
    images = torch.rand(4, 3, 40, 40)
    torch.testing.assert_close(model.features(images), linear.features(images))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # the first step moves B only: A's gradient is zero while B is
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), torch.arange(4)).backward()
        optimizer.step()
    moved = {k for k, v in model.state_dict().items() if not torch.equal(before[k], v)}
    assert moved == {k for k in before if "lora_" in k or k.startswith("head.")}
    save_classifier(tmp_path / "lora.safetensors", model)
    back = load_classifier(tmp_path / "lora.safetensors")
    torch.testing.assert_close(back(images), model.eval()(images))


@pytest.mark.parametrize("prefix", ["open_clip:", "open_clip-lora:"])
def test_a_published_tower_is_loaded_without_a_look_at_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str
) -> None:
    """The file holds the whole tower, which runs with the activation that it was trained with."""
    trained, weights = publish_clip(monkeypatch, tmp_path / "small")
    model = build_classifier(f"{prefix}small/openai", 4, 16).eval()
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(model.features(images), trained.visual(model.prepare(images)))
    save_classifier(tmp_path / "c.safetensors", model)
    weights.unlink()
    back = load_classifier(tmp_path / "c.safetensors")
    assert back.transform == {k: list(v) if k != "size" else v for k, v in model.transform.items()}
    torch.testing.assert_close(back(images), model(images))


@pytest.mark.parametrize(
    ("tower", "count", "kind"), [("ViT-B-32", 24, "Linear"), ("RN50", 55, "Conv2d")]
)
def test_lora_leaves_out_layers_that_fused_attention_bypasses(tower, count, kind) -> None:
    import open_clip

    visual = open_clip.create_model(tower).visual
    found = dict(visual.named_modules())
    names = adapted_layers(visual)
    assert len(names) == count
    assert {type(found[name]).__name__ for name in names} == {kind}
    assert not any("attn" in name for name in names)
