"""The TODV loop (UtilGen, section 3.1): classifiers theta and the weight network phi, together.

Inner: theta_k on real and synthetic images outside fold k, weighted by W_phi and normalised per
batch. Outer: phi on the loss of theta_k' (one virtual SGD step on) on real images held out from it.
What W sees of an image is its held-out loss, from the classifier of the image's own fold; with one
fold it is the loss in the batch, which is the published method.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..classification.batches import WHOLE_BATCH, augment_batch
from ..classification.data import to_float
from ..classification.models import (
    Classifier,
    build_classifier,
    has_common_tower,
    learnt_state,
    load_learnt,
    save_classifier,
)
from ..classification.train import (
    TrainConfig,
    learning_rate,
    make_optimizer,
    pays_to_keep,
    tower_features,
)
from ..runtime import signals
from ..runtime.checkpoint import (
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
    save_tensors,
    under,
)
from ..runtime.device import sent
from ..runtime.errors import UsageError
from ..runtime.progress import Progress, silent
from ..runtime.seeds import derive_seed, step_generator
from .bilevel import META_GRADIENTS, Batch, InnerStep, inner_step, take_step
from .pool import PLANTED, REAL, SYNTHETIC, VALIDATION, Pool
from .weight_net import WeightNet

MOST_REAL = 0.875  # of a batch where few images, or none, are generated
ROLES = {"real": REAL, "validation": VALIDATION, "synthetic": SYNTHETIC, "planted": PLANTED}


@dataclass(frozen=True)
class ValueConfig:
    """Choices of one `value train`."""

    arch: str = "small-cnn"
    pretrained: bool = False
    steps: int = 400  # steps of each classifier
    batch_size: int = 64
    folds: int = 5  # classifiers; 1 is the published method with in-sample losses
    snapshots: int = 3  # points of the trajectory that are kept: what asks all averages over them
    warmup: float = 0.2  # share of the steps before the held-out losses say anything
    # of a batch, at least: generated images are often wrongly labelled, planted ones always
    real_share: float = 0.75
    lr: float = 4e-3
    eta: float = 0.05  # rate of the virtual SGD step
    weight_lr: float = 1e-3  # Adam rate of W; above it W was seen to turn over
    meta_every: int = 3  # inner steps per outer step
    meta_gradient: str = "jvp"
    canaries: float = 0.05  # planted share
    refresh: int = 20  # steps between looks at the held-out losses
    augment: str = "pad"  # see classification.batches.WHOLE_BATCH

    def __post_init__(self) -> None:
        if self.augment not in WHOLE_BATCH:
            advice = f"Use one of {', '.join(WHOLE_BATCH)}."
            raise UsageError(f"--augment {self.augment}", "unknown", advice)

    def facts(self) -> dict[str, Any]:
        """The configuration as JSON."""
        return asdict(self)

    def look_every(self) -> int:
        """`refresh`, or less in a run that would hardly be looked at."""
        return max(1, min(self.refresh, self.steps // 4))

    def inner(self) -> TrainConfig:
        """How the classifiers are trained."""
        return TrainConfig(
            steps=self.steps, batch_size=self.batch_size, lr=self.lr, augmentation=self.augment
        )

    def snapshot_steps(self) -> list[int]:
        """Evenly over the last half of the trajectory, its end included."""
        first = self.steps / 2
        spread = (self.steps - first) / self.snapshots
        return [round(first + spread * (i + 1)) for i in range(self.snapshots)]


class Trajectory:
    """The state of a run: K classifiers, W, their optimisers, and the losses shown to W.

    On a tower that is never trained the heads alone are `learners`, and see its features: those of
    images that nothing augments are asked for once, where they pay.
    """

    def __init__(
        self, config: ValueConfig, pool: Pool, image_size: int, seed: int, device: torch.device,
        progress: Progress = silent,
    ) -> None:  # fmt: skip
        self.config, self.pool, self.seed, self.device = config, pool, seed, device
        self.models: list[Classifier] = []
        for k in range(config.folds):
            model = build_classifier(
                config.arch, len(pool.classes), image_size, config.pretrained,
                seed=derive_seed("theta", seed, k), like=self.models[0] if k else None,
            )  # fmt: skip
            model.to(device).to(memory_format=torch.channels_last)  # a fifth faster on a CPU
            self.models.append(model.train())
        self.tower = self.models[0] if has_common_tower(config.arch) else None
        self.learners = [m if self.tower is None else m.head for m in self.models]
        self.optimizers = [make_optimizer(model, config.inner()) for model in self.learners]
        self.weight_net = WeightNet(seed=derive_seed("phi", seed)).to(device)
        self.weight_optimizer = torch.optim.Adam(self.weight_net.parameters(), lr=config.weight_lr)
        self.shown = torch.zeros(len(pool))
        self.trained = [pool.trained_on(k) for k in range(config.folds)]
        self.validated = [pool.validated_on(k) for k in range(config.folds)]
        self._refuse_empty_folds()
        self.history: list[dict[str, float]] = []
        self.step = 0
        self.outer: Tensor | float = 0.0  # the outer loss of the last outer step
        self.features: Tensor | None = None  # [N, D]
        asked = config.steps * config.folds * config.batch_size
        if self.tower is not None and pays_to_keep(self.tower, len(pool), asked):
            self.features = tower_features(self.tower, pool.images, progress=progress)

    def _refuse_empty_folds(self) -> None:
        real = [len(real) for real, _ in self.trained]
        held = [len(at) for at in self.validated]
        if min(real + held) == 0:
            raise UsageError(
                f"--folds {self.config.folds}", "too few real images for so many folds",
                "Use fewer folds, or add real images.",
            )  # fmt: skip

    @property
    def cross_fit(self) -> bool:
        return self.config.folds > 1

    def advance(self) -> None:
        """One step of every classifier, and of phi where it is due."""
        if self.step % self.config.look_every() == 0:
            self.look()
        for k in range(self.config.folds):
            self._advance_one(k)
        self.step += 1

    def _advance_one(self, k: int) -> None:
        batch, at = self._batch(k)
        shown = sent(self.shown[at], self.device) if self.cross_fit else None
        inner = self._inner(k, batch, shown)
        for group in self.optimizers[k].param_groups:
            group["lr"] = learning_rate(self.step, self.config.inner())
        take_step(self.learners[k], self.optimizers[k], inner)
        if not self.cross_fit:
            self.weight_net.see(inner.losses)

    def _inner(self, k: int, batch: Batch, shown: Tensor | None) -> InnerStep:
        """The gradient of theta_k; an outer step of phi is taken where one is due."""
        noise = derive_seed("noise", self.seed, self.step, k)
        if not self._warm() or (self.step + k) % self.config.meta_every:
            return inner_step(self.learners[k], self.weight_net, batch, shown, noise)
        meta = META_GRADIENTS[self.config.meta_gradient](
            self.learners[k], self.weight_net, batch, self._validation(k), self.config.eta,
            shown, noise,
        )  # fmt: skip
        for p, g in zip(self.weight_net.parameters(), meta.phi_gradient, strict=True):
            p.grad = g
        self.weight_optimizer.step()
        self.outer = meta.val_loss
        return meta.inner

    def _batch(self, k: int) -> tuple[Batch, Tensor]:
        at, draws = self._drawn(self.step, k)
        return self._images(at, draws), at

    def _drawn(self, step: int, k: int) -> tuple[Tensor, torch.Generator]:
        """Where the images of a batch stand, and the generator that augments them."""
        draws = step_generator(self.seed, step, f"batch {k}")
        real, other = self.trained[k]
        n = self.config.batch_size
        # Planted labels are wrong: they shall not fill a batch. But W learns from them as well.
        natural = min(MOST_REAL, len(real) / (len(real) + len(other)))
        n_real = round(max(self.config.real_share, natural) * n) if len(other) else n
        return torch.cat([draw(real, n_real, draws), draw(other, n - n_real, draws)]), draws

    def _coming(self) -> Tensor:
        """Where the images of all batches up to the next look stand, each once."""
        steps = range(self.step, self.step + self.config.look_every())
        return torch.cat(
            [self._drawn(step, k)[0] for step in steps for k in range(self.config.folds)]
        ).unique()

    def _validation(self, k: int) -> Batch:
        draws = step_generator(self.seed, self.step, f"validation {k}")
        return self._images(draw(self.validated[k], self.config.batch_size, draws), None)

    def _images(self, at: Tensor, draws: torch.Generator | None) -> Batch:
        labels = sent(self.pool.labels[at], self.device)
        if self.features is not None and (draws is None or self.config.augment == "none"):
            return sent(self.features[at], self.device), labels
        x = to_float(sent(self.pool.images[at], self.device))
        if draws is not None:
            x = augment_batch(self.config.augment, x, draws)
        if self.tower is not None:
            with torch.no_grad():
                x = self.tower.features(x)
        return x, labels

    def _losses(self, k: int, at: Tensor) -> Tensor:
        """Losses of the images at `at` by classifier k in eval mode, on the CPU."""
        if self.features is not None:
            return losses_of(self.learners[k], self.features, self.pool.labels, at)
        return losses_of(self.models[k], self.pool.images, self.pool.labels, at)

    @torch.no_grad()
    def look(self) -> None:
        """Bring the held-out losses of the images of the coming batches up to date, and write a
        line of history about them. No others are asked for, whatever the size of the pool."""
        at, row = self._coming(), {"step": float(self.step), "outer_loss": float(self.outer)}
        if self.cross_fit:
            if self._warm():  # equal weights until the classifiers know something
                for k in range(self.config.folds):
                    held = at[self.pool.folds[at] == k]
                    self.shown[held] = self._losses(k, held)
                self.weight_net.see(self.shown[at].to(self.device))
            weights = self.weight_net(self.shown[at].to(self.device)).cpu()
            for name, role in ROLES.items():
                if bool((mine := self.pool.roles[at] == role).any()):
                    row[f"weight_{name}"] = weights[mine].mean().item()
        self.history.append(row)

    def _warm(self) -> bool:
        return self.step >= self.config.warmup * self.config.steps

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs."""
        found = {"shown": self.shown, **optimizer_tensors(self.weight_optimizer, "phi_adam.")}
        found |= {f"phi.{name}": t for name, t in self.weight_net.state_dict().items()}
        for k, (model, optimizer) in enumerate(zip(self.models, self.optimizers, strict=True)):
            found |= {f"theta.{k}.{name}": t for name, t in learnt_state(model).items()}
            found |= optimizer_tensors(optimizer, f"adam.{k}.")
        return found

    def restore(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Go on where `tensors` and `meta` were saved."""
        self.shown = tensors["shown"].clone()
        self.weight_net.load_state_dict(under(tensors, "phi."))
        restore_optimizer(self.weight_optimizer, tensors, "phi_adam.")
        for k, (model, optimizer) in enumerate(zip(self.models, self.optimizers, strict=True)):
            load_learnt(model, under(tensors, f"theta.{k}."))
            restore_optimizer(optimizer, tensors, f"adam.{k}.")
        self.step, self.outer, self.history = meta["step"], meta["outer"], meta["history"]

    def meta(self) -> dict[str, Any]:
        return {"step": self.step, "outer": float(self.outer), "history": self.history}


def draw(at: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """n of `at`: without replacement while it lasts."""
    if n == 0:
        return at[:0]
    rounds = -(-n // len(at))
    order = [torch.randperm(len(at), generator=generator) for _ in range(rounds)]
    return at[torch.cat(order)[:n]]


@torch.no_grad()
def losses_of(
    model: nn.Module, images: Tensor, labels: Tensor, at: Tensor, batch_size: int = 256
) -> Tensor:
    """Losses of those of the images (uint8, or features) that stand `at` in eval mode, on the CPU;
    the model's mode comes back."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    found = [
        F.cross_entropy(
            model(to_float(images[part].to(device))), labels[part].to(device),
            reduction="none",
        ).float().cpu()
        for part in at.split(batch_size)
    ]  # fmt: skip
    model.train(training)
    return torch.cat(found) if found else torch.empty(0)


