"""The exact meta-gradient of TODV, by one forward-mode JVP or by double backward.

    w_i     = W_phi(h_i) / sum_j W_phi(h_j)                 h_i: the loss shown to W, a constant
    theta'  = theta - eta * grad_theta sum_i w_i L_i(theta)                       (virtual step)
    dL_val(theta') / dw_i = -eta <v, grad L_i(theta)>,      v = grad L_val(theta')

All inner products are one Jacobian-vector product of theta -> (L_1 ... L_B) with tangent v, so
that no second derivative is formed. The actual step takes the gradient of the virtual one: phi
moves beside theta, not before it, and a forward and a backward pass are saved. Every pass runs on
copies of the buffers: the running statistics of batch norm stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.func import jvp as forward_jvp

from ..runtime.device import plain_attention
from .weight_net import normalised

Named = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]  # images [B, 3, H, W] in [0, 1], labels [B]
Normalise = Callable[[Tensor], Tensor]


@dataclass
class InnerStep:
    """The weighted gradient of theta: the virtual step takes it, and the actual one as well."""

    gradient: tuple[Tensor, ...]  # of sum_i w_i L_i(theta), one a parameter that takes gradients
    losses: Tensor  # [B], L_i(theta)
    w: Tensor  # [B], with its graph back to phi
    buffers: Named  # the buffers as a plain training pass leaves them


@dataclass
class MetaStep:
    """What one outer evaluation found."""

    inner: InnerStep
    phi_gradient: tuple[Tensor, ...]  # dL_val(theta') / dphi, one a parameter of W
    val_loss: Tensor  # L_val(theta'), a scalar


def trainable(model: nn.Module) -> Named:
    """theta: the parameters that take gradients."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def copied_buffers(model: nn.Module) -> Named:
    """Copies of the buffers, for passes that must not touch the model's."""
    return {name: b.clone() for name, b in model.named_buffers()}


def commit_buffers(model: nn.Module, buffers: Named) -> None:
    """Make `buffers` the model's own, as a plain training pass would have."""
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])


def losses_at(model: nn.Module, theta: Named, buffers: Named, batch: Batch) -> Tensor:
    """L_i(theta), the cross-entropy of each sample, [B]; `buffers` are updated in place."""
    logits = functional_call(model, {**theta, **buffers}, (batch[0],))
    return F.cross_entropy(logits, batch[1], reduction="none")


@contextmanager
def same_noise(seed: int, device: torch.device) -> Iterator[None]:
    """Dropout draws the same masks in every pass under the same seed."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def sample_losses(model: nn.Module, batch: Batch, noise: int = 0) -> tuple[Tensor, Named]:
    """L_i at the model's theta, with its graph, and the buffers that the pass leaves."""
    buffers = copied_buffers(model)
    with same_noise(noise, batch[0].device):
        return losses_at(model, trainable(model), buffers, batch), buffers


def inner_step(
    model: nn.Module,
    weight_net: nn.Module,
    batch: Batch,
    shown: Tensor | None = None,
    noise: int = 0,
    normalise: Normalise = normalised,
    create_graph: bool = False,
) -> InnerStep:
    """The gradient of sum_i w_i L_i(theta). `shown` [B] is what W sees: by default the losses.

    The model's mode is respected (batch statistics in train mode); the model is left as it was.
    """
    losses, buffers = sample_losses(model, batch, noise)
    w = normalise(weight_net(losses.detach() if shown is None else shown))
    total = (w if create_graph else w.detach()) @ losses
    theta = list(trainable(model).values())
    gradient = torch.autograd.grad(total, theta, create_graph=create_graph)
    return InnerStep(gradient, losses.detach(), w, buffers)


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, inner: InnerStep) -> None:
    """The actual step of theta, with the gradient that the virtual one had."""
    for p, g in zip(trainable(model).values(), inner.gradient, strict=True):
        p.grad = g.detach()
    optimizer.step()
    optimizer.zero_grad()
    commit_buffers(model, inner.buffers)


def virtual_step(theta: Named, gradient: tuple[Tensor, ...], eta: float) -> Named:
    """theta' = theta - eta * gradient."""
    return {name: p - eta * g for (name, p), g in zip(theta.items(), gradient, strict=True)}


def meta_gradient_jvp(
    model: nn.Module,
    weight_net: nn.Module,
    batch: Batch,
    validation: Batch,
    eta: float,
    shown: Tensor | None = None,
    noise: int = 0,
    normalise: Normalise = normalised,
) -> MetaStep:
    """dL_val(theta')/dphi by one JVP. Three passes in all: the inner one, validation, the JVP."""
    inner = inner_step(model, weight_net, batch, shown, noise, normalise)
    theta = trainable(model)
    moved = virtual_step(theta, inner.gradient, eta)
    moved = {name: p.detach().requires_grad_() for name, p in moved.items()}
    with same_noise(noise + 1, batch[0].device):
        val_loss = losses_at(model, moved, copied_buffers(model), validation).mean()
    v = torch.autograd.grad(val_loss, list(moved.values()))
    products = loss_jvp(model, batch, dict(zip(theta, v, strict=True)), noise)
    phi_gradient = torch.autograd.grad(inner.w @ (-eta * products), list(weight_net.parameters()))
    return MetaStep(inner, phi_gradient, val_loss.detach())


def loss_jvp(model: nn.Module, batch: Batch, tangent: Named, noise: int = 0) -> Tensor:
    """<tangent, grad L_i(theta)> for every sample i, [B]."""

    def losses(theta: Named) -> Tensor:
        return losses_at(model, theta, copied_buffers(model), batch)

    theta = {name: p.detach() for name, p in trainable(model).items()}
    with torch.no_grad(), same_noise(noise, batch[0].device), plain_attention():
        products: Tensor = forward_jvp(losses, (theta,), (tangent,))[1]
    return products


def meta_gradient_exact_double(
    model: nn.Module,
    weight_net: nn.Module,
    batch: Batch,
    validation: Batch,
    eta: float,
    shown: Tensor | None = None,
    noise: int = 0,
    normalise: Normalise = normalised,
) -> MetaStep:
    """The same by backward through the virtual step (Shu et al. 2019, equations 4 to 6)."""
    with plain_attention():
        inner = inner_step(model, weight_net, batch, shown, noise, normalise, create_graph=True)
        moved = virtual_step(trainable(model), inner.gradient, eta)
        with same_noise(noise + 1, batch[0].device):
            val_loss = losses_at(model, moved, copied_buffers(model), validation).mean()
        phi_gradient = torch.autograd.grad(val_loss, list(weight_net.parameters()))
    inner.gradient = tuple(g.detach() for g in inner.gradient)
    return MetaStep(inner, phi_gradient, val_loss.detach())


META_GRADIENTS = {"jvp": meta_gradient_jvp, "exact-double": meta_gradient_exact_double}
