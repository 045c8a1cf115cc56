"""`train_values`: held-out judgements, artefacts that are readable elsewhere, resumption, canary."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tests.conftest import ROOT, make_sample
from tests.largest import Largest
from tests.valuation_toys import CLASSES, as_samples, colours, write_shards
from utilgen_cli.classification import data as data_module
from utilgen_cli.classification.data import AT_ONCE, load_images
from utilgen_cli.diffusion.bundle import find_model
from utilgen_cli.runtime import signals
from utilgen_cli.runtime.errors import BadInput, NoInput, Stopped, UsageError, UtilgenError
from utilgen_cli.shards.operands import open_source
from utilgen_cli.shards.writer import write_shard
from utilgen_cli.valuation import todv, training, value_model
from utilgen_cli.valuation.canary import auroc, verdict, wrong_labels
from utilgen_cli.valuation.inputs import load_value_data, native_size
from utilgen_cli.valuation.pool import (
    PLANTED,
    REAL,
    VALIDATION,
    assign_folds,
    make_pool,
    pixel_hash,
)
from utilgen_cli.valuation.score import Scorer
from utilgen_cli.valuation.todv import Trajectory, ValueConfig, losses_of
from utilgen_cli.valuation.training import ValueData, train_values
from utilgen_cli.valuation.value_model import load_value

CLIP = ROOT / "utilgen_cli" / "tiny" / "open_clip"
CONFIG = ValueConfig(steps=40, batch_size=12, folds=2, snapshots=2, refresh=5, augment="none")
DATA = ValueData(colours(8, 1), colours(12, 2), colours(4, 3))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("value")
    train_values(DATA, CONFIG, directory, seed=0)
    return directory


def test_a_separable_task_passes_its_canary_and_weighs_low_losses_more(trained):
    facts = json.loads((trained / "value.json").read_text())
    assert facts["canary"]["auroc"] > 0.95
    assert facts["canary"]["verdict"] == "ok"
    curve = facts["weight_curve"]
    assert curve["weight"][0] > curve["weight"][-1]
    assert facts["loss_range"] == [curve["loss"][0], curve["loss"][-1]]


def test_the_artefact_is_readable_without_utilgen(trained):
    facts = json.loads((trained / "value.json").read_text())
    assert facts["classes"] == CLASSES
    assert len(facts["snapshots"]) == 2
    for snapshot in facts["snapshots"]:
        w = load_file(trained / snapshot["weight_net"])
        assert w["hidden.weight"].shape == (100, 1)
        for name in snapshot["classifiers"]:
            assert load_file(trained / name)["head.weight"].shape[0] == 3


def test_a_stopped_run_ends_in_the_same_bytes(trained, tmp_path, monkeypatch):
    looks = iter([False] * 17)
    monkeypatch.setattr(signals, "stop_requested", lambda: next(looks, True))
    monkeypatch.setattr(signals, "_received", [15])
    with pytest.raises(Stopped):
        train_values(DATA, CONFIG, tmp_path, seed=0)
    assert not (tmp_path / "value.json").exists()
    monkeypatch.undo()
    train_values(DATA, CONFIG, tmp_path, seed=0)
    files = sorted(p.relative_to(trained) for p in trained.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    for name in files:
        assert (trained / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_both_meta_gradients_train_the_same_weight_network(trained, tmp_path):
    config = replace(CONFIG, meta_gradient="exact-double")
    train_values(DATA, config, tmp_path, seed=0)
    name = "snapshot-1/weight_net.safetensors"
    one, two = load_file(trained / name), load_file(tmp_path / name)
    start = load_file(trained / "snapshot-0/weight_net.safetensors")
    assert (one["out.weight"] - start["out.weight"]).abs().max() > 1e-3
    torch.testing.assert_close(one["out.weight"], two["out.weight"], rtol=1e-3, atol=1e-4)


def test_one_fold_is_the_method_as_published(tmp_path):
    value = train_values(DATA, replace(CONFIG, folds=1), tmp_path, seed=0)
    assert value.folds == 1
    assert value.held_out_folds(DATA.real.images).eq(-1).all()


def test_no_classifier_trains_on_what_it_judges():
    pool, known = make_pool(
        DATA.real, DATA.synthetic, DATA.validation, folds=3, canaries=0.2, seed=0
    )
    hashes = pixel_hash(pool.images)
    for fold in range(3):
        real, other = pool.trained_on(fold)
        seen = {hashes[i] for i in torch.cat([real, other]).tolist()}
        judged = {h for h, f in known.items() if f == fold}
        validated = {hashes[i] for i in pool.validated_on(fold).tolist()}
        assert judged and not seen & judged
        assert validated <= judged


def test_canaries_are_real_pixels_with_another_label():
    pool, _ = make_pool(DATA.real, DATA.synthetic, None, folds=2, canaries=0.2, seed=0)
    hashes = pixel_hash(pool.images)
    truth = {hashes[i]: int(pool.labels[i]) for i in range(len(pool)) if pool.roles[i] == REAL}
    planted = torch.nonzero(pool.roles == PLANTED)[:, 0].tolist()
    assert len(planted) == 12
    assert all(truth[hashes[i]] != int(pool.labels[i]) for i in planted)


@pytest.mark.parametrize(("images", "classes", "each"), [
    (4, 10, 9), (300, 10, 3), (1000, 10, 1), (5, 2, 1), (5, 1, 0), (0, 3, 0)])  # fmt: skip
def test_images_are_judged_under_as_many_wrong_labels_as_say_enough(images, classes, each):
    labels = torch.arange(images) % classes
    at, wrong = wrong_labels(labels, classes, seed=0)
    assert torch.equal(at, torch.arange(images).repeat_interleave(each))
    assert (wrong != labels[at]).all() and ((wrong >= 0) & (wrong < classes)).all()
    assert len({(int(a), int(w)) for a, w in zip(at, wrong, strict=True)}) == images * each


def test_of_many_images_some_are_judged_under_a_wrong_label():
    labels = torch.arange(5000) % 1000
    at, wrong = wrong_labels(labels, 1000, seed=0)
    assert len(at) == len(wrong) == len(at.unique()) == 1000
    assert (wrong != labels[at]).all() and len(labels[at].unique()) > 500


def test_the_canary_of_a_few_images_rests_on_all_their_wrong_labels(trained):
    """One planted copy would be right or wrong; every image has two wrong labels here."""
    canary = json.loads((trained / "value.json").read_text())["canary"]
    assert 0.9 < canary["auroc_of_minus_loss"] <= 1
    assert canary["judged"] == 2 * (len(DATA.real) + len(DATA.validation or ())) > canary["planted"]


@pytest.mark.parametrize("classes", [3, 1])  # with one class nothing is planted
def test_a_pool_in_a_mapped_file_equals_that_in_memory(classes, monkeypatch):
    data = [colours(n, seed, classes) for n, seed in ((90, 1), (120, 2), (30, 3))]
    plain, known = make_pool(*data, folds=2, canaries=0.4, seed=0)
    monkeypatch.setattr(data_module, "IN_MEMORY", 1)
    with Largest() as largest:
        mapped, same = make_pool(*data, folds=2, canaries=0.4, seed=0)
    assert same == known
    for name in ("images", "labels", "roles", "folds"):
        assert torch.equal(getattr(plain, name), getattr(mapped, name)), name
    assert largest.of[torch.uint8] <= AT_ONCE * plain.images[0].numel() < plain.images.numel()


def test_a_pool_is_looked_at_a_batch_at_a_time(trained, monkeypatch):
    pool, _ = make_pool(DATA.real, None, None, folds=2, canaries=0.2, seed=0)
    value, at = load_value(trained), torch.arange(len(pool)).flip(0)
    judge = value.classifiers[0]
    features = training.features_of(judge, pool.images, at)
    judged = training.judged_at(value, pool.images, at, pool.labels[at])
    monkeypatch.setattr(training, "BATCH", 4)
    with Largest() as largest:
        torch.testing.assert_close(training.features_of(judge, pool.images, at), features)
        again = training.judged_at(value, pool.images, at, pool.labels[at])
        torch.testing.assert_close(again, judged)
    assert largest.of[torch.uint8] <= 4 * pool.images[0].numel()


def test_with_one_fold_validation_images_never_train():
    pool, _ = make_pool(DATA.real, None, DATA.validation, folds=1, canaries=0.1, seed=0)
    real, other = pool.trained_on(0)
    assert not (pool.roles[torch.cat([real, other])] == VALIDATION).any()
    assert (pool.roles[pool.validated_on(0)] == VALIDATION).all()


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40)), min_size=1), st.integers(2, 5))
@settings(max_examples=60, deadline=None)
def test_folds_are_even_in_every_class_and_shared_by_duplicates(pairs, folds):
    """Hash -> label is a function here, as it is for pixels with one label."""
    pairs = [(label, 4 * h + label) for label, h in pairs]
    labels, hashes = torch.tensor([p[0] for p in pairs]), [p[1] for p in pairs]
    found = assign_folds(labels, hashes, folds, {})
    of = {}
    for h, f in zip(hashes, found.tolist(), strict=True):
        assert of.setdefault(h, f) == f
    for label in set(labels.tolist()):
        counts = [0] * folds
        for h in {h for h, y in zip(hashes, labels.tolist(), strict=True) if y == label}:
            counts[of[h]] += 1
        assert max(counts) - min(counts) <= 1


def test_known_images_are_judged_by_their_own_fold_alone(trained):
    value = load_value(trained)
    images, labels = DATA.real.images[:6], DATA.real.labels[:6]
    folds = value.held_out_folds(images)
    assert set(folds.tolist()) == {0, 1}
    found = value.judge_pixels(images, labels).loss
    for k in (0, 1):
        alone = value.only([k]).judge(images[folds == k] / 255, labels[folds == k]).loss
        torch.testing.assert_close(found[folds == k], alone)


def test_new_images_are_judged_by_all(trained):
    value = load_value(trained)
    new = colours(2, 9)
    losses = [value.only([k]).judge(new.images / 255, new.labels).loss for k in (0, 1)]
    torch.testing.assert_close(
        value.judge_pixels(new.images, new.labels).loss, torch.stack(losses).mean(0)
    )


def test_utility_has_the_gradient_of_its_differences(trained):
    value = load_value(trained).double()
    x = torch.rand(2, 3, SIZE := 16, SIZE, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 2])
    for name in ("logit", "utility", "loss"):

        def score(images: torch.Tensor, name: str = name) -> torch.Tensor:
            return getattr(value.judge(images, labels), name)

        (gradient,) = torch.autograd.grad(score(x).sum(), x)
        direction = torch.sign(gradient)
        step = 1e-6 * direction
        with torch.no_grad():
            slope = (score(x + step) - score(x - step)).sum() / 2e-6
        torch.testing.assert_close(slope, (gradient * direction).sum(), rtol=1e-3, atol=1e-9)
        assert slope > 0


def test_for_a_gradient_the_graph_of_one_member_is_held(trained, monkeypatch):
    value, data = load_value(trained), colours(4, 4)
    images = (data.images / 255).requires_grad_()

    def kept_and_gradient() -> tuple[int, torch.Tensor]:
        kept: dict[int, int] = {}

        def keep(x: torch.Tensor) -> torch.Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            logit = value.judge(images, data.labels).logit
        return sum(kept.values()), torch.autograd.grad(logit.sum(), images)[0]

    few, gradient = kept_and_gradient()
    monkeypatch.setattr(value_model, "_features", lambda classifier, x: classifier.features(x))
    many, same = kept_and_gradient()
    assert 4 * few < many and torch.equal(gradient, same)


def test_a_tower_that_is_never_trained_is_kept_once_and_asked_once(tmp_path, monkeypatch):
    clip = f"open_clip:{find_model('tiny') / 'open_clip'}"
    config = replace(CONFIG, arch=clip, steps=4, refresh=2)
    train_values(DATA, config, tmp_path)
    files = sorted(tmp_path.glob("snapshot-*/classifier-*.safetensors"))
    has_tower = [any(n.startswith("tower.") for n in load_file(path)) for path in files]
    assert has_tower == [True, False, False, False]
    value, images = load_value(tmp_path), DATA.synthetic.images / 255
    folds = value.held_out_folds(DATA.synthetic.images)
    calls = []
    tower = value.classifiers[0].tower
    tower.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    found = value.judge(images, DATA.synthetic.labels, folds)
    assert calls == [len(images)]
    assert value.judge(images[:0], DATA.synthetic.labels[:0]).loss.shape == (0,)
    for snapshot in value.snapshots:
        snapshot.classifiers = torch.nn.ModuleList(copy.deepcopy(c) for c in snapshot.classifiers)
    again = value.judge(images, DATA.synthetic.labels, folds)
    torch.testing.assert_close(vars(again), vars(found))


def test_images_of_any_size_are_judged(trained):
    value = load_value(trained)
    assert value.judge(torch.rand(2, 3, 40, 40), torch.tensor([0, 1])).utility.shape == (2,)


def test_an_inverted_model_is_refused_unless_forced(trained, tmp_path):
    import shutil

    copy = Path(shutil.copytree(trained, tmp_path / "value"))
    facts = json.loads((copy / "value.json").read_text())
    facts["canary"]["auroc"] = 0.31
    (copy / "value.json").write_text(json.dumps(facts))
    with pytest.raises(UtilgenError, match=r"0\.31"):
        load_value(copy)
    assert load_value(copy, force=True).classes == CLASSES


def test_a_missing_or_damaged_model_says_so(trained, tmp_path):
    with pytest.raises(NoInput, match="utilgen value train"):
        load_value(tmp_path / "nothing")
    (tmp_path / "value.json").write_text("{}")
    with pytest.raises(BadInput):
        load_value(tmp_path)


def test_auroc_is_the_share_of_ordered_pairs():
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(6, (20,), generator=generator).float()
    b = torch.randint(5, (30,), generator=generator).float()
    pairs = (a[:, None] > b).double() + 0.5 * (a[:, None] == b).double()
    assert auroc(a, b) == pytest.approx(pairs.mean().item())
    assert [verdict(x) for x in (0.95, 0.7, 0.4, None)] == ["ok", "weak", "inverted", "unknown"]


class Mps(torch.Tensor):
    """As on an Apple GPU: there are no doubles before it comes to the CPU."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        found = super().__torch_function__(func, types, args, kwargs or {})
        if func is torch.Tensor.cpu:
            with torch._C.DisableTorchFunctionSubclass():
                return found.as_subclass(torch.Tensor)
        assert func is not torch.Tensor.double
        return found


