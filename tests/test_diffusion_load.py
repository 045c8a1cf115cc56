"""What is loaded is what diffusers loads, and nothing hostile or broken gets further than one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from utilgen_cli.diffusion import ddim
from utilgen_cli.diffusion.adapters import LORA_WEIGHTS, fuse_adapters
from utilgen_cli.diffusion.bundle import parse_classes, read_defaults
from utilgen_cli.diffusion.load import LatentDiffusion, class_prompts, load_model
from utilgen_cli.runtime.errors import BadInput, NoInput, UsageError

from .conftest import make_sample, tar_bytes
from .random_bundle import CLASSES, SIZE, make_bundle, make_pipeline, make_unet

ITEMS = [(0, 0), (1, 0), (2, 1)]
PROMPTS = [f"a photo of a {name}" for name in CLASSES]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def adapters(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """LoRA directories with random weights, written by diffusers."""
    root = tmp_path_factory.mktemp("adapters")
    parts = {"unet": ["unet"], "text": ["text_encoder"], "both": ["unet", "text_encoder"]}
    for seed, (name, modules) in enumerate(parts.items()):
        write_lora(bundle, root / name, modules, seed)
    return {name: root / name for name in parts}


def write_lora(bundle: Path, out: Path, modules: list[str], seed: int) -> None:
    torch.manual_seed(seed)
    pipe = StableDiffusionPipeline.from_pretrained(bundle)
    targets = {"unet": ["to_q", "to_k", "to_v", "to_out.0"], "text_encoder": ["q_proj", "v_proj"]}
    states = {}
    for name in modules:
        module = getattr(pipe, name)
        config = LoraConfig(
            r=2, lora_alpha=4, target_modules=targets[name], init_lora_weights=False
        )
        module.add_adapter(config)
        states[name] = get_peft_model_state_dict(module)
    StableDiffusionPipeline.save_lora_weights(
        out, unet_lora_layers=states.get("unet"),
        text_encoder_lora_layers=states.get("text_encoder"),
        unet_lora_adapter_metadata={"r": 2, "lora_alpha": 4, "target_modules": targets["unet"]}
        if "unet" in states else None,
        text_encoder_lora_adapter_metadata={
            "r": 2, "lora_alpha": 4, "target_modules": targets["text_encoder"]
        } if "text_encoder" in states else None,
    )  # fmt: skip


def draw(model: LatentDiffusion) -> torch.Tensor:
    with torch.no_grad():
        cond, uncond = model.encode_prompts(PROMPTS), model.encode_prompts([""])
        noise = ddim.initial_noise(model, 0, ITEMS)
        return model.decode(ddim.sample(model, noise, cond, uncond, 4, 3.0)) * 255


def draw_with_diffusers(pipe: StableDiffusionPipeline, model: LatentDiffusion) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        PROMPTS, num_inference_steps=4, guidance_scale=3.0, height=SIZE, width=SIZE,
        latents=ddim.initial_noise(model, 0, ITEMS), output_type="pt",
    ).images  # fmt: skip
    return images * 255


def test_a_bundle_brings_its_defaults(bundle: Path) -> None:
    model = load_model(str(bundle))
    assert (model.size, model.steps, model.guidance_scale) == (SIZE, 4, 3.0)
    assert model.classes == CLASSES
    assert model.latent_shape == (4, SIZE // 2, SIZE // 2)
    assert class_prompts(model, None) == PROMPTS
    assert class_prompts(model, None, ["cat"], "one {} here") == ["one cat here"]


def test_a_bundle_without_defaults_takes_its_size_from_the_unet(tmp_path: Path) -> None:
    model = load_model(str(make_bundle(tmp_path, defaults=False)))
    assert (model.size, model.steps, model.guidance_scale) == (SIZE, 25, 7.5)


def test_half_precision_weights_are_widened(tmp_path: Path) -> None:
    make_bundle(tmp_path)
    UNet2DConditionModel.from_pretrained(tmp_path / "unet").half().save_pretrained(
        tmp_path / "unet"
    )
    model = load_model(str(tmp_path))
    assert {p.dtype for p in model.unet.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in model.unet.parameters())


def test_prompts_are_encoded_as_the_pipeline_encodes_them(bundle: Path) -> None:
    model = load_model(str(bundle))
    pipe = StableDiffusionPipeline.from_pretrained(bundle)
    theirs = pipe.encode_prompt([*PROMPTS, "x" * 200], "cpu", 1, False)[0]
    assert torch.equal(model.encode_prompts([*PROMPTS, "x" * 200]), theirs)


def test_images_are_encoded_to_scaled_latents_of_the_posterior(bundle: Path) -> None:
    model = load_model(str(bundle))
    images = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    posterior = model.vae.encode(images * 2 - 1).latent_dist
    scale = model.vae.config.scaling_factor
    assert torch.allclose(model.encode_images(images), posterior.mode() * scale)
    drawn = posterior.sample(torch.Generator().manual_seed(0)) * scale
    decoded = (model.vae.decode(drawn / scale).sample / 2 + 0.5).clamp(0, 1)
    assert torch.allclose(model.decode(drawn), decoded)


@pytest.mark.parametrize(
    "names", [["unet"], ["text"], ["both"], ["unet", "both"], ["text", "unet"]]
)
def test_adapters_draw_what_they_draw_in_diffusers(
    bundle: Path, adapters: dict[str, Path], names: list[str]
) -> None:
    model = load_model(str(bundle), adapters=[adapters[name] for name in names])
    pipe = StableDiffusionPipeline.from_pretrained(bundle)
    for name in names:
        pipe.load_lora_weights(str(adapters[name]), adapter_name=name)
    pipe.set_adapters(names)
    theirs = draw_with_diffusers(pipe, model)
    assert (theirs - draw(load_model(str(bundle)))).abs().max() > 5  # they change the picture
    assert (draw(model) - theirs).abs().max() < 0.1
    fuse_adapters(model)
    assert not hasattr(model.unet, "peft_config") or not model.unet.peft_config
    assert (draw(model) - theirs).abs().max() < 0.1


def test_a_lora_that_is_small_beside_its_weights_survives_in_half_precision(
    bundle: Path, adapters: dict[str, Path]
) -> None:
    """The merged weights are those of float32, rounded once."""
    merged = load_model(str(bundle), adapters=[adapters["both"]], fuse=True)
    half = load_model(str(bundle), adapters=[adapters["both"]], dtype=torch.bfloat16, fuse=True)
    assert half.dtype == half.unet.dtype == half.vae.dtype == torch.bfloat16
    for part in ("unet", "text_encoder"):
        wide, narrow = (getattr(model, part).state_dict() for model in (merged, half))
        for name, weight in wide.items():
            assert torch.equal(weight.to(narrow[name].dtype), narrow[name]), (part, name)


def test_a_whole_pipeline_as_adapter_replaces_the_unet(
    bundle: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    tuned = make_bundle(tmp_path / "tuned", seed=1)
    model = load_model(str(bundle), adapters=[tuned, adapters["unet"]])
    pipe = StableDiffusionPipeline.from_pretrained(
        bundle, unet=UNet2DConditionModel.from_pretrained(tuned / "unet")
    )
    pipe.load_lora_weights(str(adapters["unet"]))
    assert (draw(model) - draw_with_diffusers(pipe, model)).abs().max() < 0.1
    with pytest.raises(UsageError, match="Name it first"):
        load_model(str(bundle), adapters=[adapters["unet"], tuned])


def test_an_adapter_of_another_model_is_refused(adapters: dict[str, Path], tmp_path: Path) -> None:
    make_bundle(tmp_path)
    torch.manual_seed(0)
    config = dict(make_unet().config) | {"block_out_channels": (16, 32)}
    UNet2DConditionModel.from_config(config).save_pretrained(tmp_path / "unet")
    with pytest.raises(BadInput, match="does not fit model"):
        load_model(str(tmp_path), adapters=[adapters["unet"]])


def test_an_adapter_may_be_one_file_of_another_tool(
    bundle: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "myDog_v1.safetensors"
    file.write_bytes((adapters["both"] / LORA_WEIGHTS).read_bytes())
    theirs = draw(load_model(str(bundle), adapters=[adapters["both"]]))
    assert torch.equal(draw(load_model(str(bundle), adapters=[file])), theirs)
    with pytest.raises(NoInput, match="is not there"):
        load_model(str(bundle), adapters=[tmp_path / "other.safetensors"])


@pytest.mark.parametrize(
    ("change", "why"),
    [(lambda key: key.replace("down_blocks.1", "down_blocks.7"), "which has 24 of its 32 layers"),
     (lambda key: key.replace("unet.", "base_model.model."), "which has 0 of its 32 layers")],
    ids=["other layers", "peft's own keys"],
)  # fmt: skip
def test_an_adapter_that_would_act_in_part_is_refused(
    bundle: Path, adapters: dict[str, Path], tmp_path: Path, change: Callable[[str], str], why: str
) -> None:
    tensors = load_file(adapters["unet"] / LORA_WEIGHTS)
    save_file({change(key): x for key, x in tensors.items()}, tmp_path / LORA_WEIGHTS)
    with pytest.raises(BadInput, match=why):
        load_model(str(bundle), adapters=[tmp_path])


def test_scales_that_diffusers_would_pass_over_are_refused(bundle: Path, tmp_path: Path) -> None:
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {"lora_down.weight": (2, 16), "lora_up.weight": (16, 2), "dora_scale": (16, 1)}
    save_file({f"{name}.{k}": torch.ones(v) for k, v in tensors.items()}, tmp_path / LORA_WEIGHTS)
    with pytest.raises(BadInput, match="DoRA"):
        load_model(str(bundle), adapters=[tmp_path])


def test_loading_says_nothing(
    bundle: Path, adapters: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    load_model(str(bundle), adapters=[adapters["both"]])
    assert capfd.readouterr() == ("", "")


# --- what is missing, broken or hostile ---


@pytest.mark.parametrize(
    "name", ["no/such/dir", "nothing", "/nowhere/at/all", "owner/name", "sd21", "a" * 5000, "../x"]
)
def test_a_model_that_is_not_there_gets_one_line_with_advice(name: str) -> None:
    with pytest.raises(NoInput) as caught:
        load_model(name)
    assert "\n" not in str(caught.value)
    assert caught.value.what_to_do


@pytest.mark.parametrize("name", ["adapters", "tokens"])
def test_a_missing_addition_is_no_input(bundle: Path, tmp_path: Path, name: str) -> None:
    value = [tmp_path / "none"] if name == "adapters" else tmp_path / "none"
    with pytest.raises(NoInput, match="none"):
        load_model(str(bundle), **{name: value})  # type: ignore[arg-type]


def drop_unet(path: Path) -> None:
    (path / "unet").rename(path / "elsewhere")


def cut_weights(path: Path) -> None:
    file = path / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickled_weights(path: Path) -> None:
    file = path / "unet" / "diffusion_pytorch_model.safetensors"
    state = UNet2DConditionModel.from_pretrained(path / "unet").state_dict()
    torch.save(state, file.with_suffix(".bin"))
    file.unlink()


def without(path: Path, folder: str, file: str, word: str) -> None:
    tensors = load_file(path / folder / file)
    kept = {key: value for key, value in tensors.items() if word not in key}
    assert len(kept) < len(tensors)
    save_file(kept, path / folder / file, {"format": "pt"})


def half_a_unet(path: Path) -> None:
    without(path, "unet", "diffusion_pytorch_model.safetensors", "mid_block")


def half_a_text_encoder(path: Path) -> None:
    without(path, "text_encoder", "model.safetensors", "layers.1")


def wide_text_encoder(path: Path) -> None:
    config = dict(make_unet().config) | {"cross_attention_dim": 24}
    UNet2DConditionModel.from_config(config).save_pretrained(path / "unet")


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def another_prediction(path: Path) -> None:
    edit(path / "scheduler" / "scheduler_config.json", prediction_type="flow")


def another_noise_schedule(path: Path) -> None:
    FlowMatchEulerDiscreteScheduler().save_pretrained(path / "scheduler")


def unet_without_config(path: Path) -> None:
    (path / "unet" / "config.json").unlink()


def nested_config(path: Path) -> None:
    (path / "unet" / "config.json").write_text("[" * 100_000)


DAMAGE = [drop_unet, unet_without_config, nested_config, cut_weights, pickled_weights, half_a_unet, half_a_text_encoder,
          wide_text_encoder, another_prediction, another_noise_schedule]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_broken_bundle_gets_one_line(
    tmp_path: Path, damage: Callable[[Path], None], capfd: pytest.CaptureFixture[str]
) -> None:
    damage(make_bundle(tmp_path))
    capfd.readouterr()
    with pytest.raises((NoInput, BadInput)) as caught:
        load_model(str(tmp_path))
    assert "\n" not in str(caught.value)
    assert damage is drop_unet or "has no unet/" not in str(caught.value)
    assert capfd.readouterr() == ("", "")  # the libraries do not say it a second time


@pytest.mark.parametrize(
    "asks",
    [{"in_channels": 9}, {"num_class_embeds": 4}, {"time_cond_proj_dim": 8}, {"encoder_hid_dim": 8,
     "encoder_hid_dim_type": "text_proj"}],
    ids=["inpainting", "classes", "LCM", "other text"],
)  # fmt: skip
def test_a_unet_that_asks_for_more_than_a_prompt_is_refused(
    tmp_path: Path, asks: dict[str, object]
) -> None:
    make_bundle(tmp_path)
    make_unet(**asks).save_pretrained(tmp_path / "unet")
    with pytest.raises(BadInput, match=rf"text-to-image model \({next(iter(asks))}: "):
        load_model(str(tmp_path))


def test_an_old_unet_was_trained_at_512_pixels_whatever_it_says(tmp_path: Path) -> None:
    make_bundle(tmp_path, defaults=False)
    edit(tmp_path / "unet" / "config.json", _diffusers_version="0.8.1", sample_size=32)
    model = load_model(str(tmp_path))
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path)
    assert model.latent_shape[1] == pipe.unet.config.sample_size == 64


def test_a_unet_without_a_size_needs_that_of_the_bundle(tmp_path: Path) -> None:
    make_bundle(tmp_path)
    edit(tmp_path / "unet" / "config.json", sample_size=None)
    assert load_model(str(tmp_path)).size == SIZE
    (tmp_path / "utilgen.json").unlink()
    with pytest.raises(BadInput, match=r"utilgen\.json: is needed"):
        load_model(str(tmp_path))


def test_the_timesteps_begin_where_they_do_in_diffusers(tmp_path: Path) -> None:
    make_bundle(tmp_path, steps_offset=0)
    edit(tmp_path / "scheduler" / "scheduler_config.json", steps_offset=0)
    model = load_model(str(tmp_path))
    theirs = draw_with_diffusers(StableDiffusionPipeline.from_pretrained(tmp_path), model)
    assert (draw(model) - theirs).abs().max() < 0.1


def test_one_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "photo.safetensors").touch()
    with pytest.raises(BadInput, match="is one file, not a diffusers directory"):
        load_model(str(tmp_path / "photo.safetensors"))


def test_half_precision_weights_are_taken_where_there_are_no_others(tmp_path: Path) -> None:
    pipe = make_pipeline()
    pipe.save_pretrained(tmp_path, variant="fp16")
    model = load_model(str(tmp_path))
    assert (draw(model) - draw_with_diffusers(pipe, model)).abs().max() < 0.1
    make_pipeline(seed=1).save_pretrained(tmp_path)
    other = load_model(str(tmp_path))
    assert not torch.equal(other.unet.conv_in.weight, model.unet.conv_in.weight)


def test_weights_may_lie_in_several_files(tmp_path: Path) -> None:
    pipe = make_pipeline()
    pipe.save_pretrained(tmp_path, max_shard_size="40KB")
    assert not (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").exists()
    model = load_model(str(tmp_path))
    assert (draw(model) - draw_with_diffusers(pipe, model)).abs().max() < 0.1


def fake_hub(monkeypatch: pytest.MonkeyPatch, hub: Path, cache: Path) -> list[bool]:
    """A hub with one repository; of each call, whether the cache alone was asked."""
    asked: list[bool] = []

    def snapshot_download(
        hub_id: str, allow_patterns: list[str], local_files_only: bool = False, **_: object
    ) -> str:
        if local_files_only and not cache.exists():
            raise LocalEntryNotFoundError("not here")
        if not local_files_only and not hub.exists():
            raise OSError("no network")
        for file in () if local_files_only else hub.rglob("*"):
            name = str(file.relative_to(hub))
            if file.is_file() and any(fnmatch(name, pattern) for pattern in allow_patterns):
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, cache / name)
        asked.append(local_files_only)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


@pytest.mark.parametrize("how", [{}, {"variant": "fp16"}, {"max_shard_size": "40KB"}])
def test_weights_are_fetched_in_the_files_that_a_repository_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: dict[str, str]
) -> None:
    """Plain ones where it has them: no others then."""
    hub, cache = tmp_path / "hub", tmp_path / "cache"
    make_pipeline().save_pretrained(hub, **how)
    asked = fake_hub(monkeypatch, hub, cache)
    drawn = draw(load_model("someone/model"))
    assert torch.equal(drawn, draw(load_model(str(hub))))
    assert asked == [False] * (3 if how else 2)  # what it is, its weights, its other weights
    assert torch.equal(drawn, draw(load_model("someone/model")))
    assert asked[-1] == ("variant" not in how)  # the second time the hub is not asked
    for part in (cache / "unet").glob("*-00002-of-*"):  # where the fetch broke off
        part.unlink()
    assert torch.equal(drawn, draw(load_model("someone/model")))


@pytest.mark.parametrize("asks", [{"addition_embed_type": "text_time"}, {}], ids=["SDXL", "Flux"])
def test_no_weights_are_fetched_of_another_kind_of_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asks: dict[str, str]
) -> None:
    hub, cache = tmp_path / "hub", tmp_path / "cache"
    make_bundle(hub)
    edit(hub / "unet" / "config.json", **asks)
    if not asks:
        (hub / "unet").rename(hub / "transformer")
    fake_hub(monkeypatch, hub, cache)
    with pytest.raises((BadInput, NoInput), match=r"model someone/model: (is not a|has no unet/)"):
        load_model("someone/model")
    assert list(cache.rglob("config.json")) and not list(cache.rglob("*.safetensors"))


def test_half_precision_that_another_tool_left_is_taken_where_there_is_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a machine that has it would draw other pictures than one that has nothing."""
    hub, cache = tmp_path / "hub", tmp_path / "cache"
    make_pipeline().save_pretrained(cache, variant="fp16")
    half = draw(load_model(str(cache)))
    fake_hub(monkeypatch, hub, cache)
    assert torch.equal(draw(load_model("someone/model")), half)
    make_pipeline(seed=1).save_pretrained(hub)
    assert torch.equal(draw(load_model("someone/model")), draw(load_model(str(hub))))


