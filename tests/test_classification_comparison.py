"""The comparison of arms: equal, resumable, and blind to the test set until the end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from utilgen_cli.classification import comparison, evaluation, models, towers
from utilgen_cli.classification.arms import at_volume, build_arms
from utilgen_cli.classification.clip import load_tower
from utilgen_cli.classification.comparison import Comparison, Inputs, Protocol, compare_arms
from utilgen_cli.classification.cost import generation_cost
from utilgen_cli.classification.data import concatenate, shuffled_batches
from utilgen_cli.classification.models import load_classifier
from utilgen_cli.classification.train import TrainConfig
from utilgen_cli.report.table import render
from utilgen_cli.runtime import signals
from utilgen_cli.runtime.errors import Stopped, UsageError, UtilgenError
from utilgen_cli.runtime.files import write_json
from utilgen_cli.shards.operands import Source
from utilgen_cli.shards.sample import Sample
from utilgen_cli.shards.writer import write_shard

from .classification_toys import NAMES, colour_images, samples_of, shards_of
from .conftest import ROOT

CLIP = ROOT / "utilgen_cli" / "tiny" / "open_clip"
PROTOCOL = Protocol(TrainConfig(steps=6, batch_size=8), seeds=2, image_size=16)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    root = tmp_path_factory.mktemp("sets")
    wrong = colour_images(8, seed=4)
    wrong.labels = (wrong.labels + 1) % 3
    wrong.keys = [f"w{key}" for key in wrong.keys]
    return Inputs(
        shards_of(root / "real", colour_images(4)),
        {"good": shards_of(root / "good", colour_images(8, seed=3)),
         "wrong": shards_of(root / "wrong", wrong)},
        shards_of(root / "test", colour_images(10, seed=8)),
        shards_of(root / "val", colour_images(6, seed=5)),
    )  # fmt: skip


@pytest.fixture(scope="module")
def found(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return compare_arms(inputs, PROTOCOL, tmp_path_factory.mktemp("eval") / "runs")


def test_arms_are_real_then_each_set_alone_then_each_joined(found: Comparison) -> None:
    rows = [(a["name"], a["kind"], a["n_real"], a["n_synthetic"]) for a in found.summary["arms"]]
    assert rows == [
        ("real", "real", 12, 0),
        ("good", "alone", 0, 24),
        ("wrong", "alone", 0, 24),
        ("real + good", "joint", 12, 24),
        ("real + wrong", "joint", 12, 24),
    ]


def test_the_rows_follow_from_the_runs(found: Comparison) -> None:
    base = found.summary["arms"][0]
    assert "difference" not in base
    for arm in found.summary["arms"]:
        values = torch.tensor([run["accuracy"] for run in arm["runs"]], dtype=torch.float64)
        assert arm["accuracy"]["mean"] == pytest.approx(values.mean().item())
        assert arm["accuracy"]["std"] == pytest.approx(values.std().item())
        assert {run["steps"] for run in arm["runs"]} == {6}
        assert {run["n_test"] for run in arm["runs"]} == {30}
        if arm is not base:
            expected = arm["accuracy"]["mean"] - base["accuracy"]["mean"]
            assert arm["difference"]["mean"] == pytest.approx(expected)


def test_wrong_labels_show_in_every_figure_that_is_to_show_them(inputs: Inputs) -> None:
    protocol = replace(PROTOCOL, config=TrainConfig(steps=60, batch_size=12))
    found = compare_arms(inputs, protocol).summary
    accuracy = {a["name"]: a["accuracy"]["mean"] for a in found["arms"]}
    assert accuracy["good"] > 0.9 > 0.1 > accuracy["wrong"]
    good, wrong = found["synthetic"]["good"], found["synthetic"]["wrong"]
    assert good["agreement"] > 0.9 > 0.1 > wrong["agreement"]
    assert good["influence"]["share"] > 0.6 > 0.3 > wrong["influence"]["share"]


def test_the_same_comparison_gives_the_same_figures(inputs: Inputs, found: Comparison) -> None:
    again = compare_arms(inputs, PROTOCOL)

    def timeless(summary: dict[str, object]) -> str:
        return json.dumps(summary, sort_keys=True, default=str).replace("seconds", "")

    for one, two in zip(found.summary["arms"], again.summary["arms"], strict=True):
        assert [r["per_class"] for r in one["runs"]] == [r["per_class"] for r in two["runs"]]
        assert [r["nll"] for r in one["runs"]] == [r["nll"] for r in two["runs"]]
    assert timeless(found.summary["synthetic"]) == timeless(again.summary["synthetic"])
    assert found.influence == again.influence


def test_a_tower_that_is_never_trained_sees_every_set_once(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figures are those of classifiers that each have their own; a stop before the test is
    no matter."""
    config = TrainConfig(steps=6, batch_size=8, augmentation="none")
    protocol = replace(PROTOCOL, archs=[f"open_clip:{CLIP}"], config=config)
    seen: list[int] = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        tower, transform = load_tower(*args, **kwargs)
        tower.register_forward_hook(lambda _, x, __: seen.append(len(x[0])))
        return tower, transform

    monkeypatch.setattr(models, "load_tower", watched)

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(comparison, "judge_runs", stopped)
        compare_arms(inputs, protocol, tmp_path / "runs")
    assert sum(n for n in seen if n > 1) == 12 + 24 + 24 + 18  # one image is asked for its width
    seen.clear()
    one = compare_arms(inputs, protocol, tmp_path / "runs")
    assert sum(n for n in seen if n > 1) == 30
    assert len([load_classifier(path) for path in tmp_path.glob("runs/*.safetensors")]) == 2
    for module in (evaluation, towers):
        monkeypatch.setattr(module, "has_named_weights", lambda _: False)
    seen.clear()
    two = compare_arms(inputs, protocol)
    assert sum(n for n in seen if n > 1) == 7 * (12 + 24 + 24 + 18 + 30)
    assert one.influence.keys() == two.influence.keys()
    for name, values in one.influence.items():
        assert values == pytest.approx(two.influence[name], rel=1e-3, abs=1e-6)
    for ours, theirs in zip(one.summary["arms"], two.summary["arms"], strict=True):
        for a, b in zip(ours["runs"], theirs["runs"], strict=True):
            assert a["nll"] == pytest.approx(b["nll"], rel=1e-4)


