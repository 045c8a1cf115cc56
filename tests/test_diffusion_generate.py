"""An image depends on its own seed only, and equals what diffusers draws for the same noise."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

from utilgen_cli.diffusion import ddim, render
from utilgen_cli.diffusion.generate import GenerateConfig, Generator, known_classes, model_named
from utilgen_cli.diffusion.noise import NoiseConfig
from utilgen_cli.diffusion.policy import Policy
from utilgen_cli.diffusion.utilisation import image_flops
from utilgen_cli.runtime.errors import BadInput, UsageError, UtilgenError
from utilgen_cli.shards.sample import Sample

from .random_bundle import CLASSES, SIZE, make_bundle
from .test_diffusion_tokens import make_tokens

CPU: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
PLAN = [(c, i) for i in range(4) for c in range(3)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def generator(bundle: Path) -> Generator:
    return Generator(GenerateConfig(str(bundle), seed=7), **CPU)


@pytest.fixture(scope="module")
def drawn(generator: Generator) -> dict[str, Sample]:
    return {sample.key: sample for sample in generator.draw(PLAN)}


def pixels(sample: Sample) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(sample.image[1])).convert("RGB"), dtype=int)


def test_samples_are_what_the_contract_says(
    bundle: Path, generator: Generator, drawn: dict[str, Sample]
) -> None:
    assert list(drawn) == [f"{c:04d}-{i:06d}" for c, i in PLAN]
    sample = drawn["0002-000001"]
    assert list(sample.members) == ["png", "cls", "json"]
    assert sample.label == 2
    assert pixels(sample).shape == (SIZE, SIZE, 3)
    assert sample.facts == {
        "class_name": "ankle boot", "prompt": "a photo of a ankle boot", "seed": 7, "image": 1,
        "steps": 4, "guidance_scale": 3.0, "sampler": "ddim", "model": str(bundle),
        "source": "generate",
    }  # fmt: skip
    assert len({sample.image[1] for sample in drawn.values()}) == len(PLAN)


def test_images_equal_those_of_the_diffusers_pipeline(
    bundle: Path, generator: Generator, drawn: dict[str, Sample]
) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(bundle)
    pipe.set_progress_bar_config(disable=True)
    for c, i in PLAN[:4]:
        image = pipe(
            f"a photo of a {CLASSES[c]}", num_inference_steps=4, guidance_scale=3.0, height=SIZE,
            width=SIZE, latents=ddim.initial_noise(generator.model, 7, [(c, i)]),
        ).images[0]  # fmt: skip
        ours = pixels(drawn[f"{c:04d}-{i:06d}"])
        assert np.abs(np.asarray(image, dtype=int) - ours).max() <= 1


@given(items=st.lists(st.sampled_from(PLAN), min_size=1, max_size=10))
@settings(max_examples=8, deadline=None)
def test_bytes_do_not_depend_on_the_company(
    generator: Generator, drawn: dict[str, Sample], items: list[tuple[int, int]]
) -> None:
    for sample in generator.draw(items):
        assert sample.members == drawn[sample.key].members


def test_a_compiled_unet_draws_the_same_pictures_and_is_compiled_once(
    bundle: Path, drawn: dict[str, Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced and differentiated as always, but its kernels are not built: that takes a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()  # else a graph of another test's U-Net serves
    counters.clear()
    generator = Generator(GenerateConfig(str(bundle), seed=7, compile=True), **CPU)
    assert counters["stats"]["unique_graphs"] == 1  # before anything is drawn, or learnt
    for part in (PLAN[:5], PLAN[5:]):
        for sample in generator.draw(part):
            assert np.abs(pixels(sample) - pixels(drawn[sample.key])).max() <= 1
    assert image_flops(generator.model, 4, 3.0) > 0  # of one row
    assert counters["stats"]["unique_graphs"] == 1


def test_a_machine_without_a_compiler_says_so() -> None:
    from torch._inductor import config

    model: Any = SimpleNamespace(unet=torch.nn.Tanh())
    render.compile_unet(model)
    no_compiler = config.patch({"cpp.cxx": (None, "/bin/false"), "force_disable_caches": True})
    with (
        no_compiler,
        pytest.raises(UtilgenError, match="--compile: the U-Net cannot be compiled"),
    ):
        model.unet(torch.ones(3))


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_bytes_do_not_depend_on_the_batch_size(
    bundle: Path, drawn: dict[str, Sample], batch_size: int
) -> None:
    other = Generator(GenerateConfig(str(bundle), seed=7, batch_size=batch_size), **CPU)
    for sample in other.draw(PLAN[2:7]):
        assert sample.members == drawn[sample.key].members


def test_latents_are_the_same_to_the_last_bit_in_any_company() -> None:
    """At the shipped model's size the kernels do round differently for other batch shapes."""
    generator = Generator(GenerateConfig("tiny", steps=2), **CPU)
    found: list[torch.Tensor] = []

    def latents(items: Sequence[tuple[int, int]]) -> torch.Tensor:
        made = generator.latents(items)
        found.append(made[items.index((3, 1))])
        return made

    rows = render.tile(generator.model, 1)
    for company in ([(3, 1)], [(3, 1), (0, 0)], [*PLAN[:5], (3, 1)]):
        list(render.render(generator.model, company, latents, rows))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    alone = generator.latents([(3, 1)])[0]
    assert torch.allclose(alone, found[0], atol=1e-4)


