"""Training: seeded to the bit, the same number of steps for all, weighted and mixed as said."""

from __future__ import annotations

import gc
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from utilgen_cli.classification import train as train_module
from utilgen_cli.classification.batches import AUGMENTATIONS, Batches, stored_side
from utilgen_cli.classification.data import to_float
from utilgen_cli.classification.metrics import accuracy
from utilgen_cli.classification.models import build_classifier
from utilgen_cli.classification.train import (
    TrainConfig,
    learning_rate,
    predict,
    preset,
    synchronise_batch_norm,
    train_classifier,
)
from utilgen_cli.runtime import signals
from utilgen_cli.runtime.errors import Stopped, UsageError
from utilgen_cli.runtime.progress import silent

from .classification_toys import colour_images
from .conftest import ROOT

CLIP = ROOT / "utilgen_cli" / "tiny" / "open_clip"
QUICK = TrainConfig(steps=12, batch_size=12)


def trained(seed: int, config: TrainConfig = QUICK, **kwargs: object) -> dict[str, torch.Tensor]:
    model = build_classifier("small-cnn", 3, 16, seed=seed)
    train_classifier(model, colour_images(8), config, seed=seed, **kwargs)  # type: ignore[arg-type]
    return {k: v.clone() for k, v in model.state_dict().items()}


def test_the_same_seed_gives_the_same_weights_bit_for_bit() -> None:
    one, two, other = trained(1), trained(1), trained(2)
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not torch.equal(one["head.weight"], other["head.weight"])


def test_it_learns_what_can_be_learnt() -> None:
    model = build_classifier("small-cnn", 3, 16)
    train_classifier(model, colour_images(8), TrainConfig(steps=60, batch_size=12), seed=0)
    test = colour_images(20, seed=9)
    assert accuracy(predict(model, test.images), test.labels) > 0.95


def test_every_set_is_trained_on_for_the_same_number_of_steps() -> None:
    for n in (2, 30):
        model = build_classifier("small-cnn", 3, 16)
        calls: list[int] = []
        model.register_forward_hook(lambda m, x, y, calls=calls: calls.append(len(y)))
        train_classifier(model, colour_images(n), QUICK, seed=0)
        assert calls == [12] * 12


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_a_joint_batch_has_the_real_share_that_was_asked_for(share: float) -> None:
    real, synthetic = colour_images(4), colour_images(9)
    real.images.fill_(10)
    synthetic.images.fill_(200)
    config = TrainConfig(batch_size=12, augmentation="none", real_share=share)
    for _, (x, _) in zip(range(4), Batches(real, config, 0, mix=synthetic), strict=False):
        assert x.shape[0] == 12
        assert (x[:, 0, 0, 0] < 0.5).sum() == round(12 * share)


def test_the_best_validation_step_is_kept() -> None:
    validation = colour_images(10, seed=3)
    validation.labels = torch.zeros_like(validation.labels)  # good only before anything is learnt
    config = TrainConfig(steps=40, batch_size=12, validate_every=4)
    model = build_classifier("small-cnn", 3, 16, seed=0)
    result = train_classifier(model, colour_images(8), config, seed=0, validation=validation)
    best = max(result.history, key=lambda look: look["accuracy"])
    assert result.selected_step == best["step"]
    kept = accuracy(predict(model, validation.images), validation.labels)
    assert kept == pytest.approx(best["accuracy"])
    assert len(result.history) == 10


