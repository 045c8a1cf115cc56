"""`value score` as a stage: order, bytes, duplicates, classes, a flat memory, a diverse subset."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.largest import Largest
from tests.valuation_toys import as_samples, colours
from utilgen_cli.commands.valuing import score_lines
from utilgen_cli.runtime.errors import BadInput, UsageError
from utilgen_cli.runtime.files import encode_json
from utilgen_cli.shards.sample import Sample
from utilgen_cli.valuation import neighbours
from utilgen_cli.valuation.neighbours import Memory, nearest_others
from utilgen_cli.valuation.score import Scorer
from utilgen_cli.valuation.select import CANDIDATES, Best, pick_diverse, shares
from utilgen_cli.valuation.subset import Aside, Waiting, select_samples
from utilgen_cli.valuation.todv import ValueConfig
from utilgen_cli.valuation.training import ValueData, train_values
from utilgen_cli.valuation.value_model import ValueModel

METHODS = ("weight-net", "loss", "knn-shapley", "influence")


@pytest.fixture(scope="module")
def value(tmp_path_factory) -> ValueModel:
    directory: Path = tmp_path_factory.mktemp("value")
    config = ValueConfig(steps=40, batch_size=12, folds=2, snapshots=2, refresh=5, augment="none")
    data = ValueData(colours(8, 1), colours(12, 2), colours(4, 3))
    return train_values(data, config, directory, seed=0)


def with_label(sample: Sample, label: int, name: str) -> Sample:
    relabelled = sample.with_member("cls", str(label).encode())
    return relabelled.with_member("json", encode_json({"class_name": name}))


def test_samples_keep_their_order_and_bytes(value):
    samples = [s.with_member("note.txt", b"\x00as it was") for s in as_samples(colours(5, 7))]
    scored = list(Scorer(value, batch_size=4)(samples))
    assert [s.key for s in scored] == [s.key for s in samples]
    for before, after in zip(samples, scored, strict=True):
        assert list(after.members) == [*before.members, "utility.json"]
        assert all(after.members[name] == data for name, data in before.members.items())


def test_a_class_may_be_named_by_a_number_or_not_at_all(value):
    sample = next(iter(as_samples(colours(1, 7))))
    unnamed = sample.with_member("json", b'{"class_name": null}')
    assert next(Scorer(value)([unnamed])).key == sample.key
    assert sample.with_member("json", b'{"class_name": 7}').facts == {"class_name": "7"}
    assert "class_name" not in unnamed.facts


@pytest.mark.parametrize("method", METHODS)
def test_every_method_writes_the_same_facts(value, method):
    sample = next(Scorer(value, method)(as_samples(colours(1, 7))))
    facts = sample.parsed("utility.json")
    assert sorted(facts) == [
        "disagreement", "features", "loss", "margin", "method", "nearest", "predicted", "probability", "utility",
    ]  # fmt: skip
    assert facts["method"] == method
    assert 0 <= facts["probability"] <= 1 and -1 <= facts["margin"] <= 1


def test_one_pass_asks_the_last_classifier_that_did_not_train_on_the_sample(value):
    """Against the classifiers' own losses; only several passes can disagree."""
    new, known = colours(4, 7), colours(8, 1)
    fold = value.held_out_folds(known.images)
    assert (fold >= 0).all()
    for data, asked in ((new, torch.zeros(len(new)).long()), (known, fold)):
        found = [s.parsed("utility.json") for s in Scorer(value)(as_samples(data))]
        losses = [
            torch.nn.functional.cross_entropy(c(data.images / 255), data.labels, reduction="none")
            for c in value.classifiers
        ]
        expected = torch.stack(losses)[asked, torch.arange(len(data))]
        assert [f["loss"] for f in found] == pytest.approx(expected.tolist(), rel=1e-4)
        assert {f["disagreement"] for f in found} == {None}
    twice = [s.parsed("utility.json") for s in Scorer(value, passes=2)(as_samples(new))]
    spread = [f["disagreement"] for f in twice]
    assert min(spread) >= 0 < max(spread)  # colours are told apart without doubt by some


@pytest.mark.parametrize("method", ["weight-net", "knn-shapley", "influence"])
def test_wrong_labels_score_below_right_ones(value, method):
    right = as_samples(colours(6, 8))
    names = ["red", "green", "blue"]
    wrong = [with_label(s, (s.label + 1) % 3, names[(s.label + 1) % 3]) for s in right]
    mean = [
        sum(s.parsed("utility.json")["utility"] for s in Scorer(value, method)(part))
        for part in (right, wrong)
    ]
    assert mean[0] > mean[1]


def test_the_batch_size_does_not_change_the_scores(value):
    samples = as_samples(colours(5, 7))
    one, many = (list(Scorer(value, batch_size=n)(samples)) for n in (2, 64))
    for a, b in zip(one, many, strict=True):
        facts = a.parsed("utility.json"), b.parsed("utility.json")
        assert facts[0].pop("predicted") == facts[1].pop("predicted")
        for name in ("method", "features", "disagreement"):
            facts[0].pop(name), facts[1].pop(name)
        assert facts[0] == pytest.approx(facts[1], rel=1e-3, abs=1e-5)


