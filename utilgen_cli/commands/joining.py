"""Where `ilpo` joins the rooms: the value model's judgement, a callable for the sampler."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..classification.data import Named, load_images, to_float
from ..diffusion.bundle import find_model, parse_classes, read_defaults
from ..diffusion.clip import ClipModel, image_image_score, image_text_score, load_clip
from ..diffusion.datadream import Shots, read_shots
from ..diffusion.generate import GenerateConfig, Generator, LazyGenerator
from ..diffusion.image_gradients import Term
from ..diffusion.instance import InstanceConfig, PolicyGenerator, learn_policy
from ..diffusion.noise import Calls, counted
from ..diffusion.objectives import BY_VALUE, make_objective
from ..diffusion.policy import FACTS, Policy, load_policy, policy_facts
from ..diffusion.prompt_search import Labeller
from ..diffusion.set_terms import SPREAD, coverage, gradient_match, spread
from ..runtime import signals
from ..runtime.artefact import is_done
from ..runtime.checkpoint import remove_checkpoint
from ..runtime.contents import directory_named
from ..runtime.errors import BadInput, UsageError
from ..runtime.output import OutputDirectory, end_run
from ..runtime.progress import Progress, silent
from ..shards.operands import open_source
from ..shards.quarantine import Quarantine
from ..shards.sample import Sample
from ..valuation.value_model import ValueModel, load_value, read_facts

SET_TERMS = ("none", "gradient-match", "coverage")
DEFAULT_CLIP = "ViT-B-32:openai"


@dataclass(frozen=True)
class Aim:
    """What the prompts are optimised for; weights are relative to the objective's own gradient."""

    value: Path
    objective: str = "utility"
    clip: str | None = None
    clip_weight: float = 0.5
    clip_image_weight: float = 0.0  # towards the real shots, in CLIP's image embedding
    real: Path | None = None
    diversity: float = 0.0
    set_term: str = "none"
    set_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.set_term not in SET_TERMS:
            raise UsageError(
                f"--set-term {self.set_term}", "unknown", f"Use {', '.join(SET_TERMS)}."
            )
        if self.set_term == "none" and self.set_weight != 1:
            raise UsageError("--set-weight", "there is no set term", "Add --set-term.")
        if self.real is None and (self.set_term != "none" or self.clip_image_weight):
            raise UsageError("--real", "is needed to compare with real shots", "Name their shards.")