def test_auroc_makes_its_doubles_on_the_cpu():
    a, b = torch.tensor([0.3, 0.9, 0.5]), torch.tensor([0.1, 0.5])
    with pytest.raises(AssertionError):
        a.as_subclass(Mps).double()
    assert auroc(a.as_subclass(Mps), b.as_subclass(Mps)) == auroc(a, b)


@pytest.mark.parametrize(("generated", "others"), [(0, 5), (2, 8), (40, 10)])
def test_planted_labels_fill_an_eighth_of_a_batch_at_most(generated, others):
    """A quarter is for generated images; where they are few, their own share, or that eighth."""
    synthetic = colours(generated, 2) if generated else None
    pool, _ = make_pool(colours(20, 1), synthetic, None, folds=2, canaries=0.1, seed=0)
    run = Trajectory(replace(CONFIG, batch_size=40), pool, 16, 0, torch.device("cpu"))
    roles = torch.stack([pool.roles[run._batch(0)[1]] for run.step in range(60)])
    assert set((roles != REAL).sum(1).tolist()) == {others}
    assert 0 < (roles == PLANTED).double().mean() <= 0.125


def test_a_short_run_is_looked_at_before_its_last_snapshot():
    assert [replace(CONFIG, steps=s, refresh=20).look_every() for s in (400, 80, 20, 10, 3)] == [
        20, 20, 5, 2, 1,
    ]  # fmt: skip


