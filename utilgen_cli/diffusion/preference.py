"""Diffusion-DPO: make a generator prefer what is useful (Wallace et al. 2024, arXiv 2311.12908).

Legend as in preference_loss: psi is the U-Net in training, ref the reference; w and l the two
images of a pair; L the denoising error, dL = L_psi - L_ref.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..runtime import distributed
from ..runtime.device import autocast, sent
from ..runtime.seeds import step_generator
from .finetune import Figures
from .finetune_config import Draw, draw_rows
from .lora import adapter_active, adapters_off, copy_lora, train_lora_only, tuner_layers
from .pair_data import Preferences, split_rows
from .preference_loss import (
    LOSSES,
    denoising_error,
    diffusion_target,
    kto_image_loss,
    kto_reference_point,
)

if TYPE_CHECKING:
    from .load import LatentDiffusion

VALIDATION_DRAWS = 8  # timesteps a held-out pair is judged at, one in every eighth of the schedule
PATIENCE = 3
RISE = 0.01  # of the reference's error: a smaller rise is noise
RUIN = 0.05  # more than this, and psi cannot draw what should win


@dataclass(frozen=True)
class Denoisers:
    """The U-Net psi, and what makes it the reference for a while (or another U-Net)."""

    psi: Any
    reference: Any
    as_reference: Callable[[], AbstractContextManager[None]]
    parameters: Mapping[str, nn.Parameter]


def lora_denoisers(unet: Any, adapter: str, reference: str) -> Denoisers:
    """psi is the U-Net with `adapter`; the reference the same U-Net with it off, or as it is now.

    reference: `base` (adapters off) or `previous` (a frozen copy of the adapter, not of the U-Net).
    """
    if reference == "previous":
        copy_lora(unet, adapter, "previous")
        unet.set_adapter(adapter)
    parameters = train_lora_only(unet, adapter)
    layers = tuner_layers(unet)

    def as_reference() -> AbstractContextManager[None]:
        if reference == "previous":
            return adapter_active(layers, "previous")
        return adapters_off(layers)

    return Denoisers(unet, unet, as_reference, parameters)


def full_denoisers(unet: Any, reference: Any | None = None) -> Denoisers:
    """psi is the whole U-Net, in float32; the reference a frozen second one (default: a copy)."""
    frozen = copy.deepcopy(unet) if reference is None else reference
    frozen.requires_grad_(False)
    unet.requires_grad_(True)
    return Denoisers(unet, frozen, nullcontext, dict(unet.named_parameters()))


class PreferenceObjective:
    """The loss over pairs (or single images), and its watch over held-out ones."""

    mixed = True

    def __init__(
        self,
        model: LatentDiffusion,
        denoisers: Denoisers,
        pairs: Preferences,
        embeds: Tensor,
        reference_embeds: Tensor,
        *,
        loss: str = "dpo",
        beta: float,
        seed: int = 0,
        batch_size: int = 16,
    ) -> None:
        """embeds, reference_embeds: of the distinct prompts [P, L, D] (they differ where the text
        encoder is adapted); batch_size is validation's."""
        self.denoisers, self.parameters = denoisers, denoisers.parameters
        self.pairs, self.embeds, self.reference_embeds = pairs, embeds, reference_embeds
        self.pair_loss, self.beta, self.seed = LOSSES[loss], beta, seed
        self.batch_size, self.device, self.dtype = batch_size, model.device, model.dtype
        self.prediction_type = model.prediction_type
        self.latent_shape = model.latent_shape
        self.alpha_bar = model.scheduler.alphas_cumprod.to(self.device)
        self.train_rows, self.held_out = split_rows(pairs, seed)
        self.rows = len(self.train_rows)
        self.watch = self if len(self.held_out) else None
        self._references: list[Tensor] = []  # predictions on the held-out pairs

    def draw(self, rows: int, generator: torch.Generator) -> Draw:
        """One noise, one timestep, one flip for both images of each pair."""
        return draw_rows(rows, self.latent_shape, len(self.alpha_bar), generator)

    def loss(self, rows: Tensor, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss over training rows `rows`, and what it is made of."""
        rows = self.train_rows[rows]
        batch = self._batch(rows, draw)
        L_ref = denoising_error(self._reference_prediction(batch), batch.target)
        prediction = self._predict(self.denoisers.psi, batch, self.embeds)
        dL = denoising_error(prediction, batch.target) - L_ref  # [sides * R]
        z = kto_reference_point(dL, self.beta)
        distributed.all_reduce_mean([z])
        value = self._losses(dL, rows, z.clamp(min=0)).mean()
        dL_w, dL_l = self._sides(dL.detach(), rows)
        right = dL_w < (dL_l if self.pairs.sign is None else dL_l.mean())
        return value, {"accuracy": mean(right), "dL_w": mean(dL_w), "dL_l": mean(dL_l)}

    def _losses(self, dL: Tensor, rows: Tensor, z: Tensor) -> Tensor:
        """The loss of each row; of single images both signs weigh the same in all."""
        if self.pairs.sign is None:
            dL_w, dL_l = dL.chunk(2)
            return self.pair_loss(dL_w, dL_l, self.beta, z)
        sign = sent(self.pairs.sign[rows], self.device)
        share = sent((self.pairs.sign[self.train_rows] > 0).float().mean(), self.device)
        weight = torch.where(sign > 0, 0.5 / share, 0.5 / (1 - share))
        return weight * kto_image_loss(dL, sign, self.beta, z)

    def _sides(self, dL: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(of what should win, of what should lose) from values [..., sides * R]."""
        if self.pairs.sign is None:
            dL_w, dL_l = dL.chunk(2, -1)
            return dL_w, dL_l
        wanted = self.pairs.sign[rows] > 0
        won, lost = (sent(mine.nonzero()[:, 0], self.device) for mine in (wanted, ~wanted))
        return dL[..., won], dL[..., lost]

    @torch.no_grad()
    def validate(self) -> Figures:
        """Figures on held-out pairs at fixed noise and timesteps.

        loss; accuracy: share of pairs that psi ranks right; separation: mean of dL_l - dL_w over
        the pairs in units of its standard deviation; dL_w, dL_l as shares of the reference's
        own error; drift: mean squared distance from the reference's predictions. A desirable
        single image is compared with every undesirable one of its prompt.
        """
        dL, drift, L_ref = [], [], []
        for number, (rows, draw) in enumerate(self._validation_batches()):
            batch = self._batch(rows, draw)
            with autocast(self.device, self.dtype):
                reference = self._cached_reference(number, batch)
                prediction = self._predict(self.denoisers.psi, batch, self.embeds)
            base = denoising_error(reference, batch.target)
            dL.append((denoising_error(prediction, batch.target) - base).view(-1, len(rows)))
            L_ref.append(base)
            drift.append(denoising_error(prediction, reference))
        by_draw = torch.cat(dL, 1).unflatten(1, (VALIDATION_DRAWS, -1))  # [sides, draws, M]
        values = by_draw.transpose(0, 1).flatten(1)  # [draws, sides * M]
        return self._figures(values, torch.cat(L_ref), torch.cat(drift))

    def _figures(self, dL: Tensor, L_ref: Tensor, drift: Tensor) -> Figures:
        """dL: [draws, sides * M]."""
        z = kto_reference_point(dL, self.beta).clamp(min=0)
        losses = [self._losses(draw, self.held_out, z).mean() for draw in dL]
        dL_w, dL_l = self._sides(dL, self.held_out)
        margin = self._margins(dL_w.mean(0), dL_l.mean(0))
        wins = (margin > 0).float() + 0.5 * (margin == 0).float()
        # of one pair alone nothing says how far margins lie apart but its own
        unit = margin.std(correction=0) if len(margin) > 1 else margin.abs().mean()
        values = {
            "loss": torch.stack(losses).mean(),
            "accuracy": wins.mean(),
            "separation": margin.mean() / unit.clamp(min=1e-12),
            "dL_w": dL_w.mean() / L_ref.mean(),
            "dL_l": dL_l.mean() / L_ref.mean(),
            "drift": drift.mean(),
        }
        return {name: float(value) for name, value in values.items()}

    def _margins(self, dL_w: Tensor, dL_l: Tensor) -> Tensor:
        """dL_l - dL_w of the held-out pairs; of single images with every other of its prompt."""
        if self.pairs.sign is None:
            return dL_l - dL_w
        index = self.pairs.prompt_index.to(self.device)[None]
        prompt_w, prompt_l = (p[0] for p in self._sides(index[:, self.held_out], self.held_out))
        same = prompt_w[:, None] == prompt_l
        margins = dL_l - dL_w[:, None]
        return margins[same] if same.any() else margins.flatten()

    def score(self, figures: Figures) -> float:
        """The best checkpoint separates held-out winners from losers best, among those that still
        draw: a wreck can rank well. (The loss itself mostly tells how confident psi is: it can
        rise above log 2 while ranking gets better.)"""
        return figures["separation"] if figures["dL_w"] < RUIN else -math.inf

    def degrading(self, history: list[Figures]) -> str | None:
        """Both errors above the reference's three times in a row, and no better checkpoint among
        these: psi forgets how to draw what should win."""
        recent, earlier = history[-PATIENCE:], history[:-PATIENCE]
        risen = [f["dL_w"] > RISE and f["dL_l"] > RISE for f in recent]
        if not earlier or not all(risen):
            return None
        if max(map(self.score, recent)) > max(map(self.score, earlier)):
            return None
        winners, losers = (100 * recent[-1][name] for name in ("dL_w", "dL_l"))
        return f"the denoising error of winners and losers rose ({winners:+.1f} %, {losers:+.1f} %)"

    def _validation_batches(self) -> list[tuple[Tensor, Draw]]:
        generator = step_generator(self.seed, 0, "validation")
        stratum = len(self.alpha_bar) / VALIDATION_DRAWS
        batches = []
        for k in range(VALIDATION_DRAWS):
            draw = self.draw(len(self.held_out), generator)
            u = torch.rand(len(self.held_out), generator=generator)
            timesteps = ((k + u) * stratum).long().clamp(max=len(self.alpha_bar) - 1)
            fixed = Draw(draw.noise, timesteps, torch.zeros_like(draw.flip))
            for part in torch.arange(len(self.held_out)).split(self.batch_size):
                batches.append((self.held_out[part], fixed.part(part)))
        return batches

    def _cached_reference(self, number: int, batch: NoisyPairs) -> Tensor:
        if number == len(self._references):
            self._references.append(self._reference_prediction(batch))
        return self._references[number]

    def _batch(self, rows: Tensor, draw: Draw) -> NoisyPairs:
        """Noisy latents of the rows: winners first, then losers, [sides * R, ...]."""
        sides, variants = self.pairs.latents.shape[1:3]
        flip = draw.flip.long() * (variants - 1)
        chosen = self.pairs.latents[rows, :, flip]  # [R, sides, C, h, w]
        x0 = sent(chosen.transpose(0, 1).flatten(0, 1), self.device)
        noise = sent(draw.noise.repeat(sides, 1, 1, 1), self.device)
        t = sent(draw.timesteps.repeat(sides), self.device)
        a = self.alpha_bar[t].view(-1, 1, 1, 1)
        return NoisyPairs(
            x=a.sqrt() * x0 + (1 - a).sqrt() * noise,
            t=t,
            target=diffusion_target(self.prediction_type, x0, noise, a),
            prompts=self.pairs.prompt_index[rows].repeat(sides),
        )

    def _predict(self, unet: Any, batch: NoisyPairs, embeds: Tensor) -> Tensor:
        context = embeds[sent(batch.prompts, self.device)]
        kind = unet.conv_in.weight.dtype
        prediction: Tensor = unet(batch.x.to(kind), batch.t, context.to(kind)).sample
        return prediction

    @torch.no_grad()
    def _reference_prediction(self, batch: NoisyPairs) -> Tensor:
        with self.denoisers.as_reference():
            return self._predict(self.denoisers.reference, batch, self.reference_embeds)


@dataclass(frozen=True, slots=True)
class NoisyPairs:
    """x_t and the target [B, C, h, w], t and the prompts' index [B]: winners, then losers."""

    x: Tensor
    t: Tensor
    target: Tensor
    prompts: Tensor


def mean(values: Tensor) -> Tensor:
    """Their mean, 0 where there are none (a batch of single images may be of one sign)."""
    return values.float().sum() / max(1, len(values))
