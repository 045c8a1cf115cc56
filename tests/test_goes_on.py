"""What a run goes on from, and what it takes for done: never what another run would have made."""

from __future__ import annotations

from pathlib import Path

import pytest

from utilgen_cli.runtime import distributed, signals
from utilgen_cli.runtime.checkpoint import load_checkpoint, save_checkpoint
from utilgen_cli.runtime.errors import Stopped, UsageError

from .random_bundle import make_bundle
from .test_preference_training import LORA, digest, run_dpo


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