def test_only_the_images_of_the_coming_batches_are_looked_at(monkeypatch):
    """The run is that of one that looks at the whole pool every time."""
    pool, _ = make_pool(colours(20, 1), colours(300, 2), None, folds=2, canaries=0.01, seed=0)
    looks: list[int] = []

    def counted(model, images, labels, at):
        looks.append(len(at))
        return losses_of(model, images, labels, at)

    def weights() -> list[torch.Tensor]:
        run = Trajectory(replace(CONFIG, steps=20), pool, 16, 0, torch.device("cpu"))
        looks.clear()
        while run.step < 20:
            run.advance()
        return [p.detach() for net in (*run.models, run.weight_net) for p in net.parameters()]

    monkeypatch.setattr(todv, "losses_of", counted)
    few, most = weights(), max(looks)
    monkeypatch.setattr(Trajectory, "_coming", lambda self: torch.arange(len(pool)))
    torch.testing.assert_close(few, weights())
    assert 4 * most < max(looks) and max(looks) > len(pool) / 3


def test_images_are_read_no_smaller_than_the_classifier_takes_them(tmp_path):
    data = colours(2, 1)
    small = replace(data, images=data.images[:, :, :4, :4])
    real = [str(write_shards(tmp_path / "real", small))]
    assert load_value_data(real, [], [], "small-cnn").real.images.shape[-1] == 8