def test_a_copy_is_nearer_than_anything_else(value):
    samples = as_samples(colours(4, 7))
    copy = Sample("copy", samples[5].members)
    facts = [s.parsed("utility.json") for s in Scorer(value)([*samples, copy])]
    assert facts[-1]["nearest"] < 1e-5 < min(f["nearest"] for f in facts[:-1])


def test_the_summary_counts_duplicates_and_agreement(value):
    samples = as_samples(colours(4, 7))
    copies = [Sample(f"copy{i}", s.members) for i, s in enumerate(samples)]
    scorer = Scorer(value)
    list(scorer([*samples, *copies]))
    summary = scorer.summary()
    assert summary["all"]["samples"] == 24
    assert summary["all"]["duplicates"] >= 0.5
    assert summary["all"]["agreement"] > 0.8
    assert set(summary["classes"]) == {"red", "green", "blue"}


def test_two_classes_of_one_name_are_summed_up_apart(value, monkeypatch):
    monkeypatch.setattr(value, "classes", ["crane", "dog", "crane"])
    names = ("crane", "dog", "crane")
    scorer = Scorer(value)
    list(scorer(with_label(s, s.label, names[s.label]) for s in as_samples(colours(4, 7))))
    rows = scorer.summary()["classes"]
    assert {name: row["samples"] for name, row in rows.items()} == {
        "crane (0)": 4, "dog": 4, "crane (2)": 4,
    }  # fmt: skip


def test_people_see_the_row_of_every_class_whatever_it_is_called(capsys):
    columns = ("samples", "utility", "loss", "agreement", "duplicates", "disagreement")
    row, names = dict.fromkeys(columns, 1), ["all", "x" * 50 + "a", "x" * 50 + "b"]
    score_lines({"all": row, "passed": 1, "classes": dict.fromkeys(names, row)}, False, False)
    assert len(capsys.readouterr().err.splitlines()) == 1 + len(names) + 1


@pytest.mark.parametrize("label, name, why", [(3, "grey", "3 classes"), (1, "teal", "'green'")])
def test_another_task_s_classes_are_refused(value, label, name, why):
    sample = with_label(as_samples(colours(1, 7))[0], label, name)
    with pytest.raises(BadInput, match=why):
        list(Scorer(value)([sample]))


@pytest.mark.parametrize("method", ["data-oob", "nonsense"])
def test_unknown_methods_are_named(value, method):
    with pytest.raises(UsageError, match="weight-net"):
        Scorer(value, method)


def test_memory_is_flat_in_the_number_of_samples(value):
    base = as_samples(colours(2, 7))

    def stream(n: int) -> Iterator[Sample]:
        for i in range(n):
            yield Sample(f"{i:06d}", dict(base[i % len(base)].members))

    def peak(n: int) -> int:
        tracemalloc.start()
        for _ in Scorer(value, batch_size=16)(stream(n)):
            pass
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(64)
    kept = (peak(1200) - peak(120)) / 1080
    assert kept < 100 < len(base[0].members["png"])  # bytes a sample


def test_the_ring_forgets_the_oldest_and_keeps_the_real_ones():
    eye = torch.eye(6)
    memory = Memory(eye[:1], capacity=2)
    assert memory.nearest(eye[1:4]).tolist() == [1, 1, 1]
    assert memory.nearest(eye[[1]]).tolist() == [1]  # 2 and 3 are in the ring
    assert memory.nearest(eye[[3, 0]]).tolist() == [0, 0]


def test_a_duplicate_in_the_same_batch_counts_only_against_the_earlier():
    eye = torch.eye(3)
    assert Memory(eye[:0]).nearest(eye[[0, 1, 0]]).tolist() == [2, 1, 0]


def test_a_diverse_pick_takes_no_duplicate_while_there_is_another():
    features = torch.eye(4)[[0, 0, 0, 1, 2]]
    picked = pick_diverse(torch.tensor([0.9, 0.9, 0.9, 0.6, 0.1]), features, 3)
    assert sorted(features[picked].argmax(1).tolist()) == [0, 1, 2]


def test_the_greedy_pick_maximises_the_determinant_at_each_step():
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(9, 4, generator=generator), dim=1)
    utilities = torch.rand(9, generator=generator)
    q = torch.exp(2.0 * utilities.argsort().argsort().double() / 8)
    similar = 0.995 * (features.double() @ features.double().T) + 0.005 * torch.eye(9)
    kernel = q[:, None] * similar * q
    chosen: list[int] = []
    for _ in range(4):
        gains = {
            i: torch.det(kernel[[*chosen, i]][:, [*chosen, i]]).item()
            for i in range(9)
            if i not in chosen
        }
        chosen.append(max(gains, key=gains.__getitem__))
    assert pick_diverse(utilities, features, 4).tolist() == chosen