@pytest.mark.parametrize("steps", [24, 5])
def test_a_frozen_tower_is_asked_once_for_what_nothing_augments(
    monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """The head is that of a training that asks at every step; a run that would not ask for as many
    images as there are does so."""
    config = replace(QUICK, steps=steps, augmentation="none", validate_every=2)
    asked: list[int] = []

    def head() -> list[torch.Tensor]:
        model = build_classifier(f"open_clip:{CLIP}", 3, 16)
        model.tower.register_forward_hook(lambda _, inputs, __: asked.append(len(inputs[0])))
        asked.clear()
        train_classifier(model, colour_images(24), config, seed=0, mix=colour_images(8, 1),
                         validation=colour_images(4, 2))  # fmt: skip
        return [p.detach() for p in model.head.parameters()]

    found, seen = head(), sum(asked)
    monkeypatch.setattr(train_module, "pays_to_keep", lambda *_: False)
    torch.testing.assert_close(found, head(), rtol=1e-4, atol=1e-5)
    assert sum(asked) == steps * 12 + steps // 2 * 12
    assert seen == (72 + 24 + 12 if steps == 24 else sum(asked))


def test_without_looks_the_last_step_is_kept() -> None:
    model = build_classifier("small-cnn", 3, 16)
    result = train_classifier(model, colour_images(4), QUICK, seed=0, validation=colour_images(2))
    assert (result.selected_step, result.history) == (12, [])


def test_the_rate_rises_then_falls_to_nothing() -> None:
    config = TrainConfig(steps=100, lr=1.0, warmup=0.1)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 1e-3


def test_prediction_does_not_depend_on_the_batch_size() -> None:
    model, data = build_classifier("small-cnn", 3, 16), colour_images(5)
    whole = predict(model, data.images)
    torch.testing.assert_close(predict(model, data.images, batch_size=4), whole)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(to_float(data.images)), whole)


def test_presets_take_changes_and_refuse_unknown_names() -> None:
    assert preset("torchvision-v1", steps=7, lr=None).steps == 7
    assert preset("torchvision-v1", lr=None).lr == 0.1
    with pytest.raises(UsageError, match="--preset"):
        preset("best")


def stop_after(steps: int, received: list[int]) -> Callable[..., Any]:
    """A progress that sends TERM, as far as the library can see, after so many steps."""

    @contextmanager
    def progress(description: str, total: int | None = None) -> Iterator[Any]:
        class Task:
            def advance(self, n: int = 1, **figures: object) -> None:
                self.done = getattr(self, "done", 0) + n
                if self.done == steps:
                    received.append(signal.SIGTERM)

        yield Task()

    return progress


@pytest.mark.parametrize("arch", ["small-cnn", f"open_clip:{CLIP}"], ids=["cnn", "head"])
def test_a_stopped_training_goes_on_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arch: str
) -> None:
    config = TrainConfig(steps=12, batch_size=12, validate_every=3)
    if arch != "small-cnn":
        config = replace(config, augmentation="none")  # from features
    checkpoint = tmp_path / "c.safetensors"
    dropping = torch.nn.Dropout(0.5)  # its draws come from torch's own generator

    def run(checkpoint: Path | None = None, progress: Any = silent) -> tuple[Any, Any]:
        model = build_classifier(arch, 3, 16, seed=1)
        if arch == "small-cnn":
            model.tower.append(dropping)
        kwargs = {"mix": colour_images(5, seed=4), "validation": colour_images(6, seed=5)}
        result = train_classifier(
            model, colour_images(8), config, seed=1, checkpoint=checkpoint, progress=progress,
            **kwargs,
        )  # fmt: skip
        return model.state_dict(), result

    whole, expected = run()
    received: list[int] = []
    monkeypatch.setattr(signals, "_received", received)
    with pytest.raises(Stopped):
        run(checkpoint, stop_after(7, received))
    received.clear()
    torch.rand(3)  # whatever another process had drawn by now
    resumed, result = run(checkpoint)
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    assert (result.loss, result.history) == (expected.loss, expected.history)
    assert result.selected_step == expected.selected_step


