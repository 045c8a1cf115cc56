"""dpo and lora as library calls: they learn, stop, resume, and write what diffusers reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from utilgen_cli.diffusion.datadream import LoraConfig, train_lora
from utilgen_cli.diffusion.ddim import initial_noise, sample
from utilgen_cli.diffusion.finetune_config import FinetuneConfig
from utilgen_cli.diffusion.generate import GenerateConfig, Generator, warnings_of
from utilgen_cli.diffusion.load import load_model
from utilgen_cli.diffusion.pair_data import check_judged, signs
from utilgen_cli.diffusion.preference import PreferenceObjective
from utilgen_cli.diffusion.preference_loss import beta_convention
from utilgen_cli.diffusion.preference_run import PreferenceConfig, outcome, train_preference
from utilgen_cli.diffusion.tokens import class_folder, save_tokens
from utilgen_cli.runtime import signals
from utilgen_cli.runtime.artefact import CHECKPOINT
from utilgen_cli.runtime.errors import BadInput, Stopped, UsageError, UtilgenError
from utilgen_cli.runtime.files import encode_json
from utilgen_cli.shards.images import decode_rgb, encode_image
from utilgen_cli.shards.operands import open_source
from utilgen_cli.shards.quarantine import Quarantine
from utilgen_cli.shards.sample import Sample

from .conftest import DATA
from .random_bundle import CLASSES, SIZE, make_bundle

LORA = "pytorch_lora_weights.safetensors"
QUICK = FinetuneConfig(steps=6, batch_size=4, learning_rate=1e-2, validate_every=3)
CPU: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_bundle(tmp_path_factory.mktemp("bundle")))


def picture(seed: int, high: int) -> bytes:
    rgb = np.random.default_rng(seed).integers(0, high, (SIZE, SIZE, 3), dtype=np.uint8)
    return encode_image(rgb)


def pairs(count: int = 24) -> Iterator[Sample]:
    """Bright noise wins against dark noise."""
    for i in range(count):
        c = i % len(CLASSES)
        facts = {"class_name": CLASSES[c], "prompt": f"a photo of a {CLASSES[c]}"}
        images = {"win.png": picture(i, 256), "lose.png": picture(1000 + i, 60)}
        yield Sample(
            f"{c:04d}-{i:06d}",
            {**images, "cls": str(c).encode(), "json": encode_json(facts)},
        )


def shots() -> Iterator[Sample]:
    for i in range(6):
        c = i % len(CLASSES)
        facts = encode_json({"class_name": CLASSES[c]})
        yield Sample(f"r{i}", {"png": picture(i, 256), "cls": str(c).encode(), "json": facts})


def run_dpo(
    bundle: str, out: Path, finetune: FinetuneConfig = QUICK, count: int = 24, **kw: Any
) -> dict[str, Any]:
    """Below 16 pairs none are held out, and the last weights are kept."""
    torch.manual_seed(hash(str(out)) % 1000)  # the global generator must not matter
    config = PreferenceConfig(bundle, finetune=finetune, **{"beta": 10.0, **kw})
    return train_preference(pairs(count), out, config, **CPU)


def run_lora(bundle: str, out: Path, finetune: FinetuneConfig = QUICK, **kw: Any) -> dict[str, Any]:
    return train_lora(shots(), out, LoraConfig(bundle, finetune=finetune, **kw), **CPU)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def draw(bundle: str, adapters: list[Path]) -> torch.Tensor:
    model = load_model(bundle, adapters=adapters)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        texts = model.encode_prompts([f"a photo of a {CLASSES[0]}", ""])
        return model.decode(sample(model, noise, texts[:1].expand(2, -1, -1), texts[1:], 4, 3.0))


def test_half_precision_that_took_no_step_leaves_no_result(bundle: str, tmp_path: Path) -> None:
    half = FinetuneConfig(steps=3, batch_size=4, learning_rate=1e30)
    with pytest.raises(UtilgenError, match=r"none of 3 steps was taken|not finite"):
        train_preference(
            pairs(24), tmp_path, PreferenceConfig(bundle, finetune=half),
            device=torch.device("cpu"), dtype=torch.float16,
        )  # fmt: skip
    assert not (tmp_path / "dpo.json").exists()


def shaded_pairs(count: int = 64) -> Iterator[Sample]:
    """Real photographs: the brighter print of each wins."""
    photos = open_source([str(DATA / "real")]).samples()
    for number, photo in zip(range(count), photos, strict=False):
        rgb = decode_rgb(photo).astype(np.float64)
        images = {
            f"{side}.png": encode_image((rgb * gain).clip(0, 255).astype(np.uint8))
            for side, gain in (("win", 1.3), ("lose", 0.6))
        }
        yield Sample(f"p{number}", {**images, "cls": photo.members["cls"],
                                    "json": photo.members["json"]})  # fmt: skip


def test_the_shipped_model_learns_to_prefer_and_says_so(tmp_path: Path) -> None:
    finetune = FinetuneConfig(steps=20, batch_size=8, learning_rate=1e-3, validate_every=10)
    config = PreferenceConfig("tiny", rank=4, finetune=finetune)
    summary = train_preference(shaded_pairs(), tmp_path, config, **CPU)
    assert summary["before"]["accuracy"] == 0.5 and summary["before"]["drift"] == 0
    assert summary["kept"]["accuracy"] > 0.9
    assert summary["kept"]["loss"] < 0.6 < summary["before"]["loss"]
    assert summary["kept"]["dL_w"] < summary["kept"]["dL_l"]
    assert summary["held_out"] == 8 and summary["beta_public_scripts"] == 5000
    assert json.loads((tmp_path / "dpo.json").read_text()) == summary
    assert not (tmp_path / CHECKPOINT).exists()
    assert any("100 % of 8" in line or "88 % of 8" in line for line in outcome(summary))


@pytest.mark.parametrize(("held_out", "separation", "told"), [
    (40, 0.31, True), (40, 0.5, False), (400, 0.31, False), (1, 1.0, True), (2, 5.0, True),
    (8, 1.0, True), (8, 2.0, False)])  # fmt: skip
def test_what_chance_could_do_is_told(held_out: int, separation: float, told: bool) -> None:
    kept = {"accuracy": 0.6, "separation": separation, "dL_w": 0.0, "dL_l": 0.0}
    summary = {"stopped": None, "pairs": 8 * held_out, "held_out": held_out, "kept": kept,
               "kept_step": 60, "steps": 60, "history": [{}] * 7}  # fmt: skip
    assert any("chance" in line for line in outcome(summary)) == told
    untouched = outcome(summary | {"kept_step": 0})
    assert "nothing learned held" in untouched[-1] and "chance" not in "".join(untouched)


@pytest.mark.parametrize(("loss", "part"), [("ipo", "- 1/2)^2"), ("kto", "1 - sigmoid"), ("dpo", "log sigmoid")])  # fmt: skip
def test_beta_is_explained_for_the_loss_that_was_taken(loss: str, part: str) -> None:
    assert part in beta_convention(loss)


def shaded_samples(count: int = 160) -> Iterator[Sample]:
    """The same photographs as scored samples: bright ones are useful, dark ones are not."""
    for number, made in enumerate(shaded_pairs(count)):
        side, utility = (("win", 0.9), ("lose", 0.2))[number % 2]
        score = encode_json({"utility": utility + number / 1000})
        yield Sample(made.key, {"png": made.members[f"{side}.png"], "cls": made.members["cls"],
                                "json": made.members["json"], "utility.json": score})  # fmt: skip


def test_kto_learns_from_scored_samples_without_pairs(tmp_path: Path) -> None:
    finetune = FinetuneConfig(steps=10, batch_size=16, learning_rate=1e-3, validate_every=5)
    config = PreferenceConfig("tiny", rank=4, loss="kto", desirable="above:0.5", finetune=finetune)
    summary = train_preference(shaded_samples(), tmp_path, config, **CPU)
    assert summary["desirable_samples"] == summary["undesirable_samples"] == 80
    assert summary["held_out"] == 20 and summary["before"]["accuracy"] == 0.5
    assert summary["kept_step"] == 10 and summary["kept"]["accuracy"] > 0.6
    assert summary["kept"]["separation"] > 0.2
    assert summary["kept"]["dL_w"] < summary["kept"]["dL_l"]
    assert "desirable" in outcome(summary)[0]


def test_which_samples_kto_wants() -> None:
    utility, label = np.array([5.0, 1, 3, 4, -2, 7, 7, 9]), np.array([0, 0, 0, 0, 1, 1, 1, 2])
    assert signs(utility, label, "quantile:0.25").tolist() == [1, -1, 0, 0, -1, 1, 0, 0]
    assert signs(utility, label, "quantile:0.5").tolist() == [1, -1, -1, 1, -1, 1, 0, 0]
    assert signs(utility, label, "above:0").tolist() == [1, 1, 1, 1, -1, 1, 1, 1]
    with pytest.raises(BadInput, match="8 desirable and 0 undesirable"):
        signs(utility, label, "above:-3")
    with pytest.raises(BadInput, match="0 desirable and 0 undesirable"):
        signs(np.ones(8), label, "quantile:0.25")
    for text in ("quantile:0.6", "above:x", "best", "quantile:nan"):
        with pytest.raises(UsageError, match="above:0 is the sign"):
            PreferenceConfig("tiny", desirable=text)


def test_scored_samples_are_no_pairs(bundle: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="with --loss kto"):
        train_preference(shaded_samples(), tmp_path, PreferenceConfig(bundle), **CPU)
    mixed = chain(pairs(2), shaded_samples())
    with pytest.raises(BadInput, match="mixed"):
        train_preference(mixed, tmp_path, PreferenceConfig(bundle, loss="kto"), **CPU)


def test_training_stops_when_both_errors_rise(tmp_path: Path) -> None:
    """A rate that wrecks the model: it stops, and what it keeps is from before the wreck."""
    finetune = FinetuneConfig(steps=40, batch_size=4, learning_rate=0.3, validate_every=2)
    config = PreferenceConfig("tiny", rank=4, finetune=finetune)
    summary = train_preference(shaded_pairs(), tmp_path, config, **CPU)
    assert summary["steps"] < 40
    assert "rose" in summary["stopped"] and "stopped early" in outcome(summary)[0]
    drawing = [f["separation"] for f in summary["history"] if f["dL_w"] < 0.05]
    assert summary["kept"]["separation"] == max(drawing)
    assert summary["kept"]["dL_w"] < 0.05


@pytest.mark.parametrize("trainer", ["dpo", "lora"])
@pytest.mark.parametrize("ema", [None, 0.9])
def test_stopped_and_resumed_is_the_same_bit_for_bit(
    bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainer: str, ema: float | None
) -> None:
    train = {"dpo": run_dpo, "lora": run_lora}[trainer]
    finetune = replace(QUICK, ema=ema, warmup=3, gradient_accumulation=2)
    train(bundle, tmp_path / "whole", finetune)
    # the middle of the very first step, a step's end, the middle of the next, that of the first again
    for stop_after in (1, 2, 3, 1):
        calls = iter(range(100))
        with monkeypatch.context() as patch:
            patch.setattr(signals, "stop_requested", lambda c=calls, n=stop_after: next(c) + 1 >= n)
            with pytest.raises(Stopped):
                train(bundle, tmp_path / "parts", finetune)
        assert not (tmp_path / "parts" / LORA).exists()
        assert not (tmp_path / "parts" / f"{trainer}.json").exists()
    train(bundle, tmp_path / "parts", finetune)
    assert digest(tmp_path / "whole" / LORA) == digest(tmp_path / "parts" / LORA)
    whole, parts = (
        json.loads((tmp_path / name / f"{trainer}.json").read_text()) for name in ("whole", "parts")
    )
    assert whole | {"seconds": 0} == parts | {"seconds": 0}


def test_a_run_does_not_go_on_with_other_pairs(
    bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(signals, "stop_requested", lambda: True)
        run_dpo(bundle, tmp_path)
    config = PreferenceConfig(bundle, finetune=QUICK)
    with pytest.raises(UsageError, match="other data"):
        train_preference(pairs(20), tmp_path, config, **CPU)


def test_seeds_matter_and_the_same_seed_repeats(bundle: str, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run_dpo(bundle, tmp_path / name, replace(QUICK, seed=seed), count=12)
    a, b, c = (digest(tmp_path / name / LORA) for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("trainer", [run_dpo, run_lora])
def test_diffusers_loads_the_adapter_and_draws_what_we_draw(
    bundle: str, tmp_path: Path, trainer: Any
) -> None:
    trainer(bundle, tmp_path, **({"count": 12} if trainer is run_dpo else {}))
    pipe = StableDiffusionPipeline.from_pretrained(bundle, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    options = {"guidance_scale": 3.0, "num_inference_steps": 4, "output_type": "np"}
    prompt = [f"a photo of a {CLASSES[0]}"] * 2
    before = pipe(prompt, latents=noise.clone(), **options).images
    pipe.load_lora_weights(str(tmp_path))
    theirs = pipe(prompt, latents=noise.clone(), **options).images
    ours = draw(bundle, [tmp_path]).permute(0, 2, 3, 1).numpy()
    assert np.abs(theirs - ours).max() <= 2 / 255
    assert np.abs(theirs - before).max() > 4 / 255


def test_rounds_begin_where_the_last_one_ended(bundle: str, tmp_path: Path) -> None:
    run_dpo(bundle, tmp_path / "one", count=12, rank=3)
    still = replace(QUICK, steps=1, learning_rate=1e-12)
    base = run_dpo(bundle, tmp_path / "base", still, init=tmp_path / "one")
    assert base["rank"] == 3
    last = run_dpo(bundle, tmp_path / "last", still, init=tmp_path / "one", reference="previous")
    assert base["before"]["drift"] > 0  # away from the base, where the first round left it
    assert last["before"]["drift"] == 0 and last["before"]["accuracy"] == 0.5
    one, kept = load_file(tmp_path / "one" / LORA), load_file(tmp_path / "last" / LORA)
    assert one.keys() == kept.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(kept[key], tensor, atol=1e-6, rtol=0)


def test_a_round_from_lora_keeps_its_text_encoder(bundle: str, tmp_path: Path) -> None:
    run_lora(bundle, tmp_path / "lora")
    run_dpo(bundle, tmp_path / "dpo", count=12, init=tmp_path / "lora")
    before, after = load_file(tmp_path / "lora" / LORA), load_file(tmp_path / "dpo" / LORA)
    assert before.keys() == after.keys()
    for key in before:
        assert torch.equal(before[key], after[key]) == key.startswith("text_encoder.")


def test_a_round_from_another_tools_lora_keeps_its_strength_and_layers(
    bundle: str, tmp_path: Path
) -> None:
    """kohya's have an alpha of their own, adapt more than attention, and may differ in rank: of a
    file without alphas diffusers 0.38 takes the first rank for the alpha of all layers."""
    unet = load_model(bundle).unet
    tensors = {}
    for layer in ("attn1.to_q", "attn2.to_k", "attn2.to_out.0", "ff.net.2"):
        layer = f"down_blocks.1.attentions.0.transformer_blocks.0.{layer}"
        out, width = unet.get_submodule(layer).weight.shape
        name = f"lora_unet_{layer.replace('.', '_')}"
        rank = 1 if "ff" in layer else 2
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, width)
        tensors[f"{name}.lora_up.weight"] = torch.randn(out, rank)
        tensors[f"{name}.alpha"] = torch.tensor(0.5)
    save_file(tensors, tmp_path / "kohya.safetensors")
    still = replace(QUICK, steps=1, learning_rate=1e-12)
    run_dpo(bundle, tmp_path / "dpo", still, count=12, init=tmp_path / "kohya.safetensors")
    before, after = (draw(bundle, [tmp_path / name]) for name in ("kohya.safetensors", "dpo"))
    assert (before - draw(bundle, [])).abs().max() > 4 / 255
    torch.testing.assert_close(after, before, atol=1e-4, rtol=0)
    learnt = load_file(tmp_path / "dpo" / LORA)
    assert {x.shape[".lora_B." in key] for key, x in learnt.items()} == {2}


def test_full_tuning_writes_a_pipeline(bundle: str, tmp_path: Path) -> None:
    summary = run_dpo(bundle, tmp_path / "full", count=12, full=True)
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "full", safety_checker=None)
    tuned = load_model(str(tmp_path / "full"))
    assert tuned.classes == CLASSES and pipe.unet.config.sample_size == 8
    assert summary["trained_parameters"] == sum(p.numel() for p in tuned.unet.parameters())
    moved = draw(bundle, [tmp_path / "full"])
    torch.testing.assert_close(draw(str(tmp_path / "full"), []), moved)
    assert (draw(bundle, []) - moved).abs().max() > 4 / 255
    run_dpo(bundle, tmp_path / "second", full=True, init=tmp_path / "full")
    with pytest.raises(UsageError, match="Add --full"):
        run_dpo(bundle, tmp_path / "mixed", init=tmp_path / "full")


def test_rounds_of_full_tuning_lose_nothing_to_half_precision(bundle: str, tmp_path: Path) -> None:
    """Neither the base's weights nor what a round moved them by is rounded to bf16 on the way."""
    half = {"device": torch.device("cpu"), "dtype": torch.bfloat16}
    still = replace(QUICK, steps=1, learning_rate=1e-12)
    for name, finetune, init in (("one", QUICK, None), ("two", still, tmp_path / "one")):
        config = PreferenceConfig(bundle, init=init, full=True, finetune=finetune, beta=10.0,
                                  reference="base" if init is None else "previous")  # fmt: skip
        train_preference(pairs(12), tmp_path / name, config, **half)  # type: ignore[arg-type]
    base, one, two = (load_model(str(m)) for m in (bundle, tmp_path / "one", tmp_path / "two"))
    moved = [
        torch.equal(a, b)
        for a, b in zip(base.unet.parameters(), one.unet.parameters(), strict=True)
    ]
    assert not any(moved)
    for a, b in zip(one.unet.parameters(), two.unet.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    for a, b in zip(base.vae.parameters(), two.vae.parameters(), strict=True):
        assert torch.equal(a, b)
    drawn = GenerateConfig(bundle, adapters=(tmp_path / "one",))
    assert ["whole U-Net" in line for line in warnings_of(drawn, torch.bfloat16)] == [True]
    assert warnings_of(drawn, torch.float16) == []


def test_gradient_checkpointing_changes_nothing_but_memory(bundle: str, tmp_path: Path) -> None:
    run_dpo(bundle, tmp_path / "plain", count=12)
    run_dpo(bundle, tmp_path / "saving", count=12, gradient_checkpointing=True)
    plain, saving = (load_file(tmp_path / name / LORA) for name in ("plain", "saving"))
    for key, tensor in plain.items():
        torch.testing.assert_close(saving[key], tensor, atol=1e-6, rtol=1e-5)


def figures(*triples: tuple[float, float, float]) -> list[dict[str, float]]:
    return [{"separation": s, "dL_w": w, "dL_l": lo} for s, w, lo in triples]


def test_the_margin_of_one_pair_is_its_own_measure() -> None:
    """It has no spread; what it was divided by then made 30 millions of it."""
    objective: Any = object.__new__(PreferenceObjective)
    objective.beta, objective.held_out = 1.0, torch.arange(2)
    objective._losses = lambda *_: torch.zeros(2)
    objective._sides = lambda dL, rows: (dL[..., :1], dL[..., 1:])
    objective._margins = lambda dL_w, dL_l: dL_l - dL_w
    seen = objective._figures(torch.tensor([[-0.2, 0.1]]), torch.ones(2), torch.zeros(2))
    assert seen["separation"] == pytest.approx(1.0) and seen["accuracy"] == 1.0
    level = objective._figures(torch.zeros(1, 2), torch.ones(2), torch.zeros(2))
    assert level["separation"] == 0.0


def test_what_counts_as_degrading() -> None:
    objective = object.__new__(PreferenceObjective)
    start, good = (0.0, 0.0, 0.0), (0.5, -0.01, 0.02)
    worse, better = (0.3, 0.02, 0.03), (0.8, 0.02, 0.03)
    assert objective.degrading(figures(start, good, worse, worse, worse))
    assert not objective.degrading(figures(start, good, worse, worse))
    assert not objective.degrading(figures(start, good, worse, good, worse))
    assert not objective.degrading(figures(start, good, worse, worse, better))
    ruined = (2.0, 0.2, 0.9)
    assert objective.degrading(figures(start, good, ruined, ruined, ruined))
    noise = (0.3, 0.001, 0.002)
    assert not objective.degrading(figures(start, good, noise, noise, noise))
    assert not objective.degrading([])


def test_class_tokens_take_the_place_of_prompts(bundle: str, tmp_path: Path) -> None:
    embeds = torch.randn(3, 1, 16, generator=torch.Generator().manual_seed(0))
    save_tokens(tmp_path / "tokens", CLASSES, embeds, {"model": bundle})
    summary = run_dpo(bundle, tmp_path / "dpo", tokens=tmp_path / "tokens")
    assert summary["prompts"] == [f"a photo of a <utilgen-{c:04d}>" for c in range(3)]


def test_tokens_of_other_classes_are_refused(bundle: str, tmp_path: Path) -> None:
    embeds = torch.zeros(3, 1, 16)
    save_tokens(tmp_path / "tokens", ["cat", *CLASSES[1:]], embeds, {"model": bundle})
    line = "class 0 is 'dress', and the token there is of 'cat'"
    with pytest.raises(BadInput, match=line):
        run_dpo(bundle, tmp_path / "dpo", tokens=tmp_path / "tokens")
    with pytest.raises(BadInput, match=line):
        run_lora(bundle, tmp_path / "lora", tokens=tmp_path / "tokens")


def test_a_class_token_in_a_prompt_needs_its_tokens(bundle: str, tmp_path: Path) -> None:
    facts = encode_json({"class_name": "dress", "prompt": "a photo of a <utilgen-0000>"})
    samples = [replace(made, members={**made.members, "json": facts}) for made in pairs(2)]
    with pytest.raises(BadInput, match="token <utilgen-0000>, and no tokens are given"):
        train_preference(samples, tmp_path, PreferenceConfig(bundle, finetune=QUICK), **CPU)


def test_public_pair_sets_train_as_they_are(bundle: str, tmp_path: Path) -> None:
    """The Pick-a-Pic columns; label_0 says which image is preferred."""

    def columns(flip: bool) -> Iterator[Sample]:
        for sample_ in pairs(8):
            first, second = sample_.members["win.png"], sample_.members["lose.png"]
            if flip:
                first, second = second, first
            label = b"0" if flip else b"1"
            yield Sample(sample_.key, {"jpg_0": first, "jpg_1": second, "label_0": label,
                                       "caption": b"a dress"})  # fmt: skip

    config = PreferenceConfig(bundle, finetune=replace(QUICK, steps=2))
    for flip in (False, True):
        train_preference(columns(flip), tmp_path / str(flip), config, **CPU)
    assert digest(tmp_path / "False" / LORA) == digest(tmp_path / "True" / LORA)


def test_a_pair_that_cannot_be_learned_from_is_left_out() -> None:
    good, no_label, half, other = pairs(4)
    del no_label.members["cls"]
    del half.members["lose.png"]
    columns = {"jpg_0": good.members["win.png"], "jpg_1": good.members["lose.png"]}
    other.members = {**columns, "label_0": b"1", "caption": b"\xff"}
    aside = Quarantine(True, (check_judged,))
    assert list(aside.screen([good, no_label, half, other])) == [good]
    assert aside.reasons == {"unreadable": 2, "half a pair": 1}
    single = next(shots())
    with pytest.raises(BadInput, match="utilgen pairs"):
        list(aside.screen([single]))


def test_what_lacks_a_picture_is_left_out_in_every_layout() -> None:
    text, first, second = pairs(3)
    text.members["win.txt"] = text.members.pop("win.png")
    first.members = {"jpg_0": picture(0, 256), "label_0": b"1"}
    second.members = {"jpg_1": picture(0, 256), "label_0": b"1"}
    scored = next(shots())
    scored.members = {"utility.json": encode_json({"utility": 0.5}), "cls": b"0"}
    aside = Quarantine(True, (check_judged,))
    assert not list(aside.screen([text, first, second, scored]))
    assert aside.reasons == {"no image": 2, "half a pair": 2}


def test_no_pairs_and_no_pair(bundle: str, tmp_path: Path) -> None:
    config = PreferenceConfig(bundle, finetune=QUICK)
    with pytest.raises(BadInput, match="none"):
        train_preference([], tmp_path, config, **CPU)
    with pytest.raises(BadInput, match="utilgen pairs"):
        train_preference(shots(), tmp_path, config, **CPU)
    assert not (tmp_path / "dpo.json").exists()


def test_one_adapter_a_class(bundle: str, tmp_path: Path) -> None:
    summary = run_lora(bundle, tmp_path, per="class")
    assert summary["adapters"] == ["0000-dress", "0001-bag", "0002-ankle-boot"]
    prints = {digest(tmp_path / name / LORA) for name in summary["adapters"]}
    assert len(prints) == 3


def test_every_class_is_drawn_with_its_own_adapter(bundle: str, tmp_path: Path) -> None:
    """In a mixed batch, and as diffusers draws with that class's file alone."""
    run_lora(bundle, tmp_path / "lora", replace(QUICK, learning_rate=5e-2), per="class")
    config = GenerateConfig(bundle, adapters=(tmp_path / "lora",), steps=4, guidance_scale=3.0)
    items = [(2, 0), (0, 1), (1, 0), (0, 0)]
    mixed = dict(zip(items, pixels(config, items), strict=True))
    plain = dict(zip(items, pixels(replace(config, adapters=()), items), strict=True))
    for c, name in enumerate(CLASSES):
        pipe = StableDiffusionPipeline.from_pretrained(bundle, safety_checker=None)
        pipe.set_progress_bar_config(disable=True)
        pipe.load_lora_weights(str(tmp_path / "lora" / class_folder(c, name)))
        noise = initial_noise(load_model(bundle), config.seed, [(c, 0)])
        theirs = pipe(
            f"a photo of a {name}", latents=noise, guidance_scale=3.0, num_inference_steps=4,
            output_type="np",
        ).images[0]  # fmt: skip
        assert np.abs(mixed[c, 0] / 255 - theirs).max() <= 2 / 255
        assert np.abs(mixed[c, 0].astype(float) - plain[c, 0]).max() > 8
    assert (pixels(config, items[1:2])[0] == mixed[0, 1]).all(), "neighbours do not matter"
    with pytest.raises(UsageError, match="one adapter a class"):
        PreferenceConfig(bundle, init=tmp_path / "lora")
    config = replace(config, classes=(*CLASSES, "hat"))
    with pytest.raises(BadInput, match="no adapter for hat"):
        pixels(config, items)
    config = replace(config, classes=("bag", "dress", "ankle boot"))
    with pytest.raises(BadInput, match="has 0000-dress where class 0 is 'bag'"):
        pixels(config, items)


def pixels(config: GenerateConfig, items: list[tuple[int, int]]) -> list[np.ndarray]:
    return [decode_rgb(s) for s in Generator(config, **CPU).draw(items)]


def test_lora_lowers_the_denoising_error_of_its_shots(bundle: str, tmp_path: Path) -> None:
    from utilgen_cli.diffusion.datadream import DenoisingObjective, read_shots
    from utilgen_cli.diffusion.finetune import finetune
    from utilgen_cli.diffusion.lora import TEXT_TARGETS, UNET_TARGETS, add_lora

    model = load_model(bundle)
    data = read_shots(shots(), model, lambda s: s.facts["class_name"])
    add_lora(model.unet, 4, UNET_TARGETS)
    add_lora(model.text_encoder, 4, TEXT_TARGETS)
    objective = DenoisingObjective(model, data)
    rows, noise = torch.arange(6).repeat(8), objective.draw(48, torch.Generator().manual_seed(0))
    before = float(objective.loss(rows, noise)[0].detach())
    finetune(objective, replace(QUICK, steps=30))
    assert float(objective.loss(rows, noise)[0].detach()) < 0.98 * before