class Terms:
    """The summands of the objective, and who names the classes of images."""

    def __init__(
        self, aim: Aim, generator: Generator, quarantine: Quarantine | None = None
    ) -> None:
        model, self.quarantine = generator.model, quarantine
        self.aim, self.device, self.classes = aim, model.device, generator.classes
        self.named: Named = generator
        value = load_value(aim.value, self.device)
        if not same_classes(value, generator):
            raise BadInput(str(aim.value), "was trained for other classes than are to be drawn",
                           f"Add --classes {','.join(value.classes)}.")  # fmt: skip
        self.climbed, self.judging = split_folds(value)
        self.clip: ClipModel = load_clip(aim.clip or model.clip or DEFAULT_CLIP, self.device)
        self.texts = [model.template.replace("{}", name) for name in generator.classes]
        self.size = model.size

    def _shots(self, size: int) -> tuple[Tensor, Tensor]:
        """The images that terms compare with; none where no term does."""
        compared = self.aim.set_term != "none" or self.aim.clip_image_weight
        if self.aim.real is None or not compared:
            return torch.empty(0), torch.empty(0)
        real = load_images(open_source([str(self.aim.real)], self.quarantine), size, self.named)
        lacking = sorted(set(range(len(self.classes))) - set(real.labels.tolist()))
        if lacking:
            names = ", ".join(self.classes[label] for label in lacking)
            advice = "Add some, or leave out --set-term and --clip-image-weight."
            raise BadInput(str(self.aim.real), f"has no images of {names}", advice)
        return to_float(real.images).to(self.device), real.labels.to(self.device)

    def terms(self) -> list[Term]:
        """The objective first; terms of weight 0 are left out. What they compare with is looked at
        here, and let go of."""
        aim, features = self.aim, self.climbed.classifiers[0].features
        shots, shot_labels = self._shots(self.size)
        by_text = image_text_score(self.clip, self.texts)
        climbed, judge = make_objective(aim.objective, self.climbed.judge, by_text), None
        if aim.objective in BY_VALUE and self.judging is not self.climbed:
            judge = make_objective(aim.objective, self.judging.judge, by_text)
        terms = [Term(aim.objective, 1.0, climbed, judge)]
        if aim.clip_weight:
            terms.append(Term("clip_text", aim.clip_weight, by_text))
        if aim.clip_image_weight:
            by_image = image_image_score(self.clip, shots, shot_labels)
            terms.append(Term("clip_image", aim.clip_image_weight, by_image))
        if aim.diversity:
            terms.append(Term(SPREAD, aim.diversity, spread(features)))
        if aim.set_term == "coverage":
            term = coverage(features, shots, shot_labels)
            terms.append(Term("coverage", aim.set_weight, term))
        if aim.set_term == "gradient-match":
            snapshots = [cast(Any, s).classifiers[0] for s in self.climbed.snapshots]
            term = gradient_match(snapshots, shots, shot_labels)  # type: ignore[arg-type]
            terms.append(Term("gradient_match", aim.set_weight, term))
        return terms

    def labellers(self) -> dict[str, Labeller]:
        """CLIP's zero-shot labels, and those of a classifier that the optimiser did not see."""
        texts = self.clip.text_embeds(self.texts)

        def classifier(images: Tensor) -> Tensor:
            return torch.stack([c(images) for c in self.judging.classifiers]).mean(0).argmax(1)

        return {"clip": lambda images: self.clip.zero_shot(images, texts), "classifier": classifier}


def classes_to_draw(
    given: str | None, model: str, tokens: Path | None, value: Path, init: Path | None = None
) -> tuple[str, ...] | None:
    """`--classes`; those of the policy to begin with; those of the value model where neither the
    bundle nor tokens name any."""
    if given or tokens is not None:
        return parse_classes(given)
    if init is not None and (begun := policy_facts(init).get("classes")):
        return tuple(begun)
    if read_defaults(find_model(model)).get("classes"):
        return None
    facts = read_facts(value)
    return None if facts.get("unnamed") else tuple(facts["classes"])


def same_classes(a: Named, b: Named) -> bool:
    """True if both know these classes, as far as both know their names."""
    pairs = enumerate(zip(a.classes, b.classes, strict=False))
    same = all(x == y for i, (x, y) in pairs if i not in a.unnamed | b.unnamed)
    return len(a.classes) == len(b.classes) and same


def split_folds(value: ValueModel) -> tuple[ValueModel, ValueModel]:
    """(what the optimiser climbs, what judges it): disjoint classifiers where there are several."""
    if value.folds < 2:
        return value, value
    return value.only(range(value.folds - 1)), value.only([value.folds - 1])


