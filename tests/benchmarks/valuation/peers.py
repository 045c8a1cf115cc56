"""pyDVL, cleanlab and dattri as installed, in their own environment: `peers.py METHOD IN.npz OUT.npz`.

pyDVL 0.10 needs numpy < 2, so this runs under another Python than the rest:

    python -m venv peers
    peers/bin/pip install 'pyDVL==0.10.*' 'numpy<2' cleanlab dattri torch

IN holds the arrays that a method's function names, as JOB/NAME for one or more jobs; OUT gets the
values of each JOB and the CPU `seconds` of all.
"""

from __future__ import annotations

import importlib
import sys
import time
import warnings

import numpy as np

warnings.filterwarnings("ignore")
TREES = 200
LIBRARIES = {
    "knn-shapley": ("pydvl.valuation", "sklearn.neighbors"),
    "data-oob": ("pydvl.valuation", "sklearn.ensemble"),
    "cleanlab": ("cleanlab.rank",),
    "trak": ("torch", "dattri.algorithm.trak"),
}


def knn_shapley(x, y, val_x, val_y, **_):
    """pyDVL: exact KNN-Shapley of 10 neighbours on the validation set. [N]"""
    from pydvl.valuation import Dataset, KNNShapleyValuation
    from sklearn.neighbors import KNeighborsClassifier

    def dataset(x, y):
        return Dataset(x, y)

    method = KNNShapleyValuation(
        KNeighborsClassifier(n_neighbors=10), dataset(val_x, val_y), progress=False
    )
    method.fit(dataset(x, y))
    return np.asarray(method.result.values)


def data_oob(x, y, seed=0, **_):
    """pyDVL: accuracy out of bag in a random forest. [N]"""
    from pydvl.valuation import DataOOBValuation, Dataset
    from sklearn.ensemble import RandomForestClassifier

    forest = RandomForestClassifier(TREES, max_samples=1.0, random_state=int(seed), n_jobs=1)
    forest.fit(x, y)
    method = DataOOBValuation(forest)
    method.fit(Dataset(x, y))
    return np.asarray(method.result.values)


def cleanlab(y, probabilities, **_):
    """cleanlab: label quality from out-of-sample probabilities [N, C]. [N]"""
    from cleanlab.rank import get_label_quality_scores

    return get_label_quality_scores(y.astype(int), probabilities)


def trak(x, y, val_x, val_y, **weights):
    """dattri: TRAK (projected to 512) of each image [N, 3, S, S] on the mean test loss. [N]

    `weights` are the state dicts of networks like `narrow_cnn`, as NUMBER:NAME.
    """
    import torch
    from dattri.algorithm.trak import TRAKAttributor
    from dattri.task import AttributionTask
    from torch.utils.data import DataLoader, TensorDataset

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = narrow_cnn(torch).eval()

    def loss(params, data):
        logits = torch.func.functional_call(model, params, (data[0].unsqueeze(0),))
        return torch.nn.functional.cross_entropy(logits, data[1].unsqueeze(0))

    def margin(params, data):
        p = torch.exp(-loss(params, data))
        return torch.log(p.clamp(1e-6, 1 - 1e-6) / (1 - p).clamp(1e-6, 1))

    def correct(params, data):
        return torch.exp(-loss(params, data))

    # TRAK takes the gradients of the margin on both sides (Park et al. 2023, section 3).
    task = AttributionTask(loss_func=margin, model=model, checkpoints=states(torch, weights))

    def loader(x, y):
        return DataLoader(TensorDataset(torch.tensor(x), torch.tensor(y)), batch_size=64)

    attributor = TRAKAttributor(
        task, correct, projector_kwargs={"proj_dim": 512, "device": "cpu"}, regularization=1e-3
    )
    attributor.cache(loader(x, y))
    return attributor.attribute(loader(val_x, val_y)).mean(1).numpy()


def states(torch, weights):
    """The state dicts in `weights`."""
    found: dict[str, dict] = {}
    for key, array in weights.items():
        if ":" in key:
            number, name = key.split(":")
            found.setdefault(number, {})[name] = torch.tensor(array)
    return list(found.values())


def narrow_cnn(torch, widths=(8, 16, 32), classes=10):
    """The small CNN at a quarter of its width; retraining it hundreds of times takes minutes."""
    blocks = [
        torch.nn.Sequential(
            torch.nn.Conv2d(a, b, 4, 2, 1, bias=False), torch.nn.BatchNorm2d(b), torch.nn.ReLU()
        )
        for a, b in zip((3, *widths), widths)  # noqa: B905
    ]
    head = [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()]
    return torch.nn.Sequential(*blocks, *head, torch.nn.Linear(widths[-1], classes))


def main() -> None:
    method, source, target = sys.argv[1:]
    jobs: dict[str, dict] = {}
    with np.load(source) as arrays:
        for key, array in arrays.items():
            job, _, name = key.partition("/")
            jobs.setdefault(job, {})[name] = array
    call = {"knn-shapley": knn_shapley, "data-oob": data_oob, "cleanlab": cleanlab, "trak": trak}
    for name in LIBRARIES[method]:
        importlib.import_module(name)  # importing is not counted
    start = time.process_time()
    values = {job: call[method](**given) for job, given in jobs.items()}
    np.savez(target, **values, seconds=time.process_time() - start)


if __name__ == "__main__":
    main()
