"""`dpo` as one call: load, cache, train, watch, write."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..runtime.artefact import CHECKPOINT, seal
from ..runtime.checkpoint import remove_checkpoint, save_tensors
from ..runtime.distributed import world
from ..runtime.errors import NoInput, UsageError
from ..runtime.files import write_atomic, write_json
from ..runtime.progress import Progress, silent
from ..runtime.seeds import seed_modules
from ..shards.sample import Sample
from .adapters import LORA_WEIGHTS
from .class_adapters import class_folders
from .finetune import FinetuneResult, finetune
from .finetune_config import FinetuneConfig
from .load import LatentDiffusion, TokenPrompts, load_model, quiet_libraries
from .lora import UNET_TARGETS, adapters_off, add_lora, lora_tensors, tuner_layers
from .pair_data import Preferences, parse_desirable, prompt_of, read_preferences
from .preference import Denoisers, PreferenceObjective, full_denoisers, lora_denoisers
from .preference_loss import LOSSES, beta_convention, beta_to_public

REFERENCES = ("base", "previous")
DONE = "dpo.json"


@dataclass(frozen=True, slots=True)
class PreferenceConfig:
    """What to train on preferences, and how.

    `beta` as in preference_loss, `desirable` as in pair_data (for single images).
    """

    model: str
    tokens: Path | None = None
    init: Path | None = None
    reference: str = "base"
    loss: str = "dpo"
    beta: float = 2500.0
    desirable: str = "quantile:0.25"
    rank: int = 16
    full: bool = False
    flip: bool = False
    gradient_checkpointing: bool = False
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)

    def __post_init__(self) -> None:
        for name, known in (("reference", REFERENCES), ("loss", tuple(LOSSES))):
            if getattr(self, name) not in known:
                advice = f"Use one of {', '.join(known)}."
                raise UsageError(f"--{name} {getattr(self, name)}", "unknown", advice)
        if not self.beta > 0:
            raise UsageError(f"--beta {self.beta}", "must be positive")
        parse_desirable(self.desirable)
        if self.reference == "previous" and self.init is None:
            raise UsageError("--reference previous", "there is no previous round", "Add --init.")
        if self.init is not None and not self.init.exists():
            raise NoInput(f"--init {self.init}", "is not there", "Name what dpo or lora made.")
        if self.init is not None and class_folders(self.init):
            advice = "Name one of its folders, or make one for all with lora --per dataset."
            raise UsageError(f"--init {self.init}", "holds one adapter a class", advice)
        if self.init is not None and self.full != (self.init / "unet").is_dir():
            kind = "a LoRA adapter" if self.full else "a whole U-Net"
            advice = "Leave --full out." if self.full else "Add --full."
            raise UsageError(f"--init {self.init}", f"is {kind}", advice)


def train_preference(
    samples: Iterable[Sample],
    out: Path,
    config: PreferenceConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Train on pairs (kto: or scored samples) and write the adapter (or pipeline) and dpo.json.

    Resumes from `out`/checkpoint.safetensors. Returns what dpo.json says.
    """
    start = time.monotonic()
    init = [] if config.init is None else [config.init]
    whole = torch.float32 if config.full else None
    model = load_model(
        config.model, device=device, dtype=dtype, unet_dtype=whole, tokens=config.tokens,
        adapters=init,
    )  # fmt: skip
    tokens = TokenPrompts.read(model, config.tokens)
    pairs = read_preferences(
        samples, model, lambda judged: prompt_of(judged, tokens, model.template),
        loss=config.loss, desirable=config.desirable, flip=config.flip, progress=progress,
    )  # fmt: skip
    text_encoder = lora_of_text_encoder(model, config)
    objective = make_objective(model, pairs, config)
    if init and not config.full:
        config = replace(config, rank=model.unet.peft_config[adapter_name(config)].r)
    result = finetune(
        objective, config.finetune, checkpoint=out / CHECKPOINT,
        fingerprint=pairs.fingerprint, description="dpo", progress=progress,
    )  # fmt: skip
    facts = {"model": config.model, "seconds": round(time.monotonic() - start, 1)}
    summary = {**facts, **describe(objective, config, result)}
    if world()[0] == 0:
        write_result(model, config, text_encoder, out)
        seal(out)
        write_json(out / DONE, summary)
        remove_checkpoint(out / CHECKPOINT)
    return summary


def make_objective(
    model: LatentDiffusion, pairs: Preferences, config: PreferenceConfig
) -> PreferenceObjective:
    """Embed the prompts once, then make psi and the reference out of the model's U-Net.

    VAE and text encoder are dropped.
    """
    layers = tuner_layers(model.text_encoder) if config.reference == "base" else []
    with torch.no_grad():
        reference_embeds = embeds = model.encode_prompts(pairs.prompts)
        if layers:
            with adapters_off(layers):
                reference_embeds = model.encode_prompts(pairs.prompts)
    model.drop("vae", "text_encoder")
    denoisers = make_denoisers(model, config)
    if config.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
    return PreferenceObjective(
        model, denoisers, pairs, embeds, reference_embeds, loss=config.loss, beta=config.beta,
        seed=config.finetune.seed, batch_size=config.finetune.batch_size,
    )  # fmt: skip


