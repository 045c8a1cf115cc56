"""Instance-level optimisation (UtilGen, section 3.3): learn a policy, then draw with it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..runtime.errors import UsageError
from ..runtime.progress import Progress, silent
from ..runtime.seeds import step_generator
from .adapters import learnt_with
from .class_adapters import acting
from .datadream import Shots
from .ddim import check_steps, initial_noise
from .generate import Generator, Item
from .image_gradients import Term, unit_scale
from .noise import NoiseConfig
from .policy import Policy, load_policy
from .prompt_inversion import PromptObjective
from .prompt_search import Labeller, PromptSearch, SearchConfig
from .prompts import PromptEmbeds, TokenEmbeds
from .rollout import GradSteps, Rollout, default_chunk
from .set_terms import SPREAD

PARAMETERS = ("embeds", "tokens")


@dataclass(frozen=True)
class InstanceConfig:
    """Choices of one `ilpo`; with no iterations the prompts stay as they are."""

    parameters: str = "embeds"
    population: int = 4
    grad_steps: str = "all"
    sampling_steps: int = 5  # while optimising
    anchor_weight: float = 0.0  # of the real shots' denoising loss
    start: Path | None = None  # a policy whose prompts to begin with, instead of the class prompts
    search: SearchConfig = field(default_factory=SearchConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)

    def __post_init__(self) -> None:
        if self.parameters not in PARAMETERS:
            raise UsageError(f"--parameters {self.parameters}", "unknown", "Use embeds or tokens.")
        if self.parameters == "tokens" and self.start is not None:
            why = "a policy has encoded prompts"
            raise UsageError("--parameters tokens", why, "Leave it out, or --init.")
        GradSteps.parse(self.grad_steps)

    def facts(self) -> dict[str, Any]:
        """What the policy depends on, as JSON."""
        return {**asdict(self), "search": self.search.facts()}


def learn_policy(
    generator: Generator,
    terms: Sequence[Term],
    labellers: dict[str, Labeller],
    config: InstanceConfig,
    checkpoint: Path | None = None,
    progress: Progress = silent,
    shots: Shots | None = None,
) -> Policy:
    """Optimise the class prompts of `generator` for the sum of the terms.

    `labellers` name the classes of images; the first one guards against alignment collapse. `shots`
    are needed for an anchor.
    Resumes from `checkpoint`. Raises UtilgenError when label fidelity falls too far.
    """
    model, seed = generator.model, config.search.seed
    if model.class_adapters is not None:
        why = "has one adapter a class, and ilpo learns the prompts of all classes at once"
        raise UsageError(f"adapter {model.class_adapters.name}", why, "Use lora --per dataset.")
    check_steps(model.scheduler, config.sampling_steps, "--search-steps")
    # without iterations the members would differ by the jitter that they begin with alone
    population = config.population if config.search.iterations else 1
    before = 0  # latents that the U-Net saw for the prompts to begin with
    if config.parameters == "tokens":
        prompts: PromptEmbeds | TokenEmbeds = TokenEmbeds(
            model,
            generator.prompts,
            population,
            seed,
            generator.config.prompt or model.template,
        )
    elif config.start is not None:
        begun = load_policy(config.start)
        before = int(begun.summary.get("unet_latents", 0))
        begun.check(model, generator.classes, str(config.start))
        prompts = PromptEmbeds.at(begun.prompt_embeds.to(model.device))
    else:
        prompts = PromptEmbeds(model, generator.prompts, population, seed)
    alone = prompts.theta.shape[1] * config.search.images < 2
    if alone and config.search.iterations and any(term.name == SPREAD for term in terms):
        why = "needs two images of a class in an iteration"
        raise UsageError("--diversity", why, "Add --images 2, or a larger --population.")
    rollout = Rollout(
        model, generator.uncond.detach(), config.sampling_steps, generator.guidance_scale,
        GradSteps.parse(config.grad_steps),
    )  # fmt: skip
    anchor = None
    if config.anchor_weight:
        assert shots is not None
        anchor = ShotAnchor(PromptObjective(model, shots, prompts), config)
    search = PromptSearch(prompts, rollout, list(terms), labellers, config.search, anchor)
    start = time.monotonic()
    embeds = search.run(checkpoint, progress)
    summary = {
        "seconds": round(time.monotonic() - start, 1), "unet_calls": search.calls.calls,
        "unet_latents": before + search.calls.latents, **outcome(search),
    }  # fmt: skip
    begun_at = config.start and str(config.start)
    settings = {**config.facts(), "start": begun_at, "terms": {t.name: t.weight for t in terms},
                **learnt_with(generator.config.adapters)}  # fmt: skip
    return Policy(
        embeds,
        generator.classes,
        generator.prompts,
        config.noise,
        settings,
        search.state.history,
        summary,
        generator.unnamed,
    )


class ShotAnchor:
    """The denoising loss of the real shots; as many a step as images are drawn in it."""

    def __init__(self, objective: PromptObjective, config: InstanceConfig) -> None:
        self.objective, self.search, self.weight = objective, config.search, config.anchor_weight
        drawn = objective.prompts.theta.shape[:2].numel() * config.search.images
        self.rows = min(drawn, objective.rows)
        self.chunk = self.search.chunk or default_chunk(objective.model)

    def backward(self, iteration: int) -> None:
        """Add its gradient to theta's."""
        generator = step_generator(self.search.seed, iteration, "ilpo-anchor")
        rows = torch.randperm(self.objective.rows, generator=generator)[: self.rows]
        draw = self.objective.draw(self.rows, generator)
        scale = unit_scale(draw.noise[0])
        for part in torch.arange(self.rows).split(self.chunk):
            (scale * self.objective.errors(rows[part], draw.part(part)).sum()).backward()


def outcome(search: PromptSearch) -> dict[str, Any]:
    """What validation noise says before and after, and which iterate was the best."""
    state = search.state
    return {
        "before": state.history[0],
        "after": state.history[search.best_row()],
        "best_iteration": state.best,
        "iterations": state.iteration,
        "scales": state.scales,
    }


class PolicyGenerator(Generator):
    """A generator that draws with a policy, and keeps account of the noise."""

    policy: Policy
    more_facts: dict[str, Any]
    figures: list[dict[str, Tensor]]

    @classmethod
    def adopt(cls, generator: Generator, policy: Policy, facts: dict[str, Any]) -> PolicyGenerator:
        """The loaded `generator` as one that draws with `policy`; `facts` join each image's own."""
        self = cls.__new__(cls)
        self.__dict__.update(generator.__dict__)
        self.policy, self.more_facts, self.figures = policy, facts, []
        return self

    def latents(self, items: Sequence[Item]) -> Tensor:
        """Finished latents [B, 4, h, w] of the items."""
        noise = initial_noise(self.model, self.config.seed, items)
        with acting(self.model, [c for c, _ in items]):
            latents, figures = self.policy.sample(
                self.model, noise, items, self.unconditional(items), self.steps,
                self.guidance_scale, self.config.sampler,
            )  # fmt: skip
        self.figures.append(figures)
        return latents

    def facts(self, item: Item) -> dict[str, Any]:
        """Where the image of `item` comes from."""
        (member,) = self.policy.members([item])
        return {**super().facts(item), **self.more_facts, "member": member}

    def noise_figures(self) -> dict[str, float]:
        """Means over the batches that were drawn."""
        names = self.figures[0] if self.figures else {}
        return {n: sum(f[n].item() for f in self.figures) / len(self.figures) for n in names}
