"""KNN-Shapley, influence and lookahead against their definitions."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import utilgen_cli
from tests.largest import Largest
from tests.valuation_toys import as_samples, colours
from utilgen_cli.classification.models import build_classifier
from utilgen_cli.valuation import baselines
from utilgen_cli.valuation.baselines import JoinedShapley, knn_shapley
from utilgen_cli.valuation.lookahead import _start, lookahead, lookaheads
from utilgen_cli.valuation.score import Scorer
from utilgen_cli.valuation.todv import ValueConfig
from utilgen_cli.valuation.training import ValueData, train_values

N, V, K = 6, 4, 2


def knn_world(seed: int, n: int = N, points: int = V) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x = F.normalize(torch.randn(n, 3, generator=generator, dtype=torch.float64), dim=1)
    v = F.normalize(torch.randn(points, 3, generator=generator, dtype=torch.float64), dim=1)
    y = torch.randint(2, (n,), generator=generator)
    u = torch.randint(2, (points,), generator=generator)
    return x, y, v, u


def knn_utility(subset: tuple[int, ...], x, y, v, u, k: int) -> float:
    """Mean over the validation points of (right votes among the K nearest) / K."""
    total = 0.0
    for point, label in zip(v, u, strict=True):
        nearest = sorted(subset, key=lambda i: -float(point @ x[i]))[:k]
        total += sum(bool(y[i] == label) for i in nearest) / k
    return total / V


def shapley(x, y, v, u, k: int = K) -> list[float]:
    """The definition: marginal gains averaged over all orders."""
    found = [0.0] * len(y)
    for i in range(len(y)):
        others = [j for j in range(len(y)) if j != i]
        for size in range(len(y)):
            weight = 1 / (len(y) * math.comb(len(y) - 1, size))
            for subset in itertools.combinations(others, size):
                joined = knn_utility((*subset, i), x, y, v, u, k)
                gain = joined - knn_utility(subset, x, y, v, u, k)
                found[i] += weight * gain
    return found


@pytest.mark.parametrize("k", [1, K, N, 10])
@pytest.mark.parametrize("seed", [0, 1])
def test_knn_shapley_is_the_shapley_value(seed, k):
    x, y, v, u = knn_world(seed)
    assert knn_shapley(x, y, v, u, k).tolist() == pytest.approx(shapley(x, y, v, u, k))


@pytest.mark.parametrize("seed", [2, 3, 4])
def test_a_joined_point_has_its_value_in_the_whole_set(seed):
    x, y, v, u = knn_world(seed)
    for i in range(N):
        rest = [j for j in range(N) if j != i]
        alone = JoinedShapley(x[rest], y[rest], v, u, K)(x[[i]], y[[i]])
        together = knn_shapley(torch.cat([x[rest], x[[i]]]), torch.cat([y[rest], y[[i]]]), v, u, K)
        torch.testing.assert_close(alone[0], together[-1])


def test_joined_values_by_some_validation_points_at_a_time_are_those_by_all(monkeypatch):
    x, y, v, u = knn_world(5, 40, 50)
    new, labels = knn_world(6, 9)[:2]
    whole = JoinedShapley(x, y, v, u)(new, labels)
    monkeypatch.setattr(baselines, "ROWS", 8)
    with Largest() as largest:
        torch.testing.assert_close(JoinedShapley(x, y, v, u)(new, labels), whole)
    assert largest.elements <= max(8 * 41, 50 * 9)  # of a table, and of the values at all points


@pytest.fixture(scope="module")
def value(tmp_path_factory):
    config = ValueConfig(steps=30, batch_size=12, folds=2, snapshots=1, refresh=5, augment="none")
    data = ValueData(colours(8, 1), colours(8, 2), colours(6, 3))
    return train_values(data, config, tmp_path_factory.mktemp("value"), seed=0)


def test_validation_points_are_sorted_by_once_for_a_stream(value, monkeypatch):
    made, table = [], JoinedShapley._table
    monkeypatch.setattr(JoinedShapley, "_table", lambda *a: made.append(1) or table(*a))
    assert len(list(Scorer(value, "knn-shapley", 4)(as_samples(colours(5, 7))))) == 15
    assert len(made) == 1


def test_influence_is_minus_the_squared_gradient_of_the_last_layer(value):
    """Self-influence by autograd on the head, averaged over the folds."""
    new = colours(2, 9)
    expected = torch.zeros(len(new))
    for classifier in value.classifiers:
        head = list(classifier.head.requires_grad_(True).parameters())
        for i in range(len(new)):
            loss = F.cross_entropy(classifier(new.images[[i]] / 255), new.labels[[i]])
            expected[i] -= sum(g.square().sum() for g in torch.autograd.grad(loss, head)) / 2
        classifier.head.requires_grad_(False)
    found = value.judge_pixels(new.images, new.labels).influence
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    wrong = value.judge_pixels(new.images, (new.labels + 1) % 3).influence
    assert wrong.mean() < found.mean()


def test_a_frozen_tower_stays_as_it_is_under_lookahead():
    arch = f"open_clip:{Path(utilgen_cli.__file__).parent / 'tiny' / 'open_clip'}"
    settings = ValueConfig(arch=arch, augment="none").facts()
    value = SimpleNamespace(
        facts={"config": settings}, classes=["a", "b", "c"], size=32, device=torch.device("cpu"),
        classifiers=[build_classifier(arch, 3, 32)],
    )  # fmt: skip
    start, config = _start(value, 0, 7)
    assert start.tower is value.classifiers[0].tower
    taken = [name for name, p in start.named_parameters() if p.requires_grad]
    assert taken == ["head.weight", "head.bias"]
    assert (config.steps, config.lr, config.augmentation) == (7, settings["lr"], "none")


def test_lookahead_puts_right_labels_above_wrong_ones(value):
    good, bad = colours(10, 11), colours(10, 11)
    bad.labels = (bad.labels + 1) % 3
    real, val = colours(8, 1), colours(6, 3)
    together = lookaheads(value, real, [good, bad], val, steps=12, seed=0)
    assert together[0].gain > together[1].gain
    assert together[0].accuracy_gain > together[1].accuracy_gain
    assert together[1].gain < 0 < together[1].standard_error
    # A set alone is valued as it is among others.
    assert lookahead(value, real, bad, val, steps=12, seed=0) == together[1]