def test_real_images_without_names_take_those_of_the_others(tmp_path):
    samples = as_samples(colours(2, 1))
    for sample in samples:
        del sample.members["json"]
    (tmp_path / "real").mkdir()
    write_shard(tmp_path / "real" / "00000.tar", samples)
    real = [str(tmp_path / "real")]
    synthetic = [str(write_shards(tmp_path / "synthetic", colours(2, 2)))]
    found = load_value_data(real, synthetic, [], "small-cnn", 16)
    assert found.real.classes == CLASSES and not found.real.unnamed
    alone = load_value_data(real, [], [], "small-cnn", 16)
    value = train_values(alone, replace(CONFIG, steps=10), tmp_path / "value")
    assert value.classes == ["0", "1", "2"] and value.unnamed == {0, 1, 2}
    named = as_samples(colours(1, 3))
    assert len(list(Scorer(value)(named))) == 3
    assert load_images(open_source(synthetic), 16, value).classes == CLASSES


def test_more_folds_than_images_are_refused(tmp_path):
    one = DATA.real.subset([0, 3])
    with pytest.raises(UsageError, match="too few real images"):
        train_values(ValueData(one), replace(CONFIG, folds=3), tmp_path)


def test_the_side_is_that_of_the_usual_image(tmp_path: Path) -> None:
    """One icon or banner that sorts first decides nothing."""
    sides = [8, 30, 30, 32, 200]
    write_shard(tmp_path / "0.tar", [make_sample(i, size=side) for i, side in enumerate(sides)])
    assert native_size(open_source([str(tmp_path)])) == 30


