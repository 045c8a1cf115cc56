"""Preference losses of a diffusion model, as functions of how much better it denoises each image.

Legend: L = |target - prediction|^2 as the MEAN over the latent's elements (target is the noise or
v, as the model predicts); dL = L_psi - L_ref; w and l are the preferred and the other image, both
at the same t and with the same noise. Diffusion-DPO (Wallace et al. 2024, equation 14) is
    L = -E log sigma(-beta (dL_w - dL_l))
The one meaning of `beta` here: it multiplies the difference of mean squared errors and contains
the paper's T and omega(lambda_t), which is constant. Other conventions convert by
    beta = beta_dpo / 2            (the authors' script: -0.5 * beta_dpo * mean squares)
    beta = beta_dpo                (diffusers' script, which has no 0.5; its default is 2500)
    beta = beta_paper T omega d    (the paper: sum of squares over the latent's d elements)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_FORMULAS = {
    "dpo": "-log sigmoid(-beta * (dL_w - dL_l))",
    "ipo": "(-beta * (dL_w - dL_l) - 1/2)^2",
    "kto": "1 - sigmoid(sign * (-beta * dL - z)), z the batch mean of -beta * dL, or 0",
}


def beta_convention(loss: str) -> str:
    """What `beta` means in one of `LOSSES`, in words for who compares runs."""
    return (
        f"loss = {_FORMULAS.get(loss, loss)}, dL = mean squared error of the model minus that of "
        "the reference, mean over latent elements; T and omega are part of beta"
    )


def beta_to_public(beta: float) -> float:
    """The authors' `--beta_dpo` of the same strength (diffusers' script takes ours as it is)."""
    return 2 * beta


def denoising_error(prediction: Tensor, target: Tensor) -> Tensor:
    """L: mean squared error of each image in float32 or better; [B, ...] -> [B]."""
    wide = torch.promote_types(prediction.dtype, torch.float32)
    return (prediction.to(wide) - target.to(wide)).square().flatten(1).mean(1)


def diffusion_target(prediction_type: str, x0: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """What the U-Net should say at x_t: the noise, or v = sqrt(a) noise - sqrt(1 - a) x0.

    alpha_bar: [B, 1, 1, 1].
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return x0
    if prediction_type == "v_prediction":
        return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x0
    raise ValueError(f"prediction type {prediction_type!r} cannot be trained")


def dpo_loss(dL_w: Tensor, dL_l: Tensor, beta: float, reference_point: Tensor) -> Tensor:
    """-log sigma(-beta (dL_w - dL_l)); [B] each."""
    return -F.logsigmoid(-beta * (dL_w - dL_l))


def ipo_loss(dL_w: Tensor, dL_l: Tensor, beta: float, reference_point: Tensor) -> Tensor:
    """(-beta (dL_w - dL_l) - 1/2)^2: beta^2 times IPO's (h - 1/(2 beta))^2 (Azar et al. 2023)."""
    return (-beta * (dL_w - dL_l) - 0.5).square()


def kto_loss(dL_w: Tensor, dL_l: Tensor, beta: float, reference_point: Tensor) -> Tensor:
    """The two images of a pair judged each by itself: the mean of `kto_image_loss`."""
    wanted = kto_image_loss(dL_w, torch.ones_like(dL_w), beta, reference_point)
    return (wanted + kto_image_loss(dL_l, -torch.ones_like(dL_l), beta, reference_point)) / 2


def kto_image_loss(dL: Tensor, sign: Tensor, beta: float, reference_point: Tensor) -> Tensor:
    """1 - sigma(sign (r - z)), r = -beta dL (Ethayarajh et al. 2024; Li et al. 2024).

    sign: 1 for a desirable image, -1 for an undesirable one [B]; `reference_point`: z, a scalar.
    """
    return 1 - torch.sigmoid(sign * (-beta * dL - reference_point))


def kto_reference_point(dL: Tensor, beta: float) -> Tensor:
    """The mean reward of a batch, without gradient (a scalar; z is this, at least 0)."""
    return (-beta * dL).mean().detach()


PreferenceLoss = Callable[[Tensor, Tensor, float, Tensor], Tensor]
LOSSES: dict[str, PreferenceLoss] = {"dpo": dpo_loss, "ipo": ipo_loss, "kto": kto_loss}