def test_the_nearest_others_in_rows_are_those_of_the_whole_matrix(monkeypatch):
    g = torch.Generator().manual_seed(0)
    drawn = torch.randn(50, 6, generator=g, dtype=torch.float64)
    features = torch.nn.functional.normalize(drawn, dim=1)
    whole = 1 - (features @ features.T).fill_diagonal_(-1).amax(1)
    monkeypatch.setattr(neighbours, "ROWS", 8)
    with Largest() as largest:
        torch.testing.assert_close(nearest_others(features), whole)
    assert largest.elements <= 8 * 50


def test_agreed_passes_on_what_is_seen_as_its_class_and_counts_the_rest(value):
    names = ("red", "green", "blue")
    samples = list(as_samples(colours(6, 7)))
    wrong = [with_label(s, c := (s.label + 1) % 3, names[c]) for s in samples[::2]]
    mixed = [*wrong, *samples[1::2]]
    every = list(Scorer(value)(iter(mixed)))
    scorer = Scorer(value, agreed=True)
    kept = list(scorer(iter(mixed)))
    expected = [s for s in every if s.parsed("utility.json")["predicted"] == s.label]
    assert [s.members for s in kept] == [s.members for s in expected]
    assert 0 < len(kept) < len(mixed) == scorer.summary()["all"]["samples"]


def test_select_is_even_over_classes_and_keeps_the_order(value):
    samples = as_samples(colours(8, 7))
    picked = list(select_samples(iter(samples), Scorer(value), 6))
    assert sorted(s.label for s in picked) == [0, 0, 1, 1, 2, 2]
    keys = [s.key for s in samples]
    assert [s.key for s in picked] == sorted((s.key for s in picked), key=keys.index)


def test_what_waits_comes_back_whole_and_in_any_order():
    samples = [
        s.with_member("note.txt", b"\x00" * n) for n, s in enumerate(as_samples(colours(2, 7)))
    ]
    with Waiting() as waiting:
        places = [waiting.put(sample) for sample in samples]
        for sample, place in reversed(list(zip(samples, places, strict=True))):
            found = waiting.get(place)
            assert (found.key, found.members) == (sample.key, sample.members)


def test_select_looks_at_four_candidates_for_each_that_it_picks(value, monkeypatch):
    from utilgen_cli.valuation import subset

    seen = []

    def watching(utilities, features, n):
        seen.append((len(utilities), n, utilities))
        return pick_diverse(utilities, features, n)

    monkeypatch.setattr(subset, "pick_diverse", watching)
    samples = list(as_samples(colours(20, 7)))
    assert len(list(select_samples(iter(samples), Scorer(value), 6))) == 6
    every = [s.parsed("utility.json")["utility"] for s in Scorer(value)(iter(samples))]
    for label, (candidates, n, utilities) in enumerate(seen):
        own = sorted(u for u, s in zip(every, samples, strict=True) if s.label == label)
        assert n == 2 and candidates == 8
        assert utilities.min().item() == pytest.approx(own[-8])


def test_select_of_fewer_samples_than_classes_takes_one_of_some(value):
    samples = as_samples(colours(8, 7))
    assert sorted(s.label for s in select_samples(iter(samples), Scorer(value), 2)) == [0, 1]


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 30)), min_size=1, max_size=120),
    st.integers(1, 20),
)
@settings(deadline=None)
def test_what_is_kept_is_bounded_and_has_all_that_may_be_picked(stream, count):
    best = Best(count)
    for place, (label, utility) in enumerate(stream):
        if best.wants(label, utility):
            best.keep(label, utility, place, place)
        kept = sum(map(len, best.heaps.values()))
        assert kept <= CANDIDATES * (count + len(best.heaps))
    every = {
        label: [(u, at, at) for at, (c, u) in enumerate(stream) if c == label]
        for label in sorted(best.heaps)
    }
    for (label, own), n in zip(every.items(), shares(count, map(len, every.values())), strict=True):
        first = sorted(own, key=lambda e: (-e[0], e[1]))[: CANDIDATES * n]
        assert best.of(label, CANDIDATES * n) == sorted(first, key=lambda e: e[1])


def test_what_is_kept_of_many_classes_is_settled_in_one_go(monkeypatch):
    cuts, cut = [], Best._cut
    monkeypatch.setattr(Best, "_cut", lambda self, label: (cuts.append(label), cut(self, label)))
    best = Best(3000)
    for place in range(6000):
        if best.wants(place % 300, place):
            best.keep(place % 300, place, place, place)
    assert best.portion == 10 and len(cuts) < 20_000


def test_shares_go_round_until_all_are_dealt():
    assert shares(7, [1, 9, 9]) == [1, 3, 3]
    assert shares(9, [1, 2]) == [1, 2]


def test_aside_keeps_a_bounded_set_whatever_the_order(value, monkeypatch):
    from utilgen_cli.valuation import subset

    monkeypatch.setattr(subset, "ASIDE", 5)
    samples = as_samples(colours(6, 7))
    kept = []
    for order in (samples, samples[::-1]):
        aside = Aside(value.classes, value.size)
        assert list(aside.watch(order)) == list(order)
        kept.append(aside.images().keys)
    assert kept[0] == kept[1] and len(kept[0]) == 5
