"""Prompt optimisation: p* = argmax_p score(g(p, eps), y) - lambda L_CLIP, through the sampler.

Legend: theta the prompts of `prompts.py`; f_k the terms of the objective, w_k their weights; G the
gradient at the images. Each term's own is divided by its RMS norm over the batch (the score's
scale is arbitrary, and W saturates), so that a weight means the same for every term:
    G = sum_k w_k g_k / rms|g_k|,   then one vector-Jacobian product G dimages/dtheta.
An anchor, the denoising loss D of the real shots under the prompts, pulls theta itself: with every
member's own part of both at unit RMS, the step climbs
    unit(dimages/dtheta^T G) - w unit(dD/dtheta)
Iterates are judged on noise that was never optimised on, by J = sum_k w_k f_k / s_k with s_k the
rms|g_k| of the start, and f_k by a judge that was not climbed where the term has one.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..runtime import signals
from ..runtime.checkpoint import (
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from ..runtime.errors import UtilgenError
from ..runtime.progress import Progress, Task, silent
from ..runtime.seeds import derive_seed, step_generator
from .ddim import initial_noise
from .image_gradients import (
    Term,
    accumulate,
    class_blocks,
    image_gradients,
    rms_norm,
    term_gradient,
    unit_scale,
)
from .noise import Calls, counted
from .prompts import rms
from .render import not_finite
from .rollout import Rollout, default_chunk

PROMPTS = 64  # of which a text encoder's graph takes no more than that of an image's U-Net call


class Anchor(Protocol):
    """A loss of the prompts themselves."""

    weight: float

    def backward(self, iteration: int) -> None:
        """Add its gradient to theta's."""


Labeller = Callable[[Tensor], Tensor]  # images [B, 3, H, W] -> predicted classes [B]


@dataclass(frozen=True)
class SearchConfig:
    """Settings of the optimisation. `rate` is relative to the RMS of the starting embeddings."""

    iterations: int = 40
    images: int = 1  # a member and iteration
    rate: float = 0.02
    evaluate_every: int = 5
    validation_images: int = 8  # a class, on noise of their own
    patience: int = 4  # evaluations without a better iterate
    max_fidelity_drop: float = 0.25
    chunk: int | None = None  # images whose graph of one step is held at once
    seed: int = 0

    def facts(self) -> dict[str, Any]:
        """What the prompts depend on; --chunk changes but their rounding."""
        return {name: value for name, value in asdict(self).items() if name != "chunk"}


@dataclass
class SearchState:
    """Where the optimisation stands."""

    iteration: int = 0
    best: int = 0  # iteration of the best iterate
    history: list[dict[str, Any]] = field(default_factory=list)
    scales: dict[str, float] = field(default_factory=dict)  # s_k