def test_code_that_a_bundle_brings_is_never_run(tmp_path: Path) -> None:
    make_bundle(tmp_path)
    mark = tmp_path / "ran"
    code = f"open({str(mark)!r}, 'w')\nclass Evil: pass\n"
    for folder in ("", "unet", "tokenizer", "text_encoder"):
        (tmp_path / folder / "evil.py").write_text(code)
    index = {"_class_name": ["evil", "Evil"], "unet": ["evil", "Evil"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for folder, name in (("tokenizer", "tokenizer_config.json"), ("text_encoder", "config.json")):
        file = tmp_path / folder / name
        automap = {"auto_map": {"AutoTokenizer": "evil.Evil", "AutoModel": "evil.Evil"}}
        file.write_text(json.dumps(json.loads(file.read_text()) | automap))
    load_model(str(tmp_path))
    assert not mark.exists()


@pytest.mark.parametrize(
    "text",
    ['{"size": 7}', '{"size": 100000}', '{"steps": 0}', '{"steps": true}', '{"classes": [1]}',
     '{"classes": []}', '{"guidance_scale": NaN}', '{"guidance_scale": 0}', '{"template": "no class"}', "{", "[]", '"x"'],
)  # fmt: skip
def test_nonsense_defaults_are_bad_input(tmp_path: Path, text: str) -> None:
    (tmp_path / "utilgen.json").write_text(text)
    with pytest.raises(BadInput, match=r"utilgen\.json"):
        read_defaults(tmp_path)


def test_a_bundle_names_its_own_clip_and_no_directory_outside(tmp_path: Path) -> None:
    (tmp_path / "bundle" / "open_clip").mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    for name, found in (("open_clip", str(tmp_path / "bundle" / "open_clip")),
                        ("../secret", "../secret"), ("ViT-B-32", "ViT-B-32")):  # fmt: skip
        (tmp_path / "bundle" / "utilgen.json").write_text(json.dumps({"clip": name}))
        assert read_defaults(tmp_path / "bundle")["clip"] == found


def test_classes_come_from_a_comma_list_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("ankle boot\n\n bag \n")
    assert parse_classes(str(tmp_path / "names.txt")) == ("ankle boot", "bag")
    assert parse_classes("ankle boot, bag") == ("ankle boot", "bag")
    assert parse_classes(None) is None
    (tmp_path / "names.txt").write_text("\ufeffcat\r\ndog\r\n", newline="")
    assert parse_classes(str(tmp_path / "names.txt")) == ("cat", "dog")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    for text in ("", " , ", "bag,bag", str(tmp_path / "latin.txt"), "caf\udce9,bag"):
        with pytest.raises(UsageError):
            parse_classes(text)
    with pytest.raises(NoInput, match="no such file"):
        parse_classes(str(tmp_path / "name.txt"))


def test_classes_come_from_shards(tmp_path: Path) -> None:
    def shards(*named: tuple[int, str | None]) -> str:
        samples = [make_sample(i, c, class_name=name) for i, (c, name) in enumerate(named)]
        (tmp_path / "00000.tar").write_bytes(tar_bytes(samples))
        return str(tmp_path)

    real = shards((1, "bag"), (0, "ankle boot "), (1, "bag"), (2, "a,b"))
    assert (
        parse_classes(real) == parse_classes(f"{real}/00000.tar") == ("ankle boot ", "bag", "a,b")
    )
    for second, why in (
        (2, "class 1 has no image"),
        (0, "00000.tar.*'dress' here and 'bag' before"),
    ):
        with pytest.raises(BadInput, match=why):
            parse_classes(shards((0, "bag"), (second, "dress")))
    with pytest.raises(UsageError, match="'bag' twice"):
        parse_classes(shards((0, "bag"), (1, "bag")))
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"directory without shards.*photos,` for a class"):
        parse_classes(f"{tmp_path}/photos")
    for missing in (f"{tmp_path}/gone/", f"{tmp_path}/gone.tar"):
        with pytest.raises(NoInput, match="no such file"):
            parse_classes(missing)