@contextmanager
def own_turn(directory: Path) -> Iterator[None]:
    """Wait while another part of the run learns the policy; then it is there for all."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock-turn").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                signals.check()
                time.sleep(1)
        yield


class PolicyRun(LazyGenerator):
    """Learns (or finds) the policy when the first image is wanted, then draws with it."""

    def __init__(
        self,
        config: GenerateConfig,
        aim: Aim,
        instance: InstanceConfig,
        policy_directory: Path | None,
        device: str | None,
        precision: str | None,
        progress: Progress = silent,
        overwrite: bool = False,
        quarantine: Quarantine | None = None,
    ) -> None:
        super().__init__(config, device, precision, progress)
        if instance.anchor_weight and aim.real is None:
            raise UsageError("--anchor-weight", "needs the real shots", "Name them with --real.")
        self.aim, self.instance, self.overwrite = aim, instance, overwrite
        self.quarantine = quarantine or Quarantine()
        self.policy_directory, self.policy = policy_directory, None  # type: Path | None, Policy | None
        self.calls = Calls()

    def settings(self) -> dict[str, Any]:
        """What the policy depends on."""
        return {
            **self.config.settings(),
            "aim": asdict(self.aim),
            "clip files": directory_named(self.aim.clip),
            "instance": self.instance.facts(),
            **self.quarantine.settings(),
        }

    def draw(self, items: Sequence[tuple[int, int]]) -> Iterator[Sample]:
        """The samples of `items`, in order."""
        if self.generator is None:
            generator = self.load()
            self.policy = self.find_policy(generator)
            self.generator = PolicyGenerator.adopt(generator, self.policy, self.provenance())
        with counted(self.generator.model.unet, self.calls):
            yield from super().draw(items)

    def load(self) -> Generator:
        """The model; classes without names are those of the policy to begin with."""
        generator = Generator(self.config, device=self.device, dtype=self.dtype)
        if self.instance.start is not None:
            generator.unnamed |= set(policy_facts(self.instance.start).get("unnamed", ()))
        return generator

    def provenance(self) -> dict[str, Any]:
        """What an image's `json` says of the policy."""
        return {
            "source": "ilpo",
            "objective": self.aim.objective,
            "set_term": self.aim.set_term,
            "noise": self.instance.noise.mode,
        }

    def keep_policy(self) -> None:
        """Learn the policy also where all images were drawn before, and it was not kept then."""
        directory = self.policy_directory
        if self.policy is None and directory is not None and not is_done(directory / FACTS):
            self.find_policy(self.load())

    def find_policy(self, generator: Generator) -> Policy:
        """The finished policy of an earlier run with these settings, or a new one."""
        if self.policy_directory is None:
            return self.learn(generator, None)
        settings = {k: v for k, v in self.settings().items() if k != "compile"}
        with (
            own_turn(self.policy_directory),
            OutputDirectory(self.policy_directory, "ilpo", settings, self.overwrite) as out,
        ):
            out.ends_run = False  # it is drawn with yet
            if not out.is_done(FACTS):
                self.learn(generator, out.checkpoint).save(out.path)
                remove_checkpoint(out.checkpoint)
            return load_policy(out.path)

    def end(self) -> None:
        """All is drawn: from now on --overwrite learns the policy anew."""
        if self.policy_directory is not None:
            end_run(self.policy_directory)

    def learn(self, generator: Generator, checkpoint: Path | None) -> Policy:
        """Optimise the prompts; a U-Net that is compiled is so for drawing alone."""
        terms = Terms(self.aim, generator, self.quarantine)
        shots = self.shots(generator) if self.instance.anchor_weight else None
        eager = torch.compiler.set_stance("force_eager") if self.config.compile else nullcontext()
        with eager:
            return learn_policy(
                generator, terms.terms(), terms.labellers(), self.instance, checkpoint,
                self.progress, shots,
            )  # fmt: skip

    def shots(self, generator: Generator) -> Shots:
        """The real shots' latents, to anchor the prompts."""
        source = open_source([str(self.aim.real)], self.quarantine)
        return read_shots(source.samples(), generator.model, lambda sample: "")

    def summary(self) -> dict[str, Any]:
        """What the run drew, and what the policy did."""
        found = super().summary()
        if self.policy is None or not isinstance(self.generator, PolicyGenerator):
            return found
        learnt = {"learning_seconds" if k == "seconds" else k: v
                  for k, v in self.policy.summary.items()}  # fmt: skip
        return {**found, **learnt, "noise": self.generator.noise_figures(),
                "sampling_unet_latents": self.calls.latents}  # fmt: skip

    def line(self) -> str:
        """The summary for people."""
        if self.policy is None:
            return super().line()
        s = self.summary()
        before, after = s["before"], s["after"]
        names = [name for name in after if name.startswith("fidelity_")]
        fidelity = ", ".join(
            f"{name.removeprefix('fidelity_')} {before[name]:.2f} -> {after[name]:.2f}"
            for name in names
        )
        return (
            f"{super().line()}; label fidelity on held-out noise: {fidelity}; kept iteration "
            f"{s['best_iteration']} of {s['iterations']}; U-Net latents: {s['unet_latents']} to "
            f"learn, {s['sampling_unet_latents']} to draw"
        )
