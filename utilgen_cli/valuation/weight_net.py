"""The weight network W_phi: the loss of a sample -> 100 ReLU -> sigmoid -> its weight in [0, 1].

Shu et al. 2019 (Meta-Weight-Net), section 2.1; UtilGen's TODV learns it on the validation loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

HIDDEN = 100
PRIOR_SLOPE = 0.5  # d logit / d loss at the start


class WeightNet(nn.Module):
    """phi. Losses outside [low, high], the range seen in training, count as its nearer end.

    It starts as a gently falling function: where the validation loss says nothing, the weights
    keep that prior, and are never inverted by the luck of an initialisation.
    """

    low: Tensor
    high: Tensor

    def __init__(self, hidden: int = HIDDEN, seed: int = 0, slope: float = PRIOR_SLOPE) -> None:
        super().__init__()
        self.hidden = nn.Linear(1, hidden)
        self.out = nn.Linear(hidden, 1)
        self.register_buffer("low", torch.tensor(0.0))
        self.register_buffer("high", torch.tensor(0.0))
        self._start(seed, slope)

    def _start(self, seed: int, slope: float) -> None:
        """Half of the hinges stand at a loss of 0 and carry the slope, the others are spread over 0
        to 6 and wait with a weight of 0."""
        generator = torch.Generator().manual_seed(seed)
        n = self.hidden.out_features
        with torch.no_grad():
            self.hidden.weight.uniform_(0.5, 1.0, generator=generator)
            hinges = 6 * torch.rand(n, generator=generator)
            self.hidden.bias.copy_(-hinges * self.hidden.weight[:, 0])
            self.hidden.bias[: n // 2] = 0.0  # a hinge at 0 is linear over all losses
            self.out.weight.fill_(0.0)
            self.out.weight[:, : n // 2] = -slope / self.hidden.weight[: n // 2, 0].sum()
            self.out.bias.fill_(1.0)

    def see(self, losses_b: Tensor) -> None:
        """Widen the trained range to these losses."""
        seen = self.high > self.low  # a tensor: asking for its value would stop a GPU
        low, high = losses_b.min().detach(), losses_b.max().detach()
        self.low.copy_(torch.where(seen, torch.minimum(self.low, low), low))
        self.high.copy_(torch.where(seen, torch.maximum(self.high, high), high))

    def logit(self, losses_b: Tensor) -> Tensor:
        """The score before the sigmoid, [B]; differentiable with respect to the losses."""
        inside = into_range(losses_b, self.low, self.high)
        x = torch.where(self.high > self.low, inside, losses_b)
        return self.out(torch.relu(self.hidden(x[:, None])))[:, 0]

    def forward(self, losses_b: Tensor) -> Tensor:
        """Weights in [0, 1], [B]."""
        return torch.sigmoid(self.logit(losses_b))

    @torch.no_grad()
    def curve(self, points: int = 101) -> dict[str, list[float]]:
        """The learned function over its trained range, to plot."""
        losses = torch.linspace(float(self.low), float(self.high), points).to(self.low)
        return {"loss": losses.tolist(), "weight": self(losses).tolist()}


class _IntoRange(torch.autograd.Function):
    """Clamp whose gradient dies below `low` only: what lies above `high` can still find its way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        ctx.save_for_backward(x, low)
        return torch.minimum(torch.maximum(x, low), high)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, low = ctx.saved_tensors
        return grads[0] * (x >= low), None, None


def into_range(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """x clamped to [low, high]; the gradient passes except below `low`."""
    result: Tensor = _IntoRange.apply(x, low, high)  # type: ignore[no-untyped-call]
    return result


def normalised(w: Tensor) -> Tensor:
    """w_i / sum of w over the batch: only the order and the ratios of weights matter."""
    return w / w.sum().clamp_min(1e-12)
