"""Of a GPU's rules, those that can be held without one: torch's fake tensors have a device, no values.

What mixes devices fails as on a GPU; so does whatever would make the host wait for it (to ask for a
value, to send tensors by a plain copy), since a GPU whose host waits runs out of work. Autograd's
engine cannot run on fake tensors: what is held here is forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from utilgen_cli.classification.batches import WHOLE_BATCH, Batches
from utilgen_cli.classification.data import LabelledImages
from utilgen_cli.classification.train import TrainConfig
from utilgen_cli.diffusion.class_adapters import WEIGHTS, ClassAdapters
from utilgen_cli.diffusion.ddim import SAMPLERS
from utilgen_cli.diffusion.generate import GenerateConfig, Generator
from utilgen_cli.diffusion.instance import PolicyGenerator
from utilgen_cli.diffusion.noise import MODES, NoiseConfig
from utilgen_cli.diffusion.policy import Policy
from utilgen_cli.diffusion.render import decode_pixels
from utilgen_cli.runtime.device import sent
from utilgen_cli.valuation.todv import Trajectory
from utilgen_cli.valuation.weight_net import WeightNet

from .random_bundle import CLASSES, make_bundle

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ITEMS = [(0, 0), (1, 0), (0, 1)]


class Gpu(FakeTensorMode):
    """Tensors of the CPU are as always; those of "cuda" are fake ones."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        to_gpu = torch.device(kwargs.get("device") or "cpu").type == "cuda"
        if name == "_pin_memory":
            return args[0].clone()
        if not to_gpu and not any(isinstance(x, FakeTensor) for x in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        copied = name == "_to_copy" and not isinstance(args[0], FakeTensor)
        picks = args[1] if name == "index" and isinstance(args[0], FakeTensor) else ()
        copied |= any(x is not None and not isinstance(x, FakeTensor) for x in picks)
        if copied and not kwargs.get("non_blocking"):
            raise RuntimeError("the host waits until the copy is done")
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.fixture
def gpu() -> Iterator[None]:
    with Gpu(allow_non_fake_inputs=True), torch.no_grad():
        yield


def moved(module: nn.Module) -> nn.Module:
    """The module with its parameters and buffers on the GPU; its own `to` cannot fake them."""
    for child in module.modules():
        for held in (child._parameters, child._buffers):
            for name, x in held.items():
                if x is not None:
                    fake = sent(x.detach(), CUDA)
                    held[name] = nn.Parameter(fake) if isinstance(x, nn.Parameter) else fake
    return module


@pytest.fixture
def generator(gpu: None, tmp_path: Path) -> Generator:
    make_bundle(tmp_path)
    made = Generator(GenerateConfig(str(tmp_path), steps=4), device=CPU, dtype=torch.float32)
    made.embeds, made.uncond = sent(made.embeds, CUDA), sent(made.uncond, CUDA)
    unet, vae = moved(made.model.unet), moved(made.model.vae)
    made.model = replace(made.model, unet=unet, vae=vae, device=CUDA)
    return made


@pytest.mark.parametrize(
    ("error", "deed"),
    [(DataDependentOutputException, lambda x: x.sum().item()),
     (DataDependentOutputException, lambda x: bool(x[0])),
     (DataDependentOutputException, lambda x: x.tolist()),
     (RuntimeError, lambda x: x + torch.ones(2)),
     (RuntimeError, lambda x: torch.ones(2).to(CUDA)),
     (RuntimeError, lambda x: torch.tensor(3, device=CUDA)),
     (RuntimeError, lambda x: x[[0, 1]]),
     (RuntimeError, lambda x: x[torch.tensor([0, 1])])],
)  # fmt: skip
def test_fake_tensors_refuse_what_makes_the_host_wait(
    gpu: None, error: type[Exception], deed: Callable[[Tensor], object]
) -> None:
    with pytest.raises(error):
        deed(torch.ones(2, device=CUDA))


# not unipc: diffusers' solver sends its coefficients in every step
@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "unipc"])
def test_drawing_never_waits(generator: Generator, sampler: str) -> None:
    generator.config = replace(generator.config, sampler=sampler)
    for part in decode_pixels(generator.model, generator.latents(ITEMS)):
        assert part.device.type == "cuda"


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
    assert generator.latents(ITEMS).device.type == "cuda"


# with refine there is a wait a step, which may save a call of the U-Net
@pytest.mark.parametrize("mode", MODES)
def test_optimising_noise_never_waits(generator: Generator, mode: str) -> None:
    embeds = torch.zeros(len(CLASSES), 2, *generator.embeds.shape[1:])
    policy = Policy(embeds, CLASSES, CLASSES, NoiseConfig(mode))
    drawn = PolicyGenerator.adopt(generator, policy, {}).latents(ITEMS)
    assert drawn.device.type == "cuda"


def test_a_batch_to_weigh_never_waits(gpu: None) -> None:
    pool = SimpleNamespace(
        images=torch.zeros(4, 3, 8, 8, dtype=torch.uint8), labels=torch.arange(4)
    )
    run: Any = SimpleNamespace(pool=pool, device=CUDA, config=SimpleNamespace(augment="flip"))
    draws = torch.Generator().manual_seed(0)
    for part in Trajectory._images(run, torch.tensor([2, 0]), draws):
        assert part.device.type == "cuda"


@pytest.mark.parametrize("augmentation", WHOLE_BATCH)
def test_a_batch_to_train_on_never_waits(gpu: None, augmentation: str) -> None:
    data = LabelledImages(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.arange(4), [], ["a"])
    config = TrainConfig(batch_size=2, augmentation=augmentation)
    for part in next(iter(Batches(data, config, 0, device=CUDA))):
        assert part.device.type == "cuda"


def test_the_weight_network_never_waits(gpu: None) -> None:
    net, losses = moved(WeightNet()), torch.ones(5, device=CUDA)
    net.see(losses)
    assert net(losses).device.type == "cuda"
