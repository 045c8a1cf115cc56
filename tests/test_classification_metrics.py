"""Metrics against torchmetrics, SciPy and plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import linalg, stats
from torchmetrics.functional.classification import multiclass_calibration_error

from utilgen_cli.classification import distribution, metrics

from .largest import Largest


def drawn(seed: int = 0, n: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(n, 4, generator=g), torch.randint(4, (n,), generator=g)


def test_calibration_error_is_torchmetrics() -> None:
    logits, labels = drawn()
    expected = multiclass_calibration_error(logits.softmax(1), labels, 4, n_bins=15)
    assert metrics.expected_calibration_error(logits, labels) == pytest.approx(
        expected.item(), abs=1e-6
    )


def test_a_calibrated_classifier_has_no_error_and_a_confident_wrong_one_has_all() -> None:
    labels = torch.arange(2).repeat(50)
    assert metrics.expected_calibration_error(torch.zeros(100, 2), labels) == pytest.approx(0)
    wrong = torch.nn.functional.one_hot(1 - labels, 2) * 100.0
    assert metrics.expected_calibration_error(wrong, labels) == pytest.approx(1)


def test_class_accuracies_are_those_of_a_count() -> None:
    logits, labels = drawn()
    labels[labels == 2] = 1  # no sample of class 2
    found = metrics.per_class_accuracy(logits, labels, 4)
    for c in (0, 1, 3):
        own = [int(logits[i].argmax()) == c for i in range(200) if labels[i] == c]
        assert found[c] == pytest.approx(sum(own) / len(own))
    assert found[2] is None
    whole = metrics.score(logits, labels, 4)
    assert whole["worst_class"] == min(a for a in found if a is not None)
    assert whole["accuracy"] == (logits.argmax(1) == labels).float().mean()


def test_paired_difference_is_scipys_paired_t_test() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.7, 0.02, 6), rng.normal(0.68, 0.02, 6)
    found, expected = metrics.paired_difference(a, b), stats.ttest_rel(a, b)
    interval = expected.confidence_interval(0.95)
    assert found["p"] == pytest.approx(expected.pvalue)
    assert (found["low"], found["high"]) == pytest.approx((interval.low, interval.high))
    assert found["mean"] == pytest.approx((a - b).mean())


def test_one_seed_or_no_spread_claims_no_interval() -> None:
    for a, b in (([0.7], [0.6]), ([0.7, 0.7], [0.5, 0.5]), ([0.55, 0.45], [0.5, 0.4])):
        found = metrics.paired_difference(a, b)
        assert (found["low"], found["high"], found["p"]) == (None, None, None)
    assert metrics.mean_std([0.5]) == {"mean": 0.5, "std": None}


def test_prdc_is_what_the_papers_define() -> None:
    g = torch.Generator().manual_seed(0)
    real = torch.randn(30, 3, generator=g)
    fake = 0.8 * torch.randn(40, 3, generator=g) + 0.5
    k = 4

    def distance(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(np.linalg.norm(a.numpy() - b.numpy()))

    def radius(points: torch.Tensor, i: int) -> float:
        return sorted(distance(points[i], p) for p in points)[k]  # [0] is the point itself

    r_real = [radius(real, i) for i in range(30)]
    r_fake = [radius(fake, j) for j in range(40)]
    d = [[distance(a, b) for b in fake] for a in real]
    found = distribution.prdc(real, fake, k)
    assert found["precision"] == pytest.approx(
        np.mean([any(d[i][j] < r_real[i] for i in range(30)) for j in range(40)])
    )
    assert found["recall"] == pytest.approx(
        np.mean([any(d[i][j] < r_fake[j] for j in range(40)) for i in range(30)])
    )
    assert found["density"] == pytest.approx(
        sum(d[i][j] < r_real[i] for i in range(30) for j in range(40)) / (k * 40)
    )
    assert found["coverage"] == pytest.approx(np.mean([min(d[i]) < r_real[i] for i in range(30)]))


def test_prdc_in_rows_is_that_of_the_whole_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    real, fake = torch.randn(90, 3, generator=g), 0.8 * torch.randn(70, 3, generator=g) + 0.5
    whole = distribution.prdc(real, fake)
    monkeypatch.setattr(distribution, "ROWS", 8)
    with Largest() as largest:
        assert distribution.prdc(real, fake) == whole
    assert largest.elements <= 8 * 90


def test_frechet_distance_is_the_formula() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(300, 5, generator=g), 1.5 * torch.randn(200, 5, generator=g) + 0.3
    ca, cb = np.cov(a.numpy().T), np.cov(b.numpy().T)
    gap = a.mean(0).numpy() - b.mean(0).numpy()
    expected = gap @ gap + np.trace(ca + cb - 2 * linalg.sqrtm(ca @ cb).real)
    assert distribution.frechet_distance(a, b) == pytest.approx(expected, rel=1e-4)


def test_kernel_distance_is_about_zero_for_one_distribution_and_not_for_two() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(300, 5, generator=g), torch.randn(300, 5, generator=g)
    before = torch.get_rng_state()
    same, other = distribution.kernel_distance(a, b), distribution.kernel_distance(a, b + 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert abs(same["mean"]) < 0.1 * other["mean"]
    assert distribution.kernel_distance(a, b) == same


def test_a_collapsed_set_is_faithful_but_not_diverse() -> None:
    g = torch.Generator().manual_seed(0)
    real, labels = torch.randn(60, 4, generator=g), torch.arange(60) % 3
    collapsed = real[:6].repeat(10, 1) + 0.01 * torch.randn(60, 4, generator=g)
    found = distribution.compare(real, labels, collapsed, labels, "test")
    whole = distribution.compare(real, labels, real + 0.01, labels, "test")
    assert found["precision"] > 0.9
    assert found["coverage"] < 0.5 < whole["coverage"]
    assert found["recall"] < 0.5 < whole["recall"]
    assert (found["n_real"], found["n_synthetic"], found["extractor"]) == (60, 60, "test")


def test_a_larger_set_is_looked_at_as_if_it_were_as_small_as_the_others() -> None:
    """Eighteen times as many draws of one distribution cover it better for their number alone."""
    g = torch.Generator().manual_seed(0)
    real, labels = torch.randn(90, 8, generator=g), torch.arange(90) % 3
    few, many = torch.randn(20, 8, generator=g), torch.randn(360, 8, generator=g)
    small, cut, whole = (
        distribution.compare(real, labels, x, torch.arange(len(x)) % 3, "test", count)
        for x, count in ((few, 20), (many, 20), (many, None))
    )
    assert [found["n_synthetic"] for found in (small, cut, whole)] == [20, 20, 360]
    assert whole["coverage"] > small["coverage"] + 0.2
    assert cut["coverage"] == pytest.approx(small["coverage"], abs=0.15)
    assert cut["fid"] == pytest.approx(small["fid"], rel=0.4)
    uneven = torch.tensor([0] * 50 + [1] * 10 + [2] * 4)
    at = distribution.some_of_each(uneven, 32, seed=0)
    assert len(at.unique()) == 32 and torch.bincount(uneven[at]).tolist() == [25, 5, 2]


def test_diversity_is_that_of_the_whole_set() -> None:
    """Beside a set of one image a class no class of a draw would have two."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 8, generator=g), torch.arange(60) % 10
    alone, beside = (distribution.compare(x, y, x, y, "test", count) for count in (None, 10))
    assert beside["diversity"] == alone["diversity"] == pytest.approx(1)
    assert distribution.compare(x, y, x[:10], y[:10], "test")["diversity"] is None


def test_p_values_are_corrected_for_their_number() -> None:
    assert metrics.holm([0.01, None, 0.04, 0.03]) == [pytest.approx(0.03), None,
                                                      pytest.approx(0.06), pytest.approx(0.06)]  # fmt: skip
    assert metrics.holm([0.5, 0.9]) == [1.0, 1.0] and metrics.holm([]) == []
