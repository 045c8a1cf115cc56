"""Code that is planted in models, artefacts and shards never runs, and nothing asks the network."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from utilgen_cli.classification.models import build_classifier, load_classifier
from utilgen_cli.diffusion.clip import load_clip
from utilgen_cli.diffusion.load import load_model
from utilgen_cli.diffusion.policy import load_policy
from utilgen_cli.runtime.checkpoint import load_checkpoint, save_checkpoint
from utilgen_cli.runtime.errors import UtilgenError
from utilgen_cli.shards.operands import open_source
from utilgen_cli.shards.sample import Sample
from utilgen_cli.valuation.value_model import load_value

from .conftest import ROOT, make_sample, tar_bytes

TINY = ROOT / "utilgen_cli" / "tiny"


class Payload:
    """Unpickled, it makes the file RAN."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "RAN"


def pickled(path: Path, mark: Path) -> None:
    """A checkpoint as torch.save writes it, with the payload inside."""
    torch.save({"state_dict": Payload(mark)}, path)


def script(path: Path, mark: Path) -> None:
    """A module that leaves its mark when it is imported."""
    path.write_text(f"import os\nos.mkdir({str(mark)!r})\nclass Evil: pass\n")


def merge(path: Path, **entries: object) -> None:
    """Add entries to a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def test_the_payload_itself_works(mark: Path, tmp_path: Path) -> None:
    pickled(tmp_path / "evil.bin", mark)
    torch.load(tmp_path / "evil.bin", weights_only=False)
    assert mark.exists()


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "bundle"))


WEIGHTS = {
    "unet": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
    "vae": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
    "text_encoder": ("model.safetensors", "pytorch_model.bin"),
}


@pytest.mark.parametrize("folder", WEIGHTS)
@pytest.mark.parametrize("as_safetensors", [False, True], ids=["bin", "pickle-as-safetensors"])
def test_pickled_weights_of_a_bundle_are_never_read(
    folder: str, as_safetensors: bool, bundle: Path, mark: Path
) -> None:
    safe, pickle_name = WEIGHTS[folder]
    (bundle / folder / safe).unlink()
    pickled(bundle / folder / (safe if as_safetensors else pickle_name), mark)
    with pytest.raises(UtilgenError):
        load_model(str(bundle))
    assert not mark.exists()


def test_code_in_a_bundle_is_never_imported(bundle: Path, mark: Path) -> None:
    for folder, file in (("unet", "config.json"), ("vae", "config.json"), ("text_encoder", "config.json"),
                         ("scheduler", "scheduler_config.json"), ("tokenizer", "tokenizer_config.json")):  # fmt: skip
        script(bundle / folder / "evil.py", mark)
        maps = dict.fromkeys(["AutoConfig", "AutoModel", "AutoTokenizer"], "evil.Evil")
        merge(bundle / folder / file, auto_map=maps, trust_remote_code=True)
    script(bundle / "pipeline.py", mark)
    script(bundle / "evil.py", mark)
    merge(bundle / "model_index.json", _class_name=["evil", "Evil"], unet=["evil", "Evil"],
          custom_pipeline="evil", trust_remote_code=True)  # fmt: skip
    assert load_model(str(bundle)).size == 32
    assert not mark.exists()


def test_a_pickled_adapter_is_never_read(bundle: Path, mark: Path, tmp_path: Path) -> None:
    for name in ("pytorch_lora_weights.bin", "pytorch_lora_weights.safetensors"):
        adapter = tmp_path / name.replace(".", "-")
        adapter.mkdir()
        pickled(adapter / name, mark)
        with pytest.raises(UtilgenError):
            load_model(str(bundle), adapters=[adapter])
    assert not mark.exists()


def test_pickled_tokens_are_never_read(bundle: Path, mark: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tokens" / "0000-bag"
    folder.mkdir(parents=True)
    pickled(folder / "learned_embeds.safetensors", mark)
    pickled(folder / "learned_embeds.bin", mark)
    index = {"classes": ["bag"], "tokens": ["<utilgen-0000>"], "folders": ["0000-bag"]}
    (tmp_path / "tokens" / "index.json").write_text(json.dumps(index))
    with pytest.raises(UtilgenError):
        load_model(str(bundle), tokens=tmp_path / "tokens")
    assert not mark.exists()


@pytest.mark.parametrize("name", ["open_clip_pytorch_model.bin", "open_clip_model.pt", "open_clip_model.safetensors"])  # fmt: skip
def test_a_pickled_clip_is_never_run(name: str, bundle: Path, mark: Path) -> None:
    clip = bundle / "open_clip"
    (clip / "open_clip_model.safetensors").unlink()
    pickled(clip / name, mark)
    script(clip / "evil.py", mark)
    merge(clip / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]})
    with pytest.raises(UtilgenError):
        load_clip(str(clip))
    with pytest.raises(UtilgenError):
        build_classifier(f"open_clip:{clip}", 2, 32)
    assert not mark.exists()


def test_pickles_are_never_read_where_a_value_model_or_policy_should_be(
    mark: Path, tmp_path: Path
) -> None:
    pickled(tmp_path / "classifier.safetensors", mark)
    with pytest.raises(UtilgenError):
        load_classifier(tmp_path / "classifier.safetensors")
    names = ("value.json", "policy.json", "reference.safetensors", "policy.safetensors")
    for name in names:
        (tmp_path / name).write_bytes(pickle.dumps(Payload(mark)))
    for load in (load_value, load_policy):
        with pytest.raises(UtilgenError):
            load(tmp_path)
    assert not mark.exists()


def test_a_pickled_checkpoint_counts_as_torn(mark: Path, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, {"x": torch.ones(1)}, {"step": 1})
    save_checkpoint(path, {"x": torch.ones(1)}, {"step": 2})
    pickled(path, mark)
    found = load_checkpoint(path)
    assert found is not None and found[1] == {"step": 1}
    assert not mark.exists()


def test_pickles_in_shards_pass_through_unread(mark: Path, tmp_path: Path) -> None:
    members = {**make_sample(1).members, "pyd": pickle.dumps(Payload(mark)), "pth": b"x"}
    (tmp_path / "a.tar").write_bytes(tar_bytes([Sample("a", members)]))
    [back] = open_source([str(tmp_path / "a.tar")]).samples()
    assert back.members == members
    assert not mark.exists()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Every attempt to resolve a name or to connect; the hub's client believes to be online."""
    from huggingface_hub import constants

    seen: list[object] = []

    def refuse(*args: object, **_: object) -> None:
        seen.append(args)
        raise OSError("blocked")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return seen


def test_local_models_ask_no_network(calls: list[object], bundle: Path) -> None:
    merge(bundle / "unet" / "config.json", _name_or_path="evil/model")
    merge(bundle / "tokenizer" / "tokenizer_config.json", name_or_path="evil/tokenizer")
    config = json.loads((bundle / "open_clip" / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "evil/tokenizer"
    (bundle / "open_clip" / "open_clip_config.json").write_text(json.dumps(config))
    load_model(str(bundle))
    load_clip(str(bundle / "open_clip"))
    assert calls == []


@pytest.mark.parametrize("arch", ["open_clip:ViT-B-32/openai", "open_clip:hf-hub:evil/clip", "hf-hub:evil/net", "resnet50"])  # fmt: skip
def test_an_artefact_that_names_a_hub_model_asks_no_network(
    arch: str, calls: list[object], tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    facts = {"arch": arch, "num_classes": 2, "transform": {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}}  # fmt: skip
    path = tmp_path / "classifier.safetensors"
    save_file({"head.bias": torch.zeros(2)}, path, {"classifier": json.dumps(facts)})
    with pytest.raises(UtilgenError):
        load_classifier(path)
    assert calls == []