def test_the_test_sets_images_are_read_once_when_no_run_is_left_to_train(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its labels and names alone are looked at before, so that no training is for nothing."""
    events: list[str] = []

    class Watched(Source):
        def samples(self) -> Iterator[Sample]:
            events.append("test" if "train" in events else "labels")
            for sample in super().samples():
                if "train" not in events:
                    del sample.members["png"]
                yield sample

    train = evaluation.train_classifier
    monkeypatch.setattr(
        evaluation, "train_classifier", lambda *a, **k: (events.append("train"), train(*a, **k))[1]
    )
    compare_arms(replace(inputs, test=Watched(inputs.test.paths)), PROTOCOL)
    assert events == ["labels"] + ["train"] * 10 + ["test"]


@pytest.mark.parametrize(
    ("name", "labels", "line"),
    [("verde", [1], "class 1 is 'verde' here and 'green' before"),
     ("blue", [3], "label 3 is not one of the 3 classes"), ("", [], "no samples in it")],
)  # fmt: skip
def test_a_test_set_of_another_task_is_refused_before_any_training(
    inputs: Inputs, tmp_path: Path, name: str, labels: list[int], line: str
) -> None:
    (png,) = samples_of(colour_images(1).subset([0]))
    samples = [
        Sample(f"t{i}", {**png.members, "cls": b"%d" % i, "json": b'{"class_name": "%s"}' % name.encode()})
        for i in labels
    ]  # fmt: skip
    write_shard(tmp_path / "test.tar", samples)
    with pytest.raises(UtilgenError, match=line):
        compare_arms(
            replace(inputs, test=Source((tmp_path / "test.tar",))), PROTOCOL, tmp_path / "o"
        )
    assert not list((tmp_path / "o").glob("*.safetensors"))


def test_sets_without_names_take_those_of_the_others(inputs: Inputs, tmp_path: Path) -> None:
    real = samples_of(colour_images(4))
    for sample in real:
        del sample.members["json"]
    write_shard(tmp_path / "real.tar", real)
    unnamed = Source((tmp_path / "real.tar",))
    found = compare_arms(replace(inputs, real=unnamed), replace(PROTOCOL, seeds=1))
    assert found is not None
    assert [row["class"] for row in found.summary["arms"][0]["per_class"]] == NAMES
    of_test = replace(inputs, real=unnamed, validation=None, synthetic={"same": unnamed})
    found = compare_arms(of_test, replace(PROTOCOL, seeds=1))
    assert found is not None and found.summary["classes"] == NAMES


@pytest.mark.parametrize("lone", ["--val", "good"])
def test_a_lone_image_is_refused_before_any_training(
    inputs: Inputs, tmp_path: Path, lone: str
) -> None:
    one = shards_of(tmp_path / "one", colour_images(1).subset([0]))
    change = {"validation": one} if lone == "--val" else {"synthetic": {"good": one}}
    with pytest.raises(UsageError, match=f"{lone}: has a single image"):
        compare_arms(replace(inputs, **change), PROTOCOL, tmp_path / "o")
    assert not list((tmp_path / "o").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("config", "line"),
    [({"real_share": 0.05}, "leaves one side out of batches of 8"),
     ({"validate_every": 7}, "never comes in 6 steps")],
)  # fmt: skip
def test_what_would_be_other_than_it_says_is_refused(
    inputs: Inputs, config: dict[str, Any], line: str
) -> None:
    with pytest.raises(UsageError, match=line):
        compare_arms(inputs, replace(PROTOCOL, config=replace(PROTOCOL.config, **config)))
    if "real_share" in config:  # where nothing is joined, nothing is left out
        alone = replace(inputs, synthetic={})
        protocol = replace(PROTOCOL, seeds=1, config=replace(PROTOCOL.config, **config))
        assert compare_arms(alone, protocol) is not None


def test_two_arms_of_one_name_are_refused(inputs: Inputs) -> None:
    sets = {"a": inputs.synthetic["good"], "real + a": inputs.synthetic["wrong"]}
    with pytest.raises(UsageError, match=r"'real \+ a': two arms would have this name"):
        compare_arms(replace(inputs, synthetic=sets), PROTOCOL)


def test_a_stopped_comparison_goes_on_where_it_was(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: Comparison
) -> None:
    train = evaluation.train_classifier
    trained: list[int] = []

    def counting(*args: object, **kwargs: object) -> object:
        trained.append(1)
        if len(trained) == 4:
            signals._received.append(15)  # what the handler does
        return train(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(evaluation, "train_classifier", counting)
    monkeypatch.setattr(signals, "_received", [])
    with pytest.raises(Stopped):
        compare_arms(inputs, PROTOCOL, tmp_path / "runs")
    signals._received.clear()
    assert len(trained) == 4
    whole = compare_arms(inputs, PROTOCOL, tmp_path / "runs")
    assert len(trained) == 11  # the fourth was stopped at its first step, and went on
    nll = [[r["nll"] for r in arm["runs"]] for arm in whole.summary["arms"]]
    assert nll == [[r["nll"] for r in arm["runs"]] for arm in found.summary["arms"]]
    more = compare_arms(inputs, replace(PROTOCOL, seeds=3), tmp_path / "runs")
    assert len(trained) == 16  # one more seed: five more runs
    assert len(more.summary["arms"][0]["runs"]) == 3


def test_runs_are_never_mixed_with_those_of_another_test_set(
    inputs: Inputs, tmp_path: Path
) -> None:
    compare_arms(replace(inputs, synthetic={}), PROTOCOL, tmp_path / "runs")
    other = replace(inputs, synthetic={}, test=inputs.validation)
    with pytest.raises(UsageError, match="test was"):
        compare_arms(other, PROTOCOL, tmp_path / "runs")


def test_selection_needs_validation_images_that_are_not_trained_on(inputs: Inputs) -> None:
    selecting = replace(PROTOCOL, config=replace(PROTOCOL.config, validate_every=2))
    with pytest.raises(UsageError, match="trained on"):
        compare_arms(inputs, replace(selecting, validation_as_train=True))
    with pytest.raises(UsageError, match="needs --val"):
        compare_arms(replace(inputs, validation=None), selecting)
    with pytest.raises(UsageError, match="no such arm"):
        compare_arms(inputs, replace(PROTOCOL, baseline="best"))


def test_other_validation_images_are_another_selection(inputs: Inputs, tmp_path: Path) -> None:
    selecting = replace(PROTOCOL, config=replace(PROTOCOL.config, validate_every=2), seeds=1)
    other = shards_of(tmp_path / "val", colour_images(6, seed=77))
    alone = replace(inputs, synthetic={})
    compare_arms(alone, selecting, tmp_path / "runs")
    before = set((tmp_path / "runs").iterdir())
    compare_arms(replace(alone, validation=other), selecting, tmp_path / "runs")
    assert set((tmp_path / "runs").iterdir()) - before


def test_a_probe_whose_weights_are_gone_is_trained_again(inputs: Inputs, tmp_path: Path) -> None:
    one = replace(inputs, synthetic={"good": inputs.synthetic["good"]})
    protocol = replace(PROTOCOL, seeds=1)
    whole = compare_arms(one, protocol, tmp_path / "runs").summary
    for weights in (tmp_path / "runs").glob("*.safetensors"):
        weights.unlink()
    assert compare_arms(one, protocol, tmp_path / "runs").summary["arms"] == whole["arms"]


def test_validation_joins_the_real_share_of_all_arms_alike(inputs: Inputs) -> None:
    found = compare_arms(inputs, replace(PROTOCOL, validation_as_train=True, seeds=1)).summary
    assert [a["n_real"] for a in found["arms"]] == [30, 0, 0, 30, 30]
    extractor = found["synthetic"]["good"]["distribution"]["extractor"]
    assert extractor == "small-cnn trained on 12 real images"  # the probes never train on it


def test_a_leak_is_reported(inputs: Inputs) -> None:
    leaky = replace(inputs, validation=inputs.test)
    leaks = compare_arms(leaky, replace(PROTOCOL, seeds=1)).summary["leaks"]
    assert leaks["validation"]["same_pixels"] == leaks["validation"]["same_key"] == 30
    assert leaks["real"]["same_pixels"] == 0


def test_validation_images_that_are_trained_on_are_told(inputs: Inputs, tmp_path: Path) -> None:
    both = concatenate([colour_images(6, seed=5), colour_images(4).subset([0, 1, 2])])
    given = replace(inputs, validation=shards_of(tmp_path / "val", both))
    summary = compare_arms(given, replace(PROTOCOL, seeds=1)).summary
    assert summary["data"]["validation"]["also_real"] == 3
    assert "validation: 3 images are real training images too" in render(summary)


@pytest.mark.parametrize(
    ("changes", "as_train", "says"),
    [
        ({"validation": "real"}, False, "--val .*00000.tar: is named by --real too"),
        ({"test": "real"}, False, "--test .*00000.tar: is named by --real too"),
        ({"test": "good"}, False, "--test .*00000.tar: is named by --synthetic good too"),
        ({"test": "validation"}, True, "--test .*00000.tar: is named by --val too"),
    ],
)
def test_what_is_trained_on_is_not_tested_on(
    inputs: Inputs, changes: dict[str, str], as_train: bool, says: str, tmp_path: Path
) -> None:
    """Said before `overwrite` empties anything."""
    (tmp_path / "settings.json").write_text('{"command": "eval"}')
    (tmp_path / "run.json").write_text("{}")
    known = {"real": inputs.real, "validation": inputs.validation, **inputs.synthetic}
    given = replace(inputs, **{name: known[other] for name, other in changes.items()})
    with pytest.raises(UsageError, match=says):
        compare_arms(
            given, replace(PROTOCOL, validation_as_train=as_train), tmp_path, overwrite=True
        )
    assert (tmp_path / "run.json").exists()


def test_the_test_set_selects_no_step(inputs: Inputs) -> None:
    assert inputs.validation is not None
    given = replace(inputs, test=inputs.validation)
    config = replace(PROTOCOL.config, validate_every=2)
    with pytest.raises(UsageError, match="is named by --val too"):
        compare_arms(given, replace(PROTOCOL, config=config))


def test_volumes_are_multiples_of_each_class(inputs: Inputs) -> None:
    real, synthetic = colour_images(4), colour_images(8, seed=3)
    cut = at_volume("good", synthetic, real, 1.5)
    assert torch.bincount(cut.labels).tolist() == [6, 6, 6]
    assert set(cut.keys) <= set(synthetic.keys)
    with pytest.raises(UsageError, match="has 8 images of 'red', not 12"):
        at_volume("good", synthetic, real, 3)
    with pytest.raises(UsageError, match="leaves no image of good"):
        at_volume("good", synthetic, real, 0.1)
    with pytest.raises(ValueError, match="no images"):
        next(shuffled_batches(0, 4, torch.Generator()))
    arms = build_arms(real, {"good": synthetic}, None, [1, 2])
    assert [arm.name for arm in arms] == [
        "real", "good x1", "good x2", "real + good x1", "real + good x2",
    ]  # fmt: skip


def test_what_is_named_twice_is_compared_once(inputs: Inputs) -> None:
    twice = replace(PROTOCOL, archs=["small-cnn", "small-cnn"], times=[1, 1], seeds=1)
    found = compare_arms(inputs, twice)
    assert found is not None
    names = [arm["name"] for arm in found.summary["arms"]]
    assert len(names) == len(set(names)) == 1 + 2 * len(inputs.synthetic)


def test_the_cost_of_a_set_is_that_of_all_its_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = shards_of(tmp_path / "drawn", colour_images(2))
    scored = shards_of(tmp_path / "scored", colour_images(2))
    for name, source, seconds in (("generate", drawn, 30), ("value score", scored, 6)):
        directory = source.shards()[0].parent
        stats = directory / "00000_stats.json"
        write_json(stats, {**json.loads(stats.read_text()), "seconds": seconds})
        before = [str(p) for p in drawn.shards()] if source is scored else None
        write_json(directory / "settings.json", {"command": name, "input": before})
    cost = generation_cost(scored.shards(), price_per_hour=100)
    assert [(s["command"], s["seconds"]) for s in cost["stages"]] == [
        ("value score", 6), ("generate", 30),
    ]  # fmt: skip
    assert (cost["seconds"], cost["images"], cost["price"]) == (36, 6, 1.0)
    settings = {"command": "value score", "input": ["drawn/00000.tar"], "made in": str(tmp_path)}
    write_json(tmp_path / "scored" / "settings.json", settings)  # wherever `eval` is called
    assert generation_cost(scored.shards(), price_per_hour=100) == cost
    monkeypatch.chdir(tmp_path)  # a project that was moved, and is called from where it was
    write_json(tmp_path / "scored" / "settings.json", settings | {"made in": "/nowhere"})
    assert generation_cost(scored.shards(), price_per_hour=100) == cost
    (tmp_path / "drawn" / "00000_stats.json").unlink()
    assert generation_cost(drawn.shards()) == {
        "seconds": None, "images": None, "price": None, "stages": [],
    }  # fmt: skip


def test_an_end_between_a_result_and_its_tidying_leaves_nothing(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, hit = tmp_path / "plain", tmp_path / "hit"
    compare_arms(inputs, PROTOCOL, plain)

    def ended(path: Path, facts: object) -> None:
        write_json(path, facts)
        if path.name.startswith("good") and not path.name.endswith(".trained.json"):
            raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "write_json", ended)
    with pytest.raises(KeyboardInterrupt):
        compare_arms(inputs, PROTOCOL, hit)
    monkeypatch.setattr(evaluation, "write_json", write_json)
    compare_arms(inputs, PROTOCOL, hit)
    assert sorted(p.name for p in hit.iterdir()) == sorted(p.name for p in plain.iterdir())