@pytest.mark.parametrize("name", ["crop", "trivial", "rand"])
def test_workers_augment_the_same_images(name: str) -> None:
    """Other numbers of workers, and a start in the middle: the same batches, bit for bit."""
    config, data = TrainConfig(batch_size=6, augmentation=name), colour_images(8, size=18)
    drawn = [
        [x for x, _ in islice(Batches(data, config, 3, start=start, size=16, workers=n), 4)]
        for n, start in ((0, 0), (2, 0), (1, 2))
    ]
    assert all(x.shape == (6, 3, 16, 16) for x in drawn[0])
    assert all(torch.equal(a, b) for a, b in zip(drawn[0], drawn[1], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(drawn[0][2:], drawn[2], strict=False))
    assert not torch.equal(drawn[0][0], drawn[0][1])
    other = next(iter(Batches(data, config, 4, size=16)))[0]
    assert not torch.equal(drawn[0][0], other)


def test_workers_leave_the_noise_of_the_model_alone() -> None:
    def weights(workers: int) -> dict[str, torch.Tensor]:
        model = build_classifier("small-cnn", 3, 16, seed=1)
        model.tower.append(torch.nn.Dropout(0.5))
        config = replace(QUICK, augmentation="crop")
        train_classifier(model, colour_images(8, size=18), config, seed=1, workers=workers)
        return model.state_dict()

    none, two = weights(0), weights(2)
    assert all(torch.equal(none[k], two[k]) for k in none)


KILLED_WORKER = """
import multiprocessing, os, signal
from tests.classification_toys import colour_images
from utilgen_cli.classification import train as train_module
from utilgen_cli.classification.batches import Batches, loader_errors
from utilgen_cli.classification.train import TrainConfig
from utilgen_cli.runtime.errors import UtilgenError

config = TrainConfig(batch_size=6, augmentation="crop")
batches = iter(Batches(colour_images(8), config, 0, workers=1))
next(batches)
[worker] = multiprocessing.active_children()
try:
    with loader_errors():
        os.kill(worker.pid, signal.SIGKILL)
        for _ in range(100):
            next(batches)
except UtilgenError as error:
    print(error)
"""


def test_a_killed_worker_ends_the_training_with_advice() -> None:
    """In a process of its own: torch raises from a signal handler, wherever Python is just then,
    and that may be inside the test runner."""
    command = [sys.executable, "-c", KILLED_WORKER]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert re.search(r"loader workers: one of them died.*fewer --workers", done.stdout), done.stderr


def test_workers_do_not_heed_the_signals_of_their_group() -> None:
    batches = iter(
        Batches(colour_images(8), TrainConfig(batch_size=6, augmentation="crop"), 0, workers=1)
    )
    next(batches)
    [worker] = multiprocessing.active_children()
    for number in signals.NUMBERS:
        os.kill(worker.pid or 0, number)
    for _ in range(10):
        next(batches)
    assert worker.is_alive()
    del batches
    gc.collect()
    worker.join(10)
    assert not worker.is_alive()


def test_a_shift_mirrors_nothing() -> None:
    """Of a ramp that rises to the right every shifted image rises, under pad some fall."""
    data = colour_images(8)
    data.images = torch.arange(0, 160, 10, dtype=torch.uint8).expand(24, 3, 16, 16)
    for name, mirrors in (("shift", False), ("pad", True), ("none", False)):
        x, _ = next(iter(Batches(data, TrainConfig(batch_size=24, augmentation=name), 0)))
        falls = (x[:, 0, 8, 4:12].diff() < 0).any(1)
        assert falls.any() == mirrors


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_images_and_classifier_have_their_channels_last(augmentation: str) -> None:
    model, last = build_classifier("small-cnn", 3, 16), torch.channels_last
    config = TrainConfig(steps=1, batch_size=4, augmentation=augmentation)
    x, _ = next(iter(Batches(colour_images(4), config, 0, size=16)))
    train_classifier(model, colour_images(4), config, seed=0)
    assert x.is_contiguous(memory_format=last)
    assert all(p.is_contiguous(memory_format=last) for p in model.parameters() if p.ndim == 4)


def test_synchronised_batch_norm_keeps_the_activations() -> None:
    model = build_classifier("mobilenetv2_050", 3, 32).eval()
    images = to_float(colour_images(2, size=32).images)
    with torch.no_grad():
        expected = model(images)
        synchronise_batch_norm(model)
        torch.testing.assert_close(model.eval()(images), expected)
    assert any(isinstance(m, torch.nn.SyncBatchNorm) for m in model.modules())


def test_an_unknown_augmentation_is_refused() -> None:
    with pytest.raises(UsageError, match="--augment blur: unknown"):
        stored_side("blur", 224)
    assert (stored_side("crop", 224), stored_side("pad", 224)) == (256, 224)
