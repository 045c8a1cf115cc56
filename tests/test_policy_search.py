"""Prompt optimisation on a random bundle: it climbs, resumes, replays and refuses."""

from __future__ import annotations

import json
import re
from itertools import count
from pathlib import Path

import pytest
import torch

from tests.random_bundle import CLASSES, make_bundle
from utilgen_cli.diffusion.ddim import initial_noise
from utilgen_cli.diffusion.image_gradients import Term
from utilgen_cli.diffusion.instance import InstanceConfig
from utilgen_cli.diffusion.load import LatentDiffusion, class_prompts, load_model
from utilgen_cli.diffusion.noise import NoiseConfig
from utilgen_cli.diffusion.policy import Policy, load_policy
from utilgen_cli.diffusion.prompt_search import PromptSearch, SearchConfig
from utilgen_cli.diffusion.prompts import PromptEmbeds, TokenEmbeds, replaced_embeddings
from utilgen_cli.diffusion.rollout import Rollout
from utilgen_cli.runtime import signals
from utilgen_cli.runtime.errors import BadInput, NoInput, Stopped, UtilgenError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LatentDiffusion:
    return load_model(str(make_bundle(tmp_path_factory.mktemp("bundle") / "random")))


def brightness(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return images.mean((1, 2, 3))


def never_right(images: torch.Tensor) -> torch.Tensor:
    return torch.full((len(images),), -1)


def search_of(
    model: LatentDiffusion, parameters: str = "embeds", **changes: object
) -> PromptSearch:
    texts = class_prompts(model, None)
    settings = {
        "iterations": 6,
        "evaluate_every": 2,
        "validation_images": 4,
        "rate": 0.1,
        **changes,
    }
    prompts = (
        PromptEmbeds(model, texts, 2, 0)
        if parameters == "embeds"
        else TokenEmbeds(model, texts, 2, 0, model.template)
    )
    rollout = Rollout(model, model.encode_prompts([""]), 2, 3.0)
    terms = [Term("brightness", 1.0, brightness)]
    config = SearchConfig(**settings)  # type: ignore[arg-type]
    return PromptSearch(prompts, rollout, terms, {"no one": never_right}, config)


@pytest.mark.parametrize("parameters", ["embeds", "tokens"])
def test_the_score_rises_on_noise_that_was_not_optimised_on(
    model: LatentDiffusion, parameters: str
) -> None:
    search = search_of(model, parameters)
    embeds = search.run()
    history = search.state.history
    assert embeds.shape == (3, 2, 40, 16)
    assert history[search.best_row()]["brightness"] > history[0]["brightness"]
    assert [row["iteration"] for row in history] == [0, 2, 4, 6]


def test_tokens_move_only_the_class_name(model: LatentDiffusion) -> None:
    """Unoptimised they give the class prompt's embedding; optimised, the other tokens stay."""
    search = search_of(model, "tokens")
    prompts = search.prompts
    assert isinstance(prompts, TokenEmbeds)
    texts, first = class_prompts(model, None), torch.zeros(3, dtype=torch.long)
    torch.testing.assert_close(prompts(torch.arange(3), first), model.encode_prompts(texts))
    rows = zip(prompts.ids, prompts.mask[..., 0], strict=True)
    assert [model.tokenizer.decode(ids[mask]).replace(" ", "") for ids, mask in rows] == [
        name.replace(" ", "") for name in CLASSES
    ]
    search.run()
    moved = (search.theta.detach() - prompts.start[:, None]).abs().sum(-1) > 0  # [C, M, L]
    assert moved[:, 0].equal(prompts.mask[..., 0])


def test_a_hook_sees_what_the_encoder_reads(model: LatentDiffusion) -> None:
    """The embeddings that are put in are those that the text encoder's own lookup would give."""
    ids = model.token_ids(["a bag", "a dress"])
    table = model.text_encoder.get_input_embeddings().weight
    with replaced_embeddings(model.text_encoder, table[ids.flip(0)]):
        got = model.text_encoder(ids).last_hidden_state
    torch.testing.assert_close(got, model.text_encoder(ids.flip(0)).last_hidden_state)


def test_the_best_iterate_is_kept_not_the_last(model: LatentDiffusion) -> None:
    """With an absurd step size the score jumps about; what comes back is the best judged one."""
    search = search_of(model, rate=20.0, iterations=5, evaluate_every=1)
    embeds = search.run()
    scores = [row["objective"] for row in search.state.history]
    again = search_of(model, iterations=0)
    with torch.no_grad():
        again.theta.copy_(embeds)
    again.evaluate()
    assert again.state.history[0]["brightness"] == pytest.approx(
        search.state.history[scores.index(max(scores))]["brightness"], abs=1e-5
    )


def test_iterates_are_chosen_by_the_judge_that_was_not_climbed(model: LatentDiffusion) -> None:
    """One that dislikes what is climbed keeps the start, and both figures are told."""

    def darkness(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return -images.mean((1, 2, 3))

    search = search_of(model)
    search.terms = [Term("brightness", 1.0, brightness, judge=darkness)]
    search.run()
    first, *_, last = search.state.history
    assert search.state.best == 0
    assert last["brightness_climbed"] > first["brightness_climbed"]
    assert last["brightness"] == pytest.approx(-last["brightness_climbed"])
    assert last["objective"] < first["objective"]


def test_it_stops_early_when_nothing_improves(model: LatentDiffusion) -> None:
    search = search_of(model, rate=0.0, iterations=50, evaluate_every=1, patience=3)
    search.evaluate = _falling(search)  # type: ignore[method-assign]
    search.run()
    assert search.state.iteration == 3


def _falling(search: PromptSearch):  # type: ignore[no-untyped-def]
    def evaluate() -> None:
        row = {"iteration": search.state.iteration, "objective": -float(search.state.iteration)}
        search.state.history.append(row)

    return evaluate


@pytest.fixture(scope="module")
def undisturbed(model: LatentDiffusion) -> tuple[PromptSearch, torch.Tensor, int]:
    """A search that was never stopped, its prompts, and how often it asked if it should."""
    search, asked = search_of(model, chunk=3), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signals, "stop_requested", lambda: bool(asked.append(1)))
        return search, search.run(), len(asked)


@pytest.mark.parametrize("moment", range(0, 8, 2))
def test_a_stopped_run_ends_with_the_same_prompts(
    model: LatentDiffusion, undisturbed: tuple[PromptSearch, torch.Tensor, int], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, moment: int,
) -> None:  # fmt: skip
    """Stopped at a signal, in the midst of an iteration or a look as well, and run again: bit for
    bit what one run gives, and as many calls of the U-Net told."""
    checkpoint, (first, whole, times) = tmp_path / "checkpoint.safetensors", undisturbed
    assert times > 5 * (first.state.iteration + 1)  # of which one is between two iterations

    def check() -> None:
        raise Stopped("TERM", "stopped with its state saved")

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        ask = count()
        patch.setattr(signals, "stop_requested", lambda: next(ask) == moment * times // 8)
        patch.setattr(signals, "check", check)
        stopped = search_of(model, chunk=3)
        stopped.run(checkpoint)
    second = search_of(model, chunk=3)
    second.resume(checkpoint)
    assert second.state == stopped.state
    assert second.state.iteration >= moment * first.state.iteration // 8 - 1
    torch.testing.assert_close(second.run(checkpoint), whole, rtol=0, atol=0)
    assert second.state == first.state and vars(second.calls) == vars(first.calls)


def test_a_run_goes_on_with_another_chunk(model: LatentDiffusion, tmp_path: Path) -> None:
    """Memory that ran out says to lower it: what was learnt so far is then still of use."""
    checkpoint = tmp_path / "checkpoint.safetensors"
    whole = search_of(model, chunk=100).run(checkpoint)
    search = search_of(model, chunk=1)
    search.resume(checkpoint)
    assert search.state.iteration == 6
    torch.testing.assert_close(search_of(model, chunk=1).run(), whole, rtol=0, atol=1e-4)
    assert InstanceConfig(search=SearchConfig(chunk=1)).facts() == InstanceConfig().facts()


def test_figures_of_another_judge_are_not_gone_on_from(
    model: LatentDiffusion, tmp_path: Path
) -> None:
    search_of(model, iterations=2).run(tmp_path / "checkpoint")
    assert (tmp_path / "checkpoint").exists()
    again = search_of(model, iterations=2)
    again.terms = [Term("brightness", 1.0, brightness, judge=brightness)]
    again.resume(tmp_path / "checkpoint")
    assert again.state.iteration == 0
    same = search_of(model, iterations=2)
    same.resume(tmp_path / "checkpoint")
    assert same.state.iteration == 2


def test_a_checkpoint_of_other_settings_is_not_used(model: LatentDiffusion, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint.safetensors"
    search_of(model).run(checkpoint)
    other = search_of(model, rate=0.05)
    other.resume(checkpoint)
    assert other.state.iteration == 0


def test_alignment_collapse_ends_the_run(model: LatentDiffusion) -> None:
    """Images that walk out of their class stop the search with a line that says so."""
    search = search_of(model, max_fidelity_drop=0.3)
    looks = []

    def labeller(images: torch.Tensor) -> torch.Tensor:
        looks.append(1)
        classes, _ = search.grid(2)
        return classes if len(looks) == 1 else (classes + 1) % 3

    search.labellers = {"clip": labeller}
    line = "alignment collapse: label fidelity by clip fell from 1.00 to 0.00"
    with pytest.raises(UtilgenError, match=re.escape(line)):
        search.run()


@pytest.mark.parametrize("parameters", ["embeds", "tokens"])
def test_a_small_chunk_shows_its_classifiers_few_images_and_changes_rounding_alone(
    model: LatentDiffusion, parameters: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the drawn images nor the graphs of those who judge them grow with the classes."""
    monkeypatch.setattr("utilgen_cli.diffusion.prompt_search.PROMPTS", 2)
    found = []
    for chunk in (320, 2):
        search, seen = search_of(model, parameters, iterations=2, chunk=chunk), []

        def bright(images: torch.Tensor, labels: torch.Tensor, seen: list[int] = seen):  # type: ignore[no-untyped-def]
            seen.append(len(images))
            return brightness(images, labels)

        search.terms = [Term("brightness", 1.0, bright)]
        found.append((search.run(), search.state.history))
        of_a_class = 4  # 2 members, 2 images each, to judge; 2 in a step
        assert max(seen) == (3 * of_a_class if chunk == 320 else of_a_class)
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-3, atol=1e-4)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_a_flat_objective_is_refused(model: LatentDiffusion) -> None:
    search = search_of(model)
    search.terms = [Term("utility", 1.0, lambda x, y: 0 * x.sum((1, 2, 3)))]
    with pytest.raises(UtilgenError, match="no usable gradient"):
        search.run()


def test_a_term_without_a_finite_gradient_is_named(model: LatentDiffusion) -> None:
    search = search_of(model)
    bright = Term("utility", 1.0, lambda x, y: x.mean((1, 2, 3)))
    search.terms = [bright, Term("clip", 1.0, lambda x, y: float("nan") * x.sum((1, 2, 3)))]
    with pytest.raises(UtilgenError, match=r"term clip: has no usable gradient"):
        search.run()


def make_policy(noise: str = "single") -> Policy:
    g = torch.Generator().manual_seed(0)
    return Policy(
        torch.randn(3, 2, 40, 16, generator=g), CLASSES, ["a", "b", "c"], NoiseConfig(noise, 5.0, 1.0),
        {"rate": 0.1}, [{"iteration": 0}], {"seconds": 1.0},
    )  # fmt: skip


def test_a_policy_comes_back_as_it_was_saved(tmp_path: Path, model: LatentDiffusion) -> None:
    policy = make_policy()
    policy.save(tmp_path)
    again = load_policy(tmp_path)
    assert again.prompt_embeds.equal(policy.prompt_embeds)
    assert (again.classes, again.noise, again.settings) == (CLASSES, policy.noise, policy.settings)
    assert json.loads((tmp_path / "policy.json").read_text())["population"] == 2
    again.check(model, CLASSES)


def test_images_take_the_members_of_their_class_in_turn() -> None:
    policy = make_policy()
    items = [(0, 0), (2, 1), (1, 2), (2, 3)]
    expected = [policy.prompt_embeds[c, i % 2] for c, i in items]
    assert policy.embeds(items).equal(torch.stack(expected))


def test_the_start_is_the_class_prompt_and_its_images(model: LatentDiffusion) -> None:
    """An unoptimised policy without noise optimisation draws what `generate` draws (member 0)."""
    from utilgen_cli.diffusion.ddim import sample

    search = search_of(model, iterations=0)
    policy = Policy(search.run(), CLASSES, class_prompts(model, None))
    items = [(0, 0), (1, 0), (2, 2)]
    noise, uncond = initial_noise(model, 7, items), model.encode_prompts([""])
    ours, figures = policy.sample(model, noise, items, uncond, 4, 3.0)
    plain = sample(model, noise, model.encode_prompts(class_prompts(model, None)), uncond, 4, 3.0)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
    assert figures["moved"] == 0


def test_wrong_policies_are_refused(tmp_path: Path, model: LatentDiffusion) -> None:
    with pytest.raises(NoInput, match="--save-policy"):
        load_policy(tmp_path)
    make_policy().save(tmp_path)
    with pytest.raises(BadInput, match="other classes"):
        load_policy(tmp_path).check(model, ["x", "y", "z"])
    wide = make_policy()
    wide.prompt_embeds = torch.zeros(3, 2, 40, 768)
    with pytest.raises(BadInput, match="width 768"):
        wide.check(model, CLASSES)
    (tmp_path / "policy.safetensors").write_bytes(b"no")
    with pytest.raises(BadInput, match="not a policy"):
        load_policy(tmp_path)


def test_the_scale_that_fp16_needs_changes_no_bit_in_single_precision(
    model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = search_of(model, iterations=2).run()
    monkeypatch.setattr("utilgen_cli.diffusion.prompt_search.unit_scale", lambda x: 1)
    assert torch.equal(search_of(model, iterations=2).run(), found)
