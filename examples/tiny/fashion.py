"""Fashion-MNIST as the tiny test bed sees it: its files, its classes, its splits.

The 60,000 training images are split once (seed 0, stratified): 50,000 pre-train the bundle,
*shifted*; the other 10,000 hold the few shots and the validation images, unshifted. The 10,000
official test images are only ever tested on.
"""

from __future__ import annotations

import gzip
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

SOURCE = Path(os.environ.get("FASHION", "/usr/share/datasets/fashion-mnist"))
SIZE = 32  # 28 x 28 images, padded by two black pixels a side

CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
COARSE = ("top", "bottoms", "top", "garment", "top", "shoe", "top", "shoe", "accessory", "shoe")


def read_idx(path: Path) -> np.ndarray:
    """Read one gzipped IDX file into a uint8 array."""
    with gzip.open(path) as f:
        data = f.read()
    rank = data[3]
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(rank)]
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def load(part: str, source: Path = SOURCE) -> tuple[torch.Tensor, torch.Tensor]:
    """Images uint8 [N, 32, 32] (padded) and labels int64 [N] of `train` or `t10k`."""
    if not source.is_dir():
        sys.exit(f"{source} is not there: apt install dataset-fashion-mnist, or set FASHION=DIR to "
                 "a directory with its four .gz files")  # fmt: skip
    images = torch.from_numpy(read_idx(source / f"{part}-images-idx3-ubyte.gz").copy())
    labels = torch.from_numpy(read_idx(source / f"{part}-labels-idx1-ubyte.gz").astype(np.int64))
    return F.pad(images, (2, 2, 2, 2)), labels


def split(labels: torch.Tensor, n_pretrain: int = 50_000) -> tuple[torch.Tensor, torch.Tensor]:
    """Stratified, seeded split of the training set into (pre-training, task) indices."""
    generator = torch.Generator().manual_seed(0)
    pretrain, task = [], []
    for c in range(len(CLASSES)):
        index = torch.nonzero(labels == c).flatten()
        index = index[torch.randperm(len(index), generator=generator)]
        cut = n_pretrain // len(CLASSES)
        pretrain.append(index[:cut])
        task.append(index[cut:])
    return torch.cat(pretrain), torch.cat(task)