@pytest.mark.parametrize("augment", ["none", "pad"])
def test_what_a_frozen_tower_says_of_an_image_is_kept(monkeypatch, augment):
    """The run is that of heads that ask it anew, which takes several times as many images."""
    pool, _ = make_pool(colours(40, 1), colours(20, 2), None, folds=2, canaries=0.05, seed=0)
    config = replace(CONFIG, arch=f"open_clip:{CLIP}", steps=24, warmup=0.25, augment=augment)
    asked: list[int] = []

    def run() -> list[torch.Tensor]:
        run = Trajectory(config, pool, 16, 0, torch.device("cpu"))
        asked.clear()
        run.models[0].tower.register_forward_hook(
            lambda _, inputs, __: asked.append(len(inputs[0]))
        )
        while run.step < 24:
            run.advance()
        assert all(len(m.head.weight.unique()) > 1 for m in run.models)
        return [p.detach() for net in (*run.models, run.weight_net) for p in net.parameters()]

    kept, few = run(), sum(asked)
    monkeypatch.setattr(todv, "pays_to_keep", lambda *_: False)
    torch.testing.assert_close(kept, run(), rtol=1e-4, atol=1e-5)
    assert few == (0 if augment == "none" else 24 * 2 * CONFIG.batch_size)
    assert sum(asked) > 1.25 * 24 * 2 * CONFIG.batch_size
