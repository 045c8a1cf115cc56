"""A GPU whose host waits for it runs out of work: what never waits, and what waits once a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from utilgen_cli.classification.batches import WHOLE_BATCH, Batches
from utilgen_cli.classification.data import LabelledImages
from utilgen_cli.classification.train import TrainConfig
from utilgen_cli.commands.generate import generate
from utilgen_cli.commands.ilpo import ilpo
from utilgen_cli.diffusion.class_adapters import WEIGHTS, ClassAdapters
from utilgen_cli.diffusion.datadream import LoraConfig, train_lora
from utilgen_cli.diffusion.ddim import SAMPLERS
from utilgen_cli.diffusion.finetune import Finetuning
from utilgen_cli.diffusion.finetune_config import FinetuneConfig
from utilgen_cli.diffusion.generate import GenerateConfig, Generator
from utilgen_cli.diffusion.instance import PolicyGenerator
from utilgen_cli.diffusion.inversion import InversionConfig, invert_tokens
from utilgen_cli.diffusion.latents import LatentCache
from utilgen_cli.diffusion.load import load_model
from utilgen_cli.diffusion.noise import MODES, NoiseConfig
from utilgen_cli.diffusion.policy import Policy
from utilgen_cli.diffusion.preference_run import PreferenceConfig, train_preference
from utilgen_cli.diffusion.prompt_inversion import invert_prompts
from utilgen_cli.diffusion.render import decode_pixels
from utilgen_cli.runtime.device import sent
from utilgen_cli.runtime.errors import UtilgenError
from utilgen_cli.valuation.pool import make_pool
from utilgen_cli.valuation.todv import Trajectory, ValueConfig
from utilgen_cli.valuation.training import ValueData, train_values
from utilgen_cli.valuation.value_model import load_value
from utilgen_cli.valuation.weight_net import WeightNet

from .conftest import ROOT, make_sample
from .policy_parts import make_value
from .pretend_gpu import HostWaits, State, no_waits, pretend_gpu
from .random_bundle import CLASSES, make_bundle
from .test_preference_training import pairs, shaded_samples, shots
from .valuation_toys import colours

CUDA = torch.device("cuda")
CLIP = ROOT / "utilgen_cli" / "tiny" / "open_clip"
ITEMS = [(0, 0), (1, 0), (0, 1)]


@pytest.fixture
def gpu() -> Iterator[None]:
    with pretend_gpu():
        yield


@pytest.fixture
def bundle(gpu: None, tmp_path: Path) -> str:
    return str(make_bundle(tmp_path / "bundle"))


@pytest.fixture
def generator(bundle: str) -> Iterator[Generator]:
    with torch.no_grad():
        yield Generator(GenerateConfig(bundle, steps=4), device=CUDA, dtype=torch.float32)


@pytest.mark.parametrize(
    ("error", "deed"),
    [(HostWaits, lambda x: x.sum().item()),
     (HostWaits, lambda x: bool(x[0])),
     (HostWaits, lambda x: x.tolist()),
     (HostWaits, lambda x: x.cpu()),
     (HostWaits, lambda x: torch.ones(2).to(CUDA)),
     (HostWaits, lambda x: torch.tensor(3, device=CUDA)),
     (HostWaits, lambda x: x[[0, 1]]),
     (HostWaits, lambda x: x[torch.tensor([0, 1])]),
     (HostWaits, lambda x: x[x > 0]),
     (HostWaits, lambda x: torch.empty(2).copy_(x)),
     (HostWaits, lambda x: torch.cuda.synchronize()),
     (TypeError, lambda x: x.numpy()),
     (RuntimeError, lambda x: x.pin_memory()),
     (RuntimeError, lambda x: x + torch.ones(2)),
     (RuntimeError, lambda x: x.bfloat16()[None] @ x[:, None]),
     (RuntimeError, lambda x: torch.ones(2)[x.long()] + torch.ones(2)),
     (RuntimeError, lambda x: torch.randn(2, device=CUDA, generator=torch.Generator()))],
)  # fmt: skip
def test_what_a_gpu_refuses_or_waits_for(
    gpu: None, error: type[Exception], deed: Callable[[Tensor], object]
) -> None:
    x = torch.ones(2, device=CUDA)
    with no_waits(), pytest.raises(error):
        deed(x)


def test_what_a_gpu_takes(gpu: None) -> None:
    with no_waits():
        x = sent(torch.tensor([3.0, 4.0]), CUDA).requires_grad_()
        (x * x).sum().backward()
        host = torch.empty(2, pin_memory=True)
        host.copy_(x.grad, non_blocking=True)  # type: ignore[arg-type]
        assert host.isnan().all()  # nobody waited
    torch.cuda.synchronize()
    assert host.tolist() == [6, 8]
    assert x.cpu().tolist() == [3, 4] and x.device.type == "cuda"
    with torch.autocast("cuda", torch.bfloat16):
        assert (x[None] @ x[:, None]).dtype == torch.bfloat16
        assert F.layer_norm(x.bfloat16(), [2]).dtype == torch.float32


def test_a_run_of_few_images_has_few_rows(bundle: str) -> None:
    config = GenerateConfig(bundle, images=3)
    drawing = Generator(config, device=CUDA, dtype=torch.float32)
    assert drawing.rows_a_call == 4
    assert replace(config, images=None).settings() == config.settings()


@pytest.mark.parametrize(
    ("command", "loads"),
    [(generate, "utilgen_cli.diffusion.generate.LazyGenerator"),
     (ilpo, "utilgen_cli.commands.joining.PolicyRun")])  # fmt: skip
def test_a_command_says_how_many_images_it_draws(
    bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Any, loads: str
) -> None:
    def load(config: GenerateConfig, *others: Any) -> None:
        raise UtilgenError("load", f"{config.images} images")

    monkeypatch.setattr(loads, load)
    with pytest.raises(UtilgenError, match=f"{5 * len(CLASSES)} images"):
        command(bundle, per_class=5, output=str(tmp_path / "out"))


# not unipc: diffusers' solver sends its coefficients in every step
@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "unipc"])
def test_drawing_never_waits(generator: Generator, sampler: str) -> None:
    generator.config = replace(generator.config, sampler=sampler)
    with no_waits():
        parts = decode_pixels(generator.model, generator.latents(ITEMS))
    assert all(part.device.type == "cuda" for part in parts)


def test_drawing_with_an_adapter_a_class_never_waits(generator: Generator, tmp_path: Path) -> None:
    model, layer = generator.model, "mid_block.attentions.0.transformer_blocks.0.attn2.to_q"
    into, out = model.unet.get_submodule(layer).weight.shape[::-1]
    folders = {c: tmp_path / name for c, name in enumerate(CLASSES)}
    for folder in folders.values():
        folder.mkdir()
        weights = {"A": torch.ones(1, into), "B": torch.ones(out, 1)}
        save_file({f"unet.{layer}.lora_{side}.weight": w for side, w in weights.items()},
                  folder / WEIGHTS)  # fmt: skip
    generator.model = replace(model, class_adapters=ClassAdapters(model, folders, "adapters"))
    with no_waits():
        assert generator.latents(ITEMS).device.type == "cuda"


# with refine there is a wait a step, which may save a call of the U-Net
@pytest.mark.parametrize("mode", MODES)
def test_optimising_noise_never_waits(generator: Generator, mode: str) -> None:
    embeds = torch.zeros(len(CLASSES), 2, *generator.embeds.shape[1:])
    policy = Policy(embeds, CLASSES, CLASSES, NoiseConfig(mode))
    adopted = PolicyGenerator.adopt(generator, policy, {})
    with no_waits():
        assert adopted.latents(ITEMS).device.type == "cuda"


@pytest.mark.parametrize("arch", ["small-cnn", f"open_clip:{CLIP}"], ids=["cnn", "tower"])
@pytest.mark.parametrize("augment", ["pad", "none"])
def test_a_batch_to_weigh_never_waits(gpu: None, arch: str, augment: str) -> None:
    pool, _ = make_pool(colours(6, 1), None, None, folds=2, canaries=0.1, seed=0)
    config = ValueConfig(arch=arch, folds=2, batch_size=4, augment=augment)
    run = Trajectory(config, pool, 16, 0, CUDA)
    assert (run.features is None) == (arch == "small-cnn")
    with no_waits():
        for part in (*run._batch(0)[0], *run._validation(0)):
            assert part.device.type == "cuda"


@pytest.mark.parametrize("augmentation", WHOLE_BATCH)
def test_a_batch_to_train_on_never_waits(gpu: None, augmentation: str) -> None:
    data = LabelledImages(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.arange(4), [], ["a"])
    config = TrainConfig(batch_size=2, augmentation=augmentation)
    with no_waits():
        for part in next(iter(Batches(data, config, 0, device=CUDA))):
            assert part.device.type == "cuda"


def test_the_weight_network_never_waits(gpu: None) -> None:
    net, losses = WeightNet().to(CUDA), torch.ones(5, device=CUDA)
    with no_waits():
        net.see(losses)
        assert net(losses).device.type == "cuda"


def waits_of(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, but: int) -> list[int]:
    """From now on `owner.name` may make the host wait `but` times; a list that grows by the waits
    of each call comes back."""
    real, found = getattr(owner, name), []

    def watched(*args: Any) -> Any:
        with no_waits(but):
            result = real(*args)
            found.append(but - (State.waits or 0))
        return result

    monkeypatch.setattr(owner, name, watched)
    return found


STEPS = FinetuneConfig(steps=3, batch_size=4, learning_rate=1e-2, gradient_accumulation=2)


@pytest.mark.parametrize("what", ["tokens", "prompts", "lora", "dpo", "kto"])
def test_a_step_of_fine_tuning_waits_once(
    bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    found = waits_of(monkeypatch, Finetuning, "advance", 1)
    out, where = tmp_path / what, {"device": CUDA, "dtype": torch.bfloat16}
    if what == "tokens":
        invert_tokens(shots(), out, InversionConfig(bundle, finetune=STEPS), **where)
    elif what == "prompts":
        config = InversionConfig(bundle, population=2, finetune=STEPS)
        invert_prompts(shots(), out, config, **where)
    elif what == "lora":
        train_lora(shots(), out, LoraConfig(bundle, finetune=STEPS), **where)
    else:
        samples = shaded_samples(12) if what == "kto" else pairs(12)
        config = PreferenceConfig(bundle, loss=what, finetune=STEPS)
        train_preference(samples, out, config, **where)
    assert found == [1, 1, 1]


@pytest.mark.parametrize("meta_gradient", ["jvp", "exact-double"])
@pytest.mark.parametrize("folds", [1, 2])
def test_a_step_of_value_train_never_waits(
    gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, meta_gradient: str, folds: int
) -> None:
    found = waits_of(monkeypatch, Trajectory, "_advance_one", 0)
    config = ValueConfig(
        steps=10, batch_size=8, folds=folds, snapshots=1, meta_gradient=meta_gradient
    )
    data = ValueData(colours(8, 1), colours(8, 2), colours(4, 3))
    train_values(data, config, tmp_path, device=CUDA)
    assert found == [0] * 10 * folds


@pytest.mark.parametrize("folds", [None, [0, 1, -1, 1]])
def test_the_gradient_of_the_judges_never_waits(
    gpu: None, tmp_path: Path, folds: list[int] | None
) -> None:
    value = load_value(make_value(tmp_path / "value"), device=CUDA)
    images = torch.rand(4, 3, 16, 16, device=CUDA).requires_grad_()
    labels = sent(torch.tensor([0, 1, 2, 0]), CUDA)
    known = None if folds is None else torch.tensor(folds)
    with no_waits():
        value.judge(images, labels, known).loss.sum().backward()
    assert images.grad is not None and images.grad.device.type == "cuda"


def test_images_are_decoded_while_those_before_them_are_encoded(
    bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host waits once a batch, for the one before; the latents are those of one at a time."""
    monkeypatch.setattr("utilgen_cli.diffusion.latents.MAX_BATCH", 2)
    samples = [make_sample(i, size=16) for i in range(5)]
    model = load_model(bundle, device=CUDA)
    cache = LatentCache(model, flip=True)
    with no_waits(but=1):  # five images: two batches, and one that waits for another
        for sample in samples:
            cache.add(sample)
    found = cache.finish()
    monkeypatch.setattr("utilgen_cli.diffusion.latents.MAX_BATCH", 1)
    alone = LatentCache(model, flip=True)
    for sample in samples:
        alone.add(sample)
    torch.testing.assert_close(found, alone.finish())
    assert found.shape == (5, 2, *model.latent_shape) and found.isfinite().all()
