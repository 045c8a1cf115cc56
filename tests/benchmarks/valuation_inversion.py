"""Does the weight network ever point the wrong way? Ours beside the literal method, in the same runs.

A run: 16 real shots a class, a pool of candidates of several kinds, both methods trained on them,
and *unseen* candidates of the same kinds scored. A run is inverted when garbage (wrong labels, noise,
heavy blur) scores above right-label images (AUROC below .5). The literal method: one classifier,
weights not normalised, W from its usual random start, in-sample losses, the last step's W.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utilgen_cli.classification.data import LabelledImages, augment, to_float
from utilgen_cli.classification.models import build_classifier
from utilgen_cli.classification.train import learning_rate, make_optimizer
from utilgen_cli.valuation.bilevel import inner_step, meta_gradient_jvp, take_step
from utilgen_cli.valuation.canary import auroc
from utilgen_cli.valuation.todv import ValueConfig, draw
from utilgen_cli.valuation.training import ValueData, train_values

from .harness import record
from .store import Enough, Store, table

sys.path.append(str(Path(__file__).parents[2] / "examples" / "tiny"))
SIZE, SHOTS, POOL, UNSEEN = 16, 16, 300, 300
CONFIG = ValueConfig(steps=150, snapshots=3, refresh=15)
GARBAGE = ("wrong", "noise", "blur")
MIXES = {  # shares of a pool
    "right 60, wrong 40": {"right": 0.6, "wrong": 0.4},
    "right 30, wrong 30, noise 20, blur 20": {"right": 0.3, "wrong": 0.3, "noise": 0.2, "blur": 0.2},
    "copies 40, right 30, wrong 30": {"copy": 0.4, "right": 0.3, "wrong": 0.3},
    "easy 30, hard 30, noise 40": {"easy": 0.3, "hard": 0.3, "noise": 0.4},
    "copies 30, blur 40, right 30": {"copy": 0.3, "blur": 0.4, "right": 0.3},
}  # fmt: skip


def world(seed: int) -> tuple[list[LabelledImages], Tensor, Tensor]:
    """Real and validation shots, and 6,000 other images with their labels."""
    from fashion import CLASSES, load

    images, labels = load("train")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:8000]
    small = F.avg_pool2d(images[order][:, None].float(), 2).round().to(torch.uint8)
    x, y = small.expand(-1, 3, -1, -1).contiguous(), labels[order]
    at = torch.stack([torch.nonzero(y == c)[: 2 * SHOTS, 0] for c in range(10)])
    sets = []
    for part in (at[:, :SHOTS].flatten(), at[:, SHOTS:].flatten()):
        keys = [str(i) for i in part.tolist()]
        sets.append(LabelledImages(x[part], y[part], keys, list(CLASSES)))
    return sets, x[2000:], y[2000:]


def candidates(
    mix: dict[str, float], n: int, x: Tensor, y: Tensor, real: LabelledImages, seed: int
) -> tuple[LabelledImages, list[str]]:
    """n candidates, and the kind of each."""
    generator = torch.Generator().manual_seed(seed)
    images, labels, kinds = [], [], []
    for kind, share in mix.items():
        m = round(share * n)
        at = torch.randint(len(y), (m,), generator=generator)
        found, label = x[at].clone(), y[at].clone()
        if kind == "wrong":
            label = (label + torch.randint(1, 10, (m,), generator=generator)) % 10
        elif kind == "noise":
            found = torch.randint(0, 256, found.shape, generator=generator).to(torch.uint8)
        elif kind == "blur":
            found = F.avg_pool2d(found.float(), 9, 1, 4).to(torch.uint8)
        elif kind == "copy":
            pick = torch.randint(len(real), (m,), generator=generator)
            found, label = real.images[pick].clone(), real.labels[pick].clone()
        elif kind == "hard":
            found = (0.6 * found + 0.4 * found[torch.randperm(m, generator=generator)]).to(
                torch.uint8
            )
        images.append(found), labels.append(label)
        kinds += [kind] * m
    keys = [str(i) for i in range(len(kinds))]
    return LabelledImages(torch.cat(images), torch.cat(labels), keys, real.classes), kinds


class LiteralNet(nn.Module):
    """W as published, with PyTorch's own initialisation."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, 100), nn.ReLU(), nn.Linear(100, 1), nn.Sigmoid())

    def forward(self, losses: Tensor) -> Tensor:
        return self.layers(losses[:, None])[:, 0]


