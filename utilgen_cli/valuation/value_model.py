"""A trained value model: classifiers and weight networks along the trajectory, averaged.

On disk: value.json, and a directory a snapshot with plain safetensors; nothing needs utilgen to be
read. A tower that is never trained lies in the first classifier of the first snapshot. Utility and
logit are differentiable with respect to the images.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..classification.data import to_float
from ..classification.models import Classifier, load_classifier
from ..runtime.device import sent
from ..runtime.errors import BadInput, NoInput, UtilgenError
from .canary import verdict
from .pool import pixel_hash
from .weight_net import WeightNet

FORMAT = 1
VALUE_JSON = "value.json"
REFERENCE = "reference.safetensors"


@dataclass
class Judgement:
    """What the members say of B labelled images, averaged over those that may speak."""

    logit: Tensor  # [B]
    loss: Tensor  # [B]
    probabilities: Tensor  # [B, C]
    spread: Tensor  # [B], standard deviation over members of the label's probability
    influence: Tensor  # [B], minus the self-influence of TracIn in the last layer
    features: Tensor  # [B, D], of the reference classifier, unit length

    @property
    def utility(self) -> Tensor:
        """In [0, 1], [B]."""
        return torch.sigmoid(self.logit)


class Snapshot(nn.Module):
    """(theta_1 ... theta_K, phi) at one point of the trajectory."""

    def __init__(self, classifiers: Sequence[Classifier], weight_net: WeightNet) -> None:
        super().__init__()
        self.classifiers = nn.ModuleList(classifiers)
        self.weight_net = weight_net


class ValueModel(nn.Module):
    """Judges labelled images (`judge`, `judge_pixels`); see `load_value`."""

    def __init__(
        self,
        snapshots: Sequence[Snapshot],
        facts: dict[str, Any],
        reference: dict[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.snapshots = nn.ModuleList(snapshots)
        self.facts = facts
        self.classes: list[str] = facts["classes"]
        self.reference = reference or {}
        known = (self.reference.get(n, torch.empty(0)).tolist() for n in ("hash", "fold"))
        self._known: dict[int, int] = dict(zip(*known, strict=True))
        self.eval().requires_grad_(False)

    @property
    def unnamed(self) -> frozenset[int]:
        """The classes whose name nobody told: they stand in `classes` by their number."""
        return frozenset(self.facts.get("unnamed", ()))

    @property
    def size(self) -> int:
        """The side of the images that the classifiers see."""
        return int(self.facts["transform"]["size"])

    @property
    def folds(self) -> int:
        return len(cast(Snapshot, self.snapshots[0]).classifiers)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def classifiers(self) -> list[Classifier]:
        """The classifiers at the end of the trajectory, one a fold."""
        return list(cast(Any, self.snapshots[-1]).classifiers)

    def only(self, folds: Sequence[int]) -> ValueModel:
        """The same model with some of its classifiers: the others can judge what these drew."""
        snapshots = [
            Snapshot([s.classifiers[k] for k in folds], s.weight_net)
            for s in cast(Any, self.snapshots)
        ]
        return ValueModel(snapshots, self.facts)

    def held_out_folds(self, images_u8: Tensor) -> Tensor:
        """The fold of each known image (uint8, at `size`), -1 for images not trained on. [B]"""
        if not self._known:
            return torch.full((len(images_u8),), -1)
        return torch.tensor([self._known.get(h, -1) for h in pixel_hash(images_u8)])

    def judge(
        self,
        images_bchw: Tensor,
        labels: Tensor,
        folds: Tensor | None = None,
        passes: int | None = None,
    ) -> Judgement:
        """Ask the members that may speak: all, or for `folds` [B] >= 0 that fold's alone.

        With `passes` only so many of them: the end of the trajectory first.
        """
        n = len(images_bchw)
        votes = _Votes(n, len(self.classes), next(self.parameters()))
        shared = self._shared_features(images_bchw) if n else None  # no tower takes no image
        left = torch.full((n,), passes or len(self.snapshots) * self.folds)
        for s in reversed(range(len(self.snapshots))):
            snapshot = cast(Snapshot, self.snapshots[s])
            for k, classifier in enumerate(cast(list[Classifier], snapshot.classifiers)):
                keeps_features = k == 0 and s == len(self.snapshots) - 1
                may = self._may_speak(k, n, folds) & (left > 0)
                seen = torch.ones_like(may) if keeps_features else may
                if not bool(seen.any()):
                    continue
                if shared is None:
                    features = _features(classifier, _where(seen, images_bchw))
                else:
                    features = _where(seen, shared)
                if keeps_features:
                    votes.features = F.normalize(features, dim=1)
                    features = _where(may, features)
                if bool(may.any()):
                    at = sent(torch.nonzero(may)[:, 0], features.device)
                    votes.add(at, classifier, snapshot.weight_net, features, labels)
                    left -= may.long()
        return votes.result()

    def _shared_features(self, images_bchw: Tensor) -> Tensor | None:
        """The features of all members where they have one tower."""
        first, *others = (c for s in cast(Any, self.snapshots) for c in s.classifiers)
        same = others and all(c.tower is first.tower for c in others)
        return _features(first, images_bchw) if same else None

    def _may_speak(self, fold: int, n: int, folds: Tensor | None) -> Tensor:
        if folds is None or self.folds == 1:
            return torch.ones(n, dtype=torch.bool)
        return (folds == fold) | (folds < 0)

    @torch.no_grad()
    def judge_pixels(
        self, images_u8: Tensor, labels: Tensor, batch_size: int = 256, passes: int | None = None
    ) -> Judgement:
        """Held-out judgements of uint8 images: no classifier judges what it trained on."""
        parts = [
            self.judge(
                to_float(x.to(self.device)), y.to(self.device), self.held_out_folds(x), passes
            )
            for x, y in zip(images_u8.split(batch_size), labels.split(batch_size), strict=True)
        ]
        return Judgement(*(torch.cat([getattr(p, f) for p in parts]) for f in _FIELDS))

    def warning(self) -> str | None:
        """What to tell the user about the canary, or None."""
        found = self.facts["canary"]["auroc"]
        if verdict(found) != "weak":
            return None
        return (
            f"the value model tells wrong labels apart with AUROC {found:.2f} only; "
            "more real images or another --arch would help"
        )


def _where(mask: Tensor, x: Tensor) -> Tensor:
    """x[mask], for a mask on the CPU: x itself where that is all of it, and no host waits."""
    return x if bool(mask.all()) else x[sent(mask.nonzero()[:, 0], x.device)]


def _features(classifier: Classifier, images_bchw: Tensor) -> Tensor:
    """Features [B, D]. For a gradient they are computed twice, so that of all members the graph of
    one is held at a time: twelve ResNet-50 at 224 px would keep a gigabyte an image."""
    if torch.is_grad_enabled() and images_bchw.requires_grad:
        return checkpoint(  # type: ignore[no-any-return]
            classifier.features, images_bchw, use_reentrant=False, preserve_rng_state=False
        )
    return classifier.features(images_bchw)


_FIELDS = ("logit", "loss", "probabilities", "spread", "influence", "features")


class _Votes:
    """Sums over members, each for the samples that it may speak for."""

    def __init__(self, n: int, num_classes: int, like: Tensor) -> None:
        def zeros(*shape: int) -> Tensor:
            return like.new_zeros(n, *shape)

        self.count, self.logit, self.loss = zeros(), zeros(), zeros()
        self.p, self.p_squared, self.influence = zeros(num_classes), zeros(), zeros()
        self.own = zeros()
        self.features = torch.empty(0)

    def add(
        self, at: Tensor, classifier: Classifier, net: WeightNet, features: Tensor,
        labels: Tensor,
    ) -> None:  # fmt: skip
        y = labels[at]
        logits = classifier.head(features)
        losses = F.cross_entropy(logits, y, reduction="none")
        p = torch.softmax(logits, 1)
        own = p.gather(1, y[:, None])[:, 0]
        self.count = self.count.index_add(0, at, torch.ones_like(losses))
        self.loss = self.loss.index_add(0, at, losses)
        self.logit = self.logit.index_add(0, at, net.logit(losses))
        self.p = self.p.index_add(0, at, p)
        self.own = self.own.index_add(0, at, own)
        self.p_squared = self.p_squared.index_add(0, at, own**2)
        error = p - F.one_hot(y, p.shape[1])  # grad L_i is its outer product with (features, 1)
        squared = error.square().sum(1) * (features.square().sum(1) + 1)
        self.influence = self.influence.index_add(0, at, -squared)

    def result(self) -> Judgement:
        n = self.count
        variance = (self.p_squared / n - (self.own / n) ** 2).clamp_min(0)
        return Judgement(
            self.logit / n, self.loss / n, self.p / n[:, None], variance.detach().sqrt(),
            self.influence / n, self.features,
        )  # fmt: skip


def load_value(
    path: Path | str, device: torch.device | str = "cpu", force: bool = False, advice: str = ""
) -> ValueModel:
    """Read a value model.

    NoInput: no value.json there. BadInput: damaged or of another format. UtilgenError: its canary
    shows that it ranks wrong labels above right ones (`force` takes it all the same; `advice` is
    what a user can do besides training it anew).
    """
    directory = Path(path)
    facts = read_facts(directory)
    if verdict(facts["canary"]["auroc"]) == "inverted" and not force:
        raise UtilgenError(
            str(directory), f"ranks wrong labels above right ones (canary AUROC "
            f"{facts['canary']['auroc']:.2f})",
            f"Train it on more real images, longer, or with another --arch. {advice}",
        )  # fmt: skip
    snapshots = read_snapshots(directory, facts["snapshots"])
    reference = {k: t.to(device) for k, t in _read_tensors(directory / REFERENCE).items()}
    model = ValueModel(snapshots, facts, reference).to(device)
    for name, tensor in {**model.state_dict(), **reference}.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise BadInput(str(directory), f"{name} is not finite", "Train it again.")
    return model


def read_facts(directory: Path) -> dict[str, Any]:
    """What value.json says. NoInput: it is not there. BadInput: not a value model, or damaged."""
    path = directory / VALUE_JSON
    if not path.exists():
        why = "no finished value model there" if directory.exists() else "no such directory"
        raise NoInput(str(directory), why, "Make one with `utilgen value train`.")
    try:
        facts = json.loads(path.read_text())
        written = facts["format"]
    except (ValueError, KeyError, TypeError):
        raise BadInput(str(path), "not a value model", "Train it again.") from None
    if written != FORMAT:
        raise BadInput(str(path), f"format {written}, not {FORMAT}", "Train it again.")
    if not is_sound(facts):
        raise BadInput(str(path), "not a value model", "Train it again.")
    return cast(dict[str, Any], facts)


def is_sound(facts: dict[str, Any]) -> bool:
    """True if what loading needs is there, and no file lies outside of the directory."""
    try:
        files = [n for e in facts["snapshots"] for n in (e["weight_net"], *e["classifiers"])]
        figures = [facts["transform"]["size"], facts["duplicate_distance"]]
        auroc, names = facts["canary"]["auroc"], facts["classes"]
        curve = facts.get("weight_curve", {"loss": [], "weight": []})  # to look at alone
        shown = [*curve["loss"], *curve["weight"]]
        return (
            type(names) is list
            and all(type(name) is str for name in names)
            and bool(files)
            and all(re.fullmatch(r"([\w-]+/)?[\w-]+\.safetensors", n) for n in files)
            and all(type(x) in (int, float) and 0 < x < 1e5 for x in figures)
            and (auroc is None or (type(auroc) in (int, float) and 0 <= auroc <= 1))
            and len(curve["loss"]) == len(curve["weight"])
            and all(type(x) in (int, float) and abs(x) < 1e38 for x in shown)
        )
    except (KeyError, TypeError):
        return False


def read_snapshots(directory: Path, entries: Sequence[dict[str, Any]]) -> list[Snapshot]:
    """Snapshots by their entries in value.json. BadInput: a file holds something else."""
    first: Classifier | None = None
    found = []
    for entry in entries:
        classifiers = []
        for name in entry["classifiers"]:
            classifiers.append(load_classifier(directory / name, first))
            first = first or classifiers[0]
        found.append(Snapshot(classifiers, _read_weight_net(directory / entry["weight_net"])))
    return found


def _read_weight_net(path: Path) -> WeightNet:
    tensors = _read_tensors(path)
    try:
        net = WeightNet(len(tensors["hidden.bias"]))
        net.load_state_dict(tensors)
    except (KeyError, RuntimeError, TypeError):
        why, advice = "not a weight network", "Train the value model again."
        raise BadInput(str(path), why, advice) from None
    return net


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise NoInput(str(path), "missing", "Train the value model again.")
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise BadInput(str(path), f"damaged ({error})", "Train the value model again.") from None
