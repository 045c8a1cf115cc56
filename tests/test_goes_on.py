"""What a run goes on from, and what it takes for done: never what another run would have made."""

from __future__ import annotations

from pathlib import Path

import pytest

from utilgen_cli.runtime import distributed, signals
from utilgen_cli.runtime.artefact import FILES, clear_checkpoints, is_done, seal
from utilgen_cli.runtime.checkpoint import load_checkpoint, save_checkpoint
from utilgen_cli.runtime.errors import Stopped, UsageError
from utilgen_cli.runtime.output import OutputDirectory

from .conftest import DATA, Run, tar_bytes
from .random_bundle import make_bundle
from .test_preference_training import LORA, digest, pairs, run_dpo, run_lora, shots


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_bundle(tmp_path_factory.mktemp("bundle")))


def test_another_number_of_processes_does_not_go_on(
    bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The global batch counts them: the steps before and after would be of two runs."""
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(signals, "stop_requested", lambda: True)
        run_dpo(bundle, tmp_path / "one")
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "world", lambda: (0, 2))
        patch.setattr(distributed, "init", lambda: (0, 2))
        with pytest.raises(UsageError, match=r"with 1 processes, .* 2, .*\. Run it with 1, or"):
            run_dpo(bundle, tmp_path / "one")
    path = tmp_path / "one" / "checkpoint.safetensors"
    tensors, meta = load_checkpoint(path)  # type: ignore[misc]
    assert meta.pop("processes") == 1
    save_checkpoint(path, tensors, meta)  # as it was before that was written
    run_dpo(bundle, tmp_path / "one")
    run_dpo(bundle, tmp_path / "whole")
    assert digest(tmp_path / "one" / LORA) == digest(tmp_path / "whole" / LORA)


def damaged(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(data[:-9] if how == "cut" else data[:-9] + b"?" + data[-8:])


MODELS: dict[str, list[str]] = {
    "dpo": ["dpo", "pairs.tar"],
    "dpo --full": ["dpo", "pairs.tar", "--full"],
    "lora": ["lora", "real.tar"],
    "lora --per class": ["lora", "real.tar", "--per", "class"],
    "invert": ["invert", "real.tar"],
    "invert --population": ["invert", "real.tar", "--population", "2"],
}


def weights(directory: Path) -> dict[str, bytes]:
    """The weights, the list of them, and what a kill left."""
    kept = (".safetensors", ".previous", FILES)
    found = [p for p in directory.rglob("*") if p.name.endswith(kept)]
    return {str(p.relative_to(directory)): p.read_bytes() for p in found}


@pytest.mark.parametrize(
    ("name", "how"),
    [*((name, "gone") for name in MODELS), ("lora --per class", "cut"), ("dpo --full", "flipped")],
)
def test_a_finished_model_that_is_damaged_is_made_again(
    utilgen: Run, bundle: str, tmp_path: Path, name: str, how: str
) -> None:
    (tmp_path / "pairs.tar").write_bytes(tar_bytes(pairs(16)))
    (tmp_path / "real.tar").write_bytes(tar_bytes(shots()))
    command = [*MODELS[name], "-m", bundle, "--steps", "2", "--batch-size", "2", "-o", "made"]
    utilgen(*command)
    made = tmp_path / "made"
    whole = weights(made)
    assert len(whole) > 1
    last = sorted(file for file in whole if file.endswith(".safetensors"))[-1]
    damaged(made / last, how)
    utilgen(*command)
    assert weights(made) == whole
    for leftover in {Path(), Path(last).parent}:
        for end in ("", ".previous"):
            (made / leftover / f"checkpoint.safetensors{end}").write_bytes(b"of a killed run")
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*.safetensors")}
    utilgen(*command)
    assert weights(made) == whole
    assert all(path.stat().st_mtime_ns == before[path] for path in made.rglob("*.safetensors"))
    (made / FILES).unlink()  # as before there was a list
    damaged(made / last, "cut")
    assert utilgen(*command).stdout == b"made\n"
    assert (made / last).read_bytes() == whole[last][:-9]


def test_a_value_model_that_is_damaged_is_made_again(utilgen: Run, tmp_path: Path) -> None:
    command = ["value", "train", "--real", DATA / "real", "--smoke", "-o", "value"]
    utilgen(*command)
    whole = weights(tmp_path / "value")
    damaged(tmp_path / "value" / "snapshot-0" / "classifier-1.safetensors", "flipped")
    (tmp_path / "value" / "checkpoint.safetensors").write_bytes(b"nothing to go on from")
    utilgen(*command)
    assert weights(tmp_path / "value") == whole
    (tmp_path / "value" / "checkpoint.safetensors.previous").write_bytes(b"of a killed run")
    utilgen(*command)
    assert weights(tmp_path / "value") == whole


def test_what_a_killed_evaluation_left_beside_a_result_goes(utilgen: Run, tmp_path: Path) -> None:
    command = ["eval", "--real", DATA / "real", "--test", DATA / "test", "--smoke", "--seeds", "1",
               "-o", "runs"]  # fmt: skip
    utilgen(*command)
    [result] = (tmp_path / "runs").glob("real-0-*.json")
    left = result.with_suffix(".checkpoint.safetensors")
    left.write_bytes(b"of a killed run")
    others = left.with_name("real-1-0123456789abcdef.checkpoint.safetensors")
    others.write_bytes(b"of a run that goes on")
    utilgen(*command)
    assert (left.exists(), others.exists()) == (False, True)


def test_adapters_of_other_processes_are_not_mixed(
    bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_lora(bundle, tmp_path, per="class")
    (tmp_path / "lora.json").unlink()
    (tmp_path / "0002-ankle-boot" / LORA).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "world", lambda: (0, 2))
        with pytest.raises(UsageError, match="with 1 processes"):
            run_lora(bundle, tmp_path, per="class")
    run_lora(bundle, tmp_path, per="class")
    assert (tmp_path / "0002-ankle-boot" / LORA).exists()


def test_a_note_beside_a_model_is_not_of_the_model(tmp_path: Path) -> None:
    for name in ("weights.safetensors", "unet/config.json", "checkpoint.safetensors", "log.txt",
                 "notes/log.txt"):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    seal(tmp_path)
    (tmp_path / "done.json").write_text("{}")
    (tmp_path / "log.txt").write_text("more")
    (tmp_path / "notes" / "log.txt").unlink()
    clear_checkpoints(tmp_path)
    assert is_done(tmp_path / "done.json")
    (tmp_path / "unet" / "config.json").unlink()
    assert not is_done(tmp_path / "done.json")


def test_an_output_inside_a_model_is_none_of_its_files(tmp_path: Path) -> None:
    """Another command at work there keeps its checkpoint, and may change what it likes."""
    inside = tmp_path / "value" / "checkpoint.safetensors"
    for path in (tmp_path / "weights.safetensors", inside, inside.with_name("settings.json")):
        path.parent.mkdir(exist_ok=True)
        path.write_text(path.name)
    seal(tmp_path)
    (tmp_path / "done.json").write_text("{}")
    clear_checkpoints(tmp_path)
    assert inside.exists()
    inside.unlink()
    assert is_done(tmp_path / "done.json")


def test_what_cannot_be_read_now_is_not_thrown_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fails for a moment costs a message, not the model."""
    (tmp_path / "weights.safetensors").write_text("x")
    seal(tmp_path)
    (tmp_path / "done.json").write_text("{}")

    def fails(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("utilgen_cli.runtime.artefact.file_sum", fails)
    with OutputDirectory(tmp_path / "other", "dpo", {}) as out:
        out.path = tmp_path
        with pytest.raises(PermissionError):
            out.is_done("done.json")
    assert (tmp_path / "done.json").exists()