@pytest.mark.parametrize(
    ("device", "batch_size", "images", "rows"),
    [("cuda", None, 1, 1), ("cuda", None, 10, 16), ("cuda", None, 1000, 256), ("cuda", None, None, 256),
     ("cuda", 4, 1000, 4), ("cuda", 6, 3, 4), ("cpu", None, 1, 16), ("cpu", 64, 1000, 16)])  # fmt: skip
def test_a_gpu_fills_no_large_batch_for_a_few_images(
    generator: Generator, device: str, batch_size: int | None, images: int | None, rows: int
) -> None:
    model = replace(generator.model, device=torch.device(device))
    assert render.tile(model, batch_size, images) == rows


def test_every_model_call_has_the_same_number_of_rows(generator: Generator) -> None:
    rows = set()
    hooks = [
        generator.model.unet.register_forward_pre_hook(lambda _, args: rows.add(len(args[0]))),
        generator.model.vae.decoder.register_forward_pre_hook(
            lambda _, args: rows.add(2 * len(args[0]))
        ),
    ]
    list(generator.draw(PLAN[:11]))
    for hook in hooks:
        hook.remove()
    assert rows == {2 * render.tile(generator.model)}


def test_a_policy_of_the_class_prompts_draws_the_same(
    bundle: Path, tmp_path: Path, generator: Generator, drawn: dict[str, Sample]
) -> None:
    Policy(generator.embeds[:, None], CLASSES, generator.prompts).save(tmp_path)
    other = Generator(GenerateConfig(str(bundle), seed=7, policy=tmp_path), **CPU)
    for sample in other.draw(PLAN[:3]):
        assert sample.image == drawn[sample.key].image
        assert sample.facts["policy"] == str(tmp_path)


def test_each_member_of_a_policy_draws_its_images(
    bundle: Path, tmp_path: Path, generator: Generator, drawn: dict[str, Sample]
) -> None:
    empty = generator.uncond.expand_as(generator.embeds)
    both = torch.stack([generator.embeds, empty], 1)  # [C, 2, L, D]
    Policy(both, CLASSES, generator.prompts).save(tmp_path)
    other = Generator(GenerateConfig(str(bundle), seed=7, policy=tmp_path), **CPU)
    same = {s.key: s.image == drawn[s.key].image for s in other.draw(PLAN[:9])}
    assert same == {f"{c:04d}-{i:06d}": i % 2 == 0 for c, i in PLAN[:9]}


def test_a_policy_for_other_classes_is_refused(
    bundle: Path, tmp_path: Path, generator: Generator
) -> None:
    """Where none are named its own count, not those of the bundle, which may number them apart."""
    Policy(generator.embeds[:, None], ["x", "y", "z"], generator.prompts).save(tmp_path)
    assert Generator(GenerateConfig(str(bundle), policy=tmp_path), **CPU).classes == ["x", "y", "z"]
    with pytest.raises(BadInput, match=r"other classes\. Add --classes x,y,z"):
        Generator(GenerateConfig(str(bundle), policy=tmp_path, classes=tuple(CLASSES)), **CPU)