class PromptSearch:
    """Optimise the prompts theta [C, M, ...] of `prompts`, all classes at once."""

    def __init__(
        self,
        prompts: nn.Module,
        rollout: Rollout,
        terms: list[Term],
        labellers: dict[str, Labeller],
        config: SearchConfig,
        anchor: Anchor | None = None,
    ) -> None:
        self.prompts, self.rollout, self.terms = prompts, rollout, terms
        self.labellers, self.config, self.anchor = labellers, config, anchor
        self.theta: nn.Parameter = prompts.theta  # type: ignore[assignment]
        self.rate = config.rate * rms(self.theta.detach())
        self.optimizer = torch.optim.Adam([self.theta], lr=self.rate, betas=(0.9, 0.99))
        self.state, self.calls = SearchState(), Calls()
        self.calls_kept = (0, 0)  # those of all that is done, as `calls` has them
        self.checkpoint: Path | None = None
        self.task: Task | None = None
        self.chunk = config.chunk or default_chunk(rollout.model)
        self.best_theta = self.theta.detach().clone()

    def run(self, checkpoint: Path | None = None, progress: Progress = silent) -> Tensor:
        """The best prompts, as embeddings [C, M, L, D]. Resumes from `checkpoint` if there is one.

        Raises UtilgenError (alignment collapse) when label fidelity fell by more than allowed.
        """
        if checkpoint is not None:
            self.resume(checkpoint)
        config, state = self.config, self.state
        with (
            progress("optimise prompts", config.iterations) as task,
            signals.deferred(),
            counted(self.rollout.model.unet, self.calls),
        ):
            self.checkpoint, self.task = checkpoint, task
            task.advance(state.iteration)
            while True:
                if self.due():
                    self.evaluate()
                    self.keep()
                    if checkpoint is not None:
                        self.save(checkpoint)
                self.leave_if_asked()
                if state.iteration >= config.iterations or self.stale():
                    break
                self.step()
                state.iteration += 1
                self.keep()
                task.advance(1, **self.figures())
        with torch.no_grad():
            self.theta.copy_(self.best_theta)
            return self.all_embeds()

    def due(self) -> bool:
        """True where this iterate is to be judged, and a resumed run has not judged it before."""
        iteration, history = self.state.iteration, self.state.history
        if history and history[-1]["iteration"] == iteration:
            return False
        return iteration % self.config.evaluate_every == 0 or iteration == self.config.iterations

    def keep(self) -> None:
        """An iteration, or a look at its iterate, is done: what it cost counts."""
        self.calls_kept = self.calls.calls, self.calls.latents

    def between(self) -> None:
        """Between the parts of an iteration or a look, which change nothing before their end: tell
        that it goes on, and leave if asked."""
        if self.task is not None:
            self.task.advance(0)
        self.leave_if_asked()

    def leave_if_asked(self) -> None:
        """After a signal: save, and raise `Stopped`."""
        if signals.stop_requested():
            if self.checkpoint is not None:
                self.save(self.checkpoint)
            signals.check()

    def step(self) -> None:
        """One iteration: a batch of every member of every class, and one step of Adam."""
        config, (classes, members) = self.config, self.grid(self.config.images)
        generator = step_generator(config.seed, self.state.iteration, "ilpo-steps")
        chosen = self.rollout.grad_steps.choose(self.rollout.timesteps(), generator)
        noise = self.noise(classes, f"ilpo-noise-{self.state.iteration}")
        self.optimizer.zero_grad()

        def gradient_of(images: Tensor) -> Tensor:
            found = image_gradients(self.terms, images, classes, self.chunk, in_place=True)[0]
            return found.mul_(unit_scale(images[0]))

        cond = self.embeds(classes, members)
        pulled = accumulate(
            self.rollout, cond, noise, chosen, gradient_of, self.chunk, self.between
        )
        for c, m, g in self.in_parts(classes, members, pulled):
            self.prompts(c, m).backward(g)
        gradient = -self.member_gradients()
        if self.anchor is not None:
            self.anchor.backward(self.state.iteration)
            gradient += self.anchor.weight * self.member_gradients()
        self.theta.grad = gradient
        self.optimizer.step()

    def member_gradients(self) -> Tensor:
        """Theta's gradient with every member's part at unit RMS; it is taken from theta."""
        gradient, self.theta.grad = self.theta.grad, None
        assert gradient is not None
        norm = gradient.flatten(2).norm(dim=2)[(..., *[None] * (gradient.dim() - 2))]
        return gradient / norm.clamp_min(1e-20) * (gradient[0, 0].numel() ** 0.5)

    def grid(self, images: int) -> tuple[Tensor, Tensor]:
        """(class, member) of every image of a batch: [C * M * images] each."""
        c, m = self.theta.shape[:2]
        grid = torch.cartesian_prod(torch.arange(c), torch.arange(m)).repeat(images, 1)
        return grid[:, 0].to(self.theta.device), grid[:, 1].to(self.theta.device)

    def noise(self, classes: Tensor, purpose: str) -> Tensor:
        """Noise for a batch, from a seed that the drawn images do not use."""
        seed = derive_seed(purpose, self.config.seed)
        items = [(c, i) for i, c in enumerate(classes.tolist())]
        return initial_noise(self.rollout.model, seed, items)

    def in_parts(self, *rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The same rows of each, as many as a text encoder may hold the graph of."""
        return zip(*(x.split(PROMPTS * self.chunk) for x in rows), strict=True)

    @torch.no_grad()
    def embeds(self, classes: Tensor, members: Tensor) -> Tensor:
        """Prompt embeddings [B, L, D], without a graph."""
        return torch.cat([self.prompts(*part) for part in self.in_parts(classes, members)])

    def all_embeds(self) -> Tensor:
        """Prompt embeddings [C, M, L, D] of the present theta."""
        c, m = self.theta.shape[:2]
        flat = self.embeds(*self.grid(1))
        return flat.view(c, m, *flat.shape[1:]).cpu()

    def evaluate(self) -> None:
        """Judge the iterate on held-out noise; keep it if it is the best so far."""
        facts = self.judge()
        state = self.state
        if not state.history:
            state.scales = facts.pop("scales")
        facts.pop("scales", None)
        facts["objective"] = sum(
            t.weight * facts[t.name] / state.scales[t.name]
            for t in self.terms
            if state.scales[t.name] > 0
        )
        state.history.append({"iteration": state.iteration, **facts})
        self.watch_alignment()
        if facts["objective"] >= state.history[self.best_row()]["objective"]:
            state.best, self.best_theta = state.iteration, self.theta.detach().clone()

    @torch.no_grad()
    def judge(self) -> dict[str, Any]:
        """Each term's mean, label fidelity by each labeller, and rms|g_k|, on validation noise. A
        term with a judge has two means: the judge's counts."""
        members = self.theta.shape[1]
        classes, rows = self.grid(max(1, self.config.validation_images // members))
        noise = self.noise(classes, "ilpo-validation")
        sums, squares = defaultdict[str, float](float), defaultdict[str, list[Tensor]](list)
        for at in class_blocks(classes, self.chunk):
            self.between()
            labels = classes[at]
            parts = zip(
                noise[at].split(self.chunk),
                self.embeds(labels, rows[at]).split(self.chunk),
                strict=True,
            )
            images = torch.cat([self.rollout.images(x, p, set()) for x, p in parts])
            if not images.isfinite().all():
                raise not_finite()
            for term in self.terms:
                says = {term.name: term.judge or term.function}
                if term.judge is not None:
                    says[f"{term.name}_climbed"] = term.function
                for name, function in says.items():
                    sums[name] += len(at) * float(function(images, labels).mean())
                if not self.state.history:
                    squares[term.name].append(term_gradient(term, images, labels)[1])
            for name, labeller in self.labellers.items():
                sums[f"fidelity_{name}"] += int((labeller(images) == labels).sum())
        facts: dict[str, Any] = {name: value / len(classes) for name, value in sums.items()}
        if squares:
            facts["scales"] = {name: rms_norm(parts) for name, parts in squares.items()}
            self.refuse_flat(facts["scales"])
        return facts

    def refuse_flat(self, scales: dict[str, float]) -> None:
        """A flat objective cannot be climbed, nor any beside a term whose gradient is NaN."""
        first = self.terms[0].name
        for name, scale in scales.items():
            if math.isfinite(scale) and (scale > 0 or name != first):
                continue
            raise UtilgenError(
                f"objective {first}" if name == first else f"term {name}",
                "has no usable gradient at the images of the class prompts",
                "Train the value model longer, or take another --objective." if name == first
                else "Check what it was loaded from, or leave it out.",
            )  # fmt: skip

    def watch_alignment(self) -> None:
        """End the run when the images walk out of their classes (by the first labeller)."""
        for name in list(self.labellers)[:1]:
            first, last = (self.state.history[i][f"fidelity_{name}"] for i in (0, -1))
            if first - last > self.config.max_fidelity_drop:
                raise UtilgenError(
                    "alignment collapse",
                    f"label fidelity by {name} fell from {first:.2f} to {last:.2f} in "
                    f"{self.state.iteration} iterations",
                    "Raise --clip-weight, lower --rate, or allow it with --max-fidelity-drop.",
                )  # fmt: skip

    def best_row(self) -> int:
        """The row of the history that holds the best iterate."""
        return next(
            i for i, row in enumerate(self.state.history) if row["iteration"] == self.state.best
        )

    def stale(self) -> bool:
        """True when `patience` evaluations brought nothing better."""
        return len(self.state.history) - 1 - self.best_row() >= self.config.patience

    def figures(self) -> dict[str, float | str]:
        """What the progress line shows."""
        row = self.state.history[-1]
        return {k: v for k, v in row.items() if k != "iteration"}

    def judged(self) -> list[str]:
        """The terms that have a judge of their own."""
        return [term.name for term in self.terms if term.judge is not None]

    def save(self, path: Path) -> None:
        """Write the whole state; a run that resumes ends with the same prompts."""
        tensors = {
            "theta": self.theta.detach(),
            "best": self.best_theta,
            **optimizer_tensors(self.optimizer),
        }
        state, calls = asdict(self.state), list(self.calls_kept)
        meta = {"config": self.config.facts(), "state": state, "calls": calls,
                "judged": self.judged()}  # fmt: skip
        save_checkpoint(path, tensors, meta)

    def resume(self, path: Path) -> None:
        """Continue from what `save` wrote, if it was written under the same settings."""
        found = load_checkpoint(path)
        if found is None or found[1]["config"] != self.config.facts():
            return
        if found[1].get("judged", []) != self.judged():
            return  # figures of another judge cannot be compared
        tensors, meta = found
        with torch.no_grad():
            self.theta.copy_(tensors["theta"])
        self.best_theta = tensors["best"].to(self.theta)
        restore_optimizer(self.optimizer, tensors)
        self.state = SearchState(**meta["state"])
        self.calls.calls, self.calls.latents = meta["calls"]
        self.keep()
