"""What policy tests build on: a random open_clip directory and a random value model."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.random_bundle import CLASSES, make_tokenizer
from utilgen_cli.classification.models import build_classifier, save_classifier
from utilgen_cli.runtime.checkpoint import save_tensors
from utilgen_cli.valuation.weight_net import WeightNet

CLIP_SIZE = 16


def make_clip(path: Path, seed: int = 0, resize_mode: str = "squash") -> Path:
    """A random open_clip model in `local-dir:` layout."""
    path.mkdir(parents=True)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(path)
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": CLIP_SIZE, "layers": 1, "width": 16, "head_width": 8, "patch_size": 4},
        "text_cfg": {"context_length": 40, "vocab_size": len(tokenizer), "width": 16, "heads": 2,
                     "layers": 1, "hf_tokenizer_name": "tokenizer"},
    }  # fmt: skip
    preprocess = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic",
                  "resize_mode": resize_mode}  # fmt: skip
    (path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": preprocess})
    )
    torch.manual_seed(seed)
    save_file(open_clip.CLIP(**config).state_dict(), path / "open_clip_model.safetensors")
    return path


def make_value(path: Path, folds: int = 2, classes: list[str] = CLASSES, size: int = 16) -> Path:
    """A value model with random classifiers and random weight networks, as `value train` writes it."""
    snapshots = []
    for s in range(2):
        names = [f"snapshot-{s}/classifier-{k}.safetensors" for k in range(folds)]
        for k, name in enumerate(names):
            model = build_classifier("small-cnn", len(classes), size, seed=10 * s + k)
            save_classifier(path / name, model)
        net = WeightNet(seed=s)
        net.see(torch.tensor([0.0, 10.0]))
        save_tensors(path / f"snapshot-{s}/weight_net.safetensors", net.state_dict())
        entry = {
            "step": s,
            "classifiers": names,
            "weight_net": f"snapshot-{s}/weight_net.safetensors",
        }
        snapshots.append(entry)
    save_tensors(path / "reference.safetensors", {"hash": torch.zeros(0, dtype=torch.int64),
                                                  "fold": torch.zeros(0, dtype=torch.uint8)})  # fmt: skip
    facts = {"format": 1, "classes": classes, "duplicate_distance": 0.01, "canary": {"auroc": 0.97, "planted": 9, "verdict": "ok"},
             "transform": {"size": size, "mean": [0.5] * 3, "std": [0.25] * 3}, "snapshots": snapshots}  # fmt: skip
    (path / "value.json").write_text(json.dumps(facts))
    return path


def publish_clip(monkeypatch: pytest.MonkeyPatch, folder: Path) -> tuple[nn.Module, Path]:
    """A small open_clip model NAME `small` whose weights TAG `openai` are "downloaded" from a file,
    and which, as OpenAI's, was trained with QuickGELU: (the model as trained, the file)."""
    folder.mkdir()
    tower = {"width": 32, "layers": 1, "heads": 2}
    vision = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": tower}
    (folder / "small.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "small.json")
    torch.manual_seed(0)
    model = open_clip.create_model("small", force_quick_gelu=True).eval()
    torch.save(model.state_dict(), folder / "small.pt")
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "small", {"openai": {"quick_gelu": True}})
    monkeypatch.setattr(
        open_clip.factory, "download_pretrained", lambda tag, **_: str(folder / "small.pt")
    )
    return model, folder / "small.pt"
