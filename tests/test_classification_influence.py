"""Influence against autograd, and against what really happens when a sample is added."""

from __future__ import annotations

import subprocess
import sys
import weakref
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr

from utilgen_cli.classification import influence as inf


def problem(
    n: int = 60, d: int = 4, c: int = 3, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % c
    return torch.randn(n, d, generator=g) + 2 * F.one_hot(y, d).float(), y


def fit(h: torch.Tensor, y: torch.Tensor, w: torch.Tensor, decay: float = 0.1) -> torch.Tensor:
    """The head [C, D+1] that minimises sum(w L) / len(w) + decay / 2 |V|²."""
    v = torch.zeros(3, h.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [v], max_iter=300, tolerance_grad=1e-12, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        losses = F.cross_entropy(h @ v.T, y, reduction="none")
        total = (w * losses).sum() / len(w) + decay / 2 * v.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    return v.detach()


def test_the_gradient_of_a_loss_is_the_residual_times_the_features() -> None:
    x, y = problem(1)
    h = inf.with_bias(x)
    v = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    [expected] = torch.autograd.grad(F.cross_entropy(h @ v.T, y), v)
    r = inf.residuals((h @ v.detach().T).softmax(1), y)
    torch.testing.assert_close(r.T @ h, expected)


def test_the_solved_hessian_is_autograds() -> None:
    x, y = problem()
    h = inf.with_bias(x)
    v = 0.3 * torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    full = torch.autograd.functional.hessian(
        lambda w: F.cross_entropy(h @ w.view(3, 5).T, y), v.flatten()
    )
    p = (h @ v.T).softmax(1)
    target = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    damp = 0.1 * full.diagonal().mean()
    expected = torch.linalg.solve(full + damp * torch.eye(15), target.flatten()).view(3, 5)
    torch.testing.assert_close(inf.solve_hessian(h, p, target, 0.1), expected, rtol=1e-6, atol=1e-8)


def test_influence_ranks_samples_as_adding_them_does() -> None:
    x, y = problem()
    xv, yv = problem(90, seed=1)
    candidates, labels = problem(24, seed=2)
    labels[::3] = (labels[::3] + 1) % 3  # a third is mislabelled
    h, hv, hc = (inf.with_bias(t) for t in (x, xv, candidates))
    decay = 0.1
    base = fit(h, y, torch.ones(60, dtype=torch.float64), decay)
    p = (h @ base.T).softmax(1)
    gradient = inf.residuals((hv @ base.T).softmax(1), yv).T @ hv / 90
    diagonal = float((p * (1 - p)).sum(1).dot(h.square().sum(1)) / (60 * 15))
    s = inf.solve_hessian(h, p, gradient, decay / diagonal)
    predicted = inf.of_labels(inf.influence_parts(candidates, hc @ base.T, s), labels)
    before = F.cross_entropy(hv @ base.T, yv)
    drops = []
    for i in range(24):  # really add the sample, with a small weight
        both = torch.cat([h, hc[i : i + 1]]), torch.cat([y, labels[i : i + 1]])
        w = torch.cat([torch.ones(60), torch.tensor([0.01])]).double() * 61 / 60
        drops.append((before - F.cross_entropy(hv @ fit(*both, w, decay).T, yv)).item())
    assert spearmanr(predicted.numpy(), drops).statistic > 0.98
    assert ((predicted > 0).tolist()) == [d > 0 for d in drops]


def test_the_share_tells_good_labels_from_shuffled_ones() -> None:
    x, y = problem(120)
    xv, yv = problem(60, seed=1)
    head = fit(inf.with_bias(x), y, torch.ones(120, dtype=torch.float64))

    def logits(t: torch.Tensor) -> torch.Tensor:
        return inf.with_bias(t) @ head.T

    s = inf.direction((x, logits(x)), (xv, logits(xv), yv))
    xs, ys = problem(90, seed=3)
    parts = inf.influence_parts(xs, logits(xs), s)
    found = inf.positive_share(parts, ys, shuffles=50)
    assert found["low"] <= found["share"] <= found["high"]
    assert found["low"] > found["null"]["high"]
    shuffled = ys[torch.randperm(90, generator=torch.Generator().manual_seed(0))]
    null = inf.positive_share(parts, shuffled, shuffles=50)
    assert null["null"]["low"] <= null["share"] <= null["null"]["high"]


def test_means_over_models_are_those_of_the_stack_and_hold_few_models_at_once() -> None:
    living: list[weakref.ref[torch.Tensor]] = []

    def models() -> Iterator[tuple[torch.Tensor, ...]]:
        for seed in range(7):
            assert sum(x() is not None for x in living) <= 2
            parts = drawn(seed)
            living.extend(map(weakref.ref, parts[:1]))
            yield parts

    def drawn(seed: int) -> tuple[torch.Tensor, ...]:
        g = torch.Generator().manual_seed(seed)
        return tuple(torch.randn(*n, generator=g, dtype=torch.float64) for n in ((5, 3), (5,)))

    whole = [torch.stack(parts).mean(0) for parts in zip(*map(drawn, range(7)), strict=True)]
    torch.testing.assert_close(list(inf.mean_over(models())), whole, rtol=1e-14, atol=1e-15)


def test_the_temperature_of_many_classes_takes_little_memory() -> None:
    code = """if True:
        import resource, torch
        from utilgen_cli.classification.influence import temperature
        z, y = torch.randn(600, 600), torch.arange(600)
        temperature(z[:9], y[:9])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        temperature(z, y)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert int(done.stdout) < 100_000  # KiB; 201 copies of the logits are 580,000


def test_the_temperature_undoes_overconfidence() -> None:
    x, y = problem(200)
    logits = 5 * x[:, :3].double()
    t = inf.temperature(logits, y)
    assert abs(inf.temperature(7 * logits, y) / (7 * t) - 1) < 0.03
    best = F.cross_entropy(logits / t, y)
    assert best <= F.cross_entropy(logits / (1.1 * t), y)
    assert best <= F.cross_entropy(logits / (0.9 * t), y)


def test_a_head_that_is_always_right_is_not_sharpened() -> None:
    y = torch.arange(30) % 3
    assert inf.temperature(F.one_hot(y, 3).double(), y) == 1


def test_the_bootstrap_interval_is_about_the_binomial_one() -> None:
    import numpy as np

    low, high = inf.bootstrap_share(np.arange(400) < 100)
    assert abs(low - (0.25 - 1.96 * (0.25 * 0.75 / 400) ** 0.5)) < 0.01
    assert abs(high - (0.25 + 1.96 * (0.25 * 0.75 / 400) ** 0.5)) < 0.01