def make_denoisers(model: LatentDiffusion, config: PreferenceConfig) -> Denoisers:
    """LoRA: one U-Net. Full: the U-Net and a frozen copy (the base, or the round before)."""
    if config.full:
        base = None
        if config.init is not None and config.reference == "base":
            base = load_model(config.model, device=model.device).unet
        return full_denoisers(model.unet, base)
    name = adapter_name(config)
    if config.init is None:
        seed_modules(config.finetune.seed)
        add_lora(model.unet, config.rank, UNET_TARGETS, name)
    return lora_denoisers(model.unet, name, config.reference)


def adapter_name(config: PreferenceConfig) -> str:
    """`load_model` calls the adapter of --init adapter0."""
    return "default" if config.init is None else "adapter0"


def lora_of_text_encoder(model: LatentDiffusion, config: PreferenceConfig) -> dict[str, Tensor]:
    """What --init has adapted there; it is not trained."""
    if config.full or not tuner_layers(model.text_encoder):
        return {}
    return lora_tensors(model.text_encoder, "text_encoder", adapter_name(config))


def write_result(
    model: LatentDiffusion, config: PreferenceConfig, text_encoder: dict[str, Tensor], out: Path
) -> None:
    """The LoRA file (with the text encoder's part of --init), or the whole pipeline."""
    if not config.full:
        tensors = {**lora_tensors(model.unet, "unet", adapter_name(config)), **text_encoder}
        save_tensors(out / LORA_WEIGHTS, tensors, {"format": "pt"})
        return
    write_pipeline(model, config.model, out)


def write_pipeline(model: LatentDiffusion, name: str, out: Path) -> None:
    """The base pipeline (without class tokens) with the tuned U-Net, and the bundle's defaults."""
    from .adapters import as_pipeline
    from .bundle import find_model

    base = load_model(name)  # all of it in fp32: half of it would lose the U-Net's steps
    base.unet = model.unet.to("cpu")
    with quiet_libraries():
        as_pipeline(base).save_pretrained(out)
    source = find_model(name)
    if (source / "utilgen.json").is_file():
        write_atomic(out / "utilgen.json", (source / "utilgen.json").read_bytes())
    if base.clip is not None and Path(base.clip).is_dir():
        shutil.copytree(base.clip, out / Path(base.clip).name, dirs_exist_ok=True)


def describe(
    objective: PreferenceObjective, config: PreferenceConfig, result: FinetuneResult
) -> dict[str, Any]:
    """What dpo.json says, beside the model and the time."""
    by_step = {int(figures["step"]): figures for figures in result.history}
    settings = {
        name: value if value is None or isinstance(value, bool | int | float | dict) else str(value)
        for name, value in asdict(config).items()
    }
    return {
        **settings,
        "beta_convention": beta_convention(config.loss),
        **({"beta_public_scripts": beta_to_public(config.beta)} if config.loss == "dpo" else {}),
        **counts(objective.pairs),
        "held_out": len(objective.held_out),
        "prompts": objective.pairs.prompts[:100],
        "trained_parameters": sum(p.numel() for p in objective.parameters.values()),
        "prediction_type": objective.prediction_type,
        "steps": result.steps,
        "kept_step": result.best_step,
        "stopped": result.stopped,
        "before": by_step.get(0),
        "kept": by_step.get(result.best_step),
        "history": result.history,
    }


def counts(preferences: Preferences) -> dict[str, int]:
    """How many pairs there are, or how many single images of either kind."""
    if preferences.sign is None:
        return {"pairs": len(preferences)}
    sides = {"desirable_samples": 1, "undesirable_samples": -1}
    return {name: int((preferences.sign == s).sum()) for name, s in sides.items()}


def by_chance(separation: float, held_out: int, looks: int) -> bool:
    """True where pure noise gives a separation like this, or a larger one, one time in 20 or more
    often, as the best of so many looks (Student's t, Bonferroni's correction)."""
    from scipy import stats

    if held_out < 2:
        return True
    bar = stats.t.ppf(1 - 0.05 / max(1, looks), held_out - 1)
    return bool(separation * (held_out - 1) ** 0.5 < bar)


def outcome(summary: dict[str, Any]) -> list[str]:
    """What a person should know of the run, from what dpo.json says."""
    lines = []
    if summary["stopped"]:
        lines.append(f"stopped early, at step {summary['steps']}: {summary['stopped']}")
    kept, pairs = summary["kept"], "pairs" in summary
    if kept is None:
        few = f"{summary['pairs']} pairs" if pairs else "the samples"
        why = "to hold some out: whether the generator got worse was not watched"
        return [*lines, f"{few} are too few {why}"]
    what = "pairs are ranked right" if pairs else "samples: so many desirable-undesirable pairs"
    lines.append(
        f"kept step {summary['kept_step']} of {summary['steps']}: "
        f"{100 * kept['accuracy']:.0f} % of {summary['held_out']} held-out {what}, "
        f"separation {kept['separation']:.2f}, denoising error of winners "
        f"{100 * kept['dL_w']:+.1f} %, of losers {100 * kept['dL_l']:+.1f} %"
    )
    if summary["kept_step"] == 0:
        lines.append("nothing learned held on the held-out pairs: the generator is as it was")
    elif pairs and by_chance(kept["separation"], summary["held_out"], len(summary["history"]) - 1):
        lines.append(
            f"warning: {summary['held_out']} held-out pairs cannot tell this from chance (the best "
            "of several looks at them is shown): make more pairs, or compare by eval"
        )
    return lines