def snapshot_name(number: int) -> str:
    """The directory of a snapshot inside the value model's."""
    return f"snapshot-{number}"


def save_snapshot(run: Trajectory, directory: Path, first: bool) -> None:
    """The classifiers and W as they are now; a tower that all have is in the very first alone."""
    for k, model in enumerate(run.models):
        save_classifier(directory / f"classifier-{k}.safetensors", model, whole=first and k == 0)
    save_tensors(directory / "weight_net.safetensors", run.weight_net.state_dict())


def train_trajectory(
    run: Trajectory, directory: Path, checkpoint: Path, progress: Progress = silent
) -> None:
    """Train to the end, writing snapshots; at a stop signal save the state, raise Stopped."""
    config = run.config
    saved = load_checkpoint(checkpoint)
    if saved is not None:
        run.restore(*saved)
    last = time.monotonic()
    with progress("value train", config.steps) as task, signals.deferred():
        task.advance(run.step)
        while run.step < config.steps:
            run.advance()
            for number, step in enumerate(config.snapshot_steps()):
                if step == run.step:
                    save_snapshot(run, directory / snapshot_name(number), number == 0)
            task.advance(outer_loss=run.history[-1]["outer_loss"])
            if signals.stop_requested() or time.monotonic() - last > SAVE_EVERY:
                save_checkpoint(checkpoint, run.tensors(), run.meta())
                signals.check()
                last = time.monotonic()
        run.look()


SAVE_EVERY = 60.0  # seconds