def test_a_policy_that_inverts_every_step_needs_ddim(
    bundle: Path, tmp_path: Path, generator: Generator
) -> None:
    noise = NoiseConfig("zigzag")
    Policy(generator.embeds[:, None], CLASSES, generator.prompts, noise).save(tmp_path)
    with pytest.raises(UsageError, match="inverts with DDIM, not unipc"):
        Generator(GenerateConfig(str(bundle), policy=tmp_path, sampler="unipc"), **CPU)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_operations_of_an_image_are_those_of_drawing_it(
    generator: Generator, scale: float
) -> None:
    model = generator.model
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        noise = ddim.initial_noise(model, 0, [(0, 0)])
        cond = generator.embeds[:1]
        model.decode(ddim.sample(model, noise, cond, generator.uncond, 4, scale))
    assert image_flops(model, 4, scale) == counted.get_total_flops() > 1e6


def test_tokens_a_prompt_and_a_scale_change_the_picture(
    bundle: Path, tmp_path: Path, drawn: dict[str, Sample]
) -> None:
    tokens = make_tokens(tmp_path, 1)
    changes: list[dict[str, Any]] = [
        {"tokens": tokens}, {"prompt": "{} in the snow"}, {"guidance_scale": 1.0}, {"steps": 3},
        {"sampler": "dpm++"}, {"seed": 8},
    ]  # fmt: skip
    pictures = [drawn["0000-000000"].image[1]]
    for change in changes:
        config = GenerateConfig(**{"model": str(bundle), "seed": 7, **change})
        pictures += [s.image[1] for s in Generator(config, **CPU).draw([(0, 0)])]
    assert len(set(pictures)) == 7


def test_webp_holds_the_pixels_of_png(bundle: Path, drawn: dict[str, Sample]) -> None:
    config = GenerateConfig(str(bundle), seed=7, image_format="webp")
    (sample,) = Generator(config, **CPU).draw([(1, 2)])
    assert list(sample.members) == ["webp", "cls", "json"]
    assert (pixels(sample) == pixels(drawn["0001-000002"])).all()


@pytest.mark.parametrize("change", [{"sampler": "euler"}, {"image_format": "bmp"}])
def test_unknown_choices_are_refused(change: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="Use one of"):
        GenerateConfig("tiny", **change)  # type: ignore[arg-type]


def test_pictures_without_their_class_are_refused() -> None:
    """diffusers spells no guidance with a 0."""
    with pytest.raises(UsageError, match="would draw without the class"):
        GenerateConfig("tiny", guidance_scale=0)


def test_classes_are_found_without_loading_a_model(bundle: Path, tmp_path: Path) -> None:
    tokens = make_tokens(tmp_path / "tokens", 1)
    assert known_classes(GenerateConfig(str(bundle))) == CLASSES
    assert known_classes(GenerateConfig("nowhere", tokens=tokens)) == CLASSES
    assert known_classes(GenerateConfig("nowhere", classes=("cat",))) == ["cat"]
    assert model_named(None, tokens) == "tiny"
    with pytest.raises(UsageError, match="no model is named"):
        model_named(None, None)
    with pytest.raises(UsageError, match="differ"):
        known_classes(GenerateConfig("nowhere", tokens=tokens, classes=("cat",)))


# --- the pipeline of threads ---


@given(st.lists(st.integers(), max_size=20), st.integers(0, 5))
def test_running_ahead_keeps_the_order_and_the_bound(items: list[int], ahead: int) -> None:
    started = 0

    def batches() -> Iterator[int]:
        nonlocal started
        for item in items:
            started += 1
            yield item

    out = []
    for number, item in enumerate(render.run_ahead(batches(), ahead)):
        assert started <= number + ahead + 1
        out.append(item)
    assert out == items


def test_a_reader_that_leaves_ends_the_threads(generator: Generator) -> None:
    before = threading.active_count()
    stream = generator.draw(PLAN * 4)
    next(stream)
    stream.close()
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_an_error_while_encoding_reaches_the_reader(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(rgb: np.ndarray, format: str) -> bytes:
        raise OSError("the encoder broke")

    monkeypatch.setattr(render, "encode_image", encode)
    with pytest.raises(OSError, match="the encoder broke"):
        list(generator.draw(PLAN))
