"""Noise finding and removal: 2,000 images, some labels wrong, beside 16 + 16 clean shots a class."""

from __future__ import annotations

import numpy as np
import torch

from utilgen_cli.classification.data import LabelledImages
from utilgen_cli.classification.train import extract_features
from utilgen_cli.valuation.canary import auroc
from utilgen_cli.valuation.select import pick_diverse, shares

from ..store import Run, Store, spread, table
from .sides import all_sides
from .world import accuracy, corrupt, make_world, retrained

KINDS = ("uniform 20 %", "uniform 40 %", "pairs 20 %")
REMOVED_FROM = KINDS[0]
DROPPED = (20, 40)  # %
STEPS = 200


def find_noise(kind: str, seed: int) -> Run:
    """AUROC of right over wrong labels, CPU seconds and values of every side."""
    world = make_world(seed)
    pool, wrong = corrupt(world.pool, kind, seed)
    found, model = all_sides(world, pool, seed)
    values = {name: torch.tensor(v) for name, (v, _) in found.items()}
    run: Run = {
        "auroc": {name: auroc(v[~wrong], v[wrong]) for name, v in values.items()},
        "seconds": {name: seconds for name, (_, seconds) in found.items()},
    }
    if kind == REMOVED_FROM:
        run["values"] = {n: [float(f"{x:.6g}") for x in v.tolist()] for n, v in values.items()}
        features = extract_features(model.classifiers[0], pool.images)
        run["selected"] = selected(pool, values["utilgen weight-net"], features)
    return run


def selected(
    pool: LabelledImages, utility: torch.Tensor, features: torch.Tensor
) -> dict[str, list[int]]:
    """What `value score --select` keeps, by the percentage dropped."""
    unit = torch.nn.functional.normalize(features, dim=1)
    at = [torch.nonzero(pool.labels == c)[:, 0] for c in range(len(pool.classes))]
    kept = {}
    for share in DROPPED:
        count = round(len(pool) * (100 - share) / 100)
        portions = shares(count, [len(a) for a in at])
        picks = [a[pick_diverse(utility[a], unit[a], n)] for a, n in zip(at, portions, strict=True)]
        kept[str(share)] = sorted(torch.cat(picks).tolist())
    return kept


def noise_run(store: Store, kind: str, seed: int) -> Run:
    return store.get(f"{kind} seed {seed}", lambda: find_noise(kind, seed))


def noise_table(stores: dict[str, Store], seeds: int) -> str:
    """The table of noise finding."""
    runs = {k: [noise_run(stores["noise"], k, s) for s in range(seeds)] for k in KINDS}
    rows = []
    for name in runs[KINDS[0]][0]["auroc"]:
        cells = [spread([run["auroc"][name] for run in runs[kind]]) for kind in KINDS]
        seconds = [run["seconds"][name] for kind in KINDS for run in runs[kind]]
        rows.append([name, *cells, spread(seconds, 1)])
    return table(["side", *KINDS, "CPU seconds"], rows)


def drop_and_retrain(run: Run, seed: int) -> Run:
    """Test accuracy after dropping each side's lowest, by percentage."""
    world = make_world(seed)
    pool, _ = corrupt(world.pool, REMOVED_FROM, seed)
    orders = {name: np.argsort(values) for name, values in run["values"].items()}
    orders["at random"] = np.random.default_rng(seed).permutation(len(pool))
    found: Run = {"nothing dropped": {"0": after(world.test, pool, seed)}}
    for name, order in orders.items():
        cuts = {str(share): order[len(pool) * share // 100 :] for share in DROPPED}
        found[name] = {s: after(world.test, pool.subset(np.sort(k)), seed) for s, k in cuts.items()}
    found["utilgen --select"] = {
        s: after(world.test, pool.subset(kept), seed) for s, kept in run["selected"].items()
    }
    return found


def after(test: LabelledImages, kept: LabelledImages, seed: int) -> float:
    """Test accuracy, %, of a classifier trained on what was kept; all start alike."""
    return 100 * accuracy(retrained(kept, 100 * seed, STEPS), test)


def removal_table(stores: dict[str, Store], seeds: int) -> str:
    """The table of removal."""
    runs = []
    for seed in range(seeds):
        values = noise_run(stores["noise"], REMOVED_FROM, seed)
        runs.append(
            stores["removal"].get(f"seed {seed}", lambda v=values, s=seed: drop_and_retrain(v, s))
        )
    rows = []
    for name in runs[0]:
        cells = [
            spread([run[name][s] for run in runs], 2) if s in runs[0][name] else ""
            for s in ("0", *map(str, DROPPED))
        ]
        rows.append([name, *cells])
    return table(["dropped by", *(f"{s} % dropped" for s in (0, *DROPPED))], rows)