def literal(data: ValueData, seed: int) -> tuple[nn.Module, nn.Module]:
    """(classifier, W) after the literal loop of as many steps as one of our classifiers gets."""
    torch.manual_seed(seed)
    model = build_classifier("small-cnn", 10, SIZE, seed=seed).train()
    net = LiteralNet()
    inner = CONFIG.inner()
    optimizer, phi = make_optimizer(model, inner), torch.optim.Adam(net.parameters(), lr=1e-3)
    images = torch.cat([data.real.images, data.synthetic.images])
    labels = torch.cat([data.real.labels, data.synthetic.labels])
    generator = torch.Generator().manual_seed(seed)
    for step in range(CONFIG.steps):
        at = draw(torch.arange(len(labels)), CONFIG.batch_size, generator)
        val = draw(torch.arange(len(data.validation)), CONFIG.batch_size, generator)
        batch, outer = (
            (augment(to_float(x), generator), y)
            for x, y in (
                (images[at], labels[at]),
                (data.validation.images[val], data.validation.labels[val]),
            )
        )
        meta = meta_gradient_jvp(model, net, batch, outer, CONFIG.eta, normalise=mean)
        for p, g in zip(net.parameters(), meta.phi_gradient, strict=True):
            p.grad = g
        phi.step()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, inner)
        # As published (Shu et al. 2019, equation 5) theta takes its step under the new W.
        take_step(model, optimizer, inner_step(model, net, batch, normalise=mean))
    return model.eval(), net


def mean(w: Tensor) -> Tensor:
    """w_i / n: weights as published, not normalised."""
    return w / len(w)


def one_run(mix: dict[str, float], seed: int) -> dict[str, float]:
    """AUROC of right-label images over garbage among unseen candidates, for both methods."""
    (real, validation), x, y = world(seed)
    pool, _ = candidates(mix, POOL, x[:3000], y[:3000], real, seed)
    unseen, kinds = candidates(mix, UNSEEN, x[3000:], y[3000:], real, seed + 1)
    garbage = torch.tensor([kind in GARBAGE for kind in kinds])
    data = ValueData(real, pool, validation)
    with tempfile.TemporaryDirectory() as directory:
        value = train_values(data, replace(CONFIG), Path(directory), seed=seed)
    ours = value.judge_pixels(unseen.images, unseen.labels).logit
    model, net = literal(data, seed)
    with torch.no_grad():
        losses = F.cross_entropy(model(to_float(unseen.images)), unseen.labels, reduction="none")
        theirs = net(losses)
    return {
        "ours": auroc(ours[~garbage], ours[garbage]),
        "literal": auroc(theirs[~garbage], theirs[garbage]),
        "canary": value.facts["canary"]["auroc"],
    }


def main(arguments: Sequence[str] = ()) -> None:
    """Every mix under every seed."""
    parser = argparse.ArgumentParser("python -m tests.benchmarks valuation_inversion")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--store", type=Path, default=Path("build/valuation"))
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds of work")
    options = parser.parse_args(list(arguments))
    torch.set_num_threads(1)
    store, seeds = Store(options.store, "inversion", options.limit), options.seeds
    try:
        rows = [row(store, name, mix, seeds) for name, mix in MIXES.items()]
    except Enough as reason:
        sys.exit(f"not finished: {reason}")
    head = ["pool, %", "ours: mean, least, inverted", "literal: mean, least, inverted", "canary"]
    title = f"Never inverted: {seeds * len(MIXES)} runs, AUROC of right over garbage, unseen"
    command = f"`python -m tests.benchmarks valuation_inversion --seeds {seeds}`"
    record(title, f"{command}\n\n{table(head, rows)}")


def row(store: Store, name: str, mix: dict[str, float], seeds: int) -> list[str]:
    """One mix under every seed."""
    runs = [
        store.get(f"{name} seed {seed}", lambda seed=seed: one_run(mix, seed))
        for seed in range(seeds)
    ]
    cells = [name]
    for side in ("ours", "literal"):
        found = [run[side] for run in runs]
        wrong = sum(x < 0.5 for x in found)
        cells.append(f"{statistics.fmean(found):.3f}, {min(found):.3f}, {wrong}/{seeds}")
    return [*cells, f"{statistics.fmean(run['canary'] for run in runs):.3f}"]


if __name__ == "__main__":
    main(sys.argv[1:])
