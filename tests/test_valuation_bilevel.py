"""The meta-gradient by one JVP is that of double backward, and leaves the model as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from utilgen_cli.classification.models import Classifier, build_classifier
from utilgen_cli.valuation.bilevel import (
    loss_jvp,
    meta_gradient_exact_double,
    meta_gradient_jvp,
    sample_losses,
    take_step,
)
from utilgen_cli.valuation.weight_net import WeightNet, normalised

LORA = f"open_clip-lora:{Path(__file__).parents[1] / 'utilgen_cli' / 'tiny' / 'open_clip'}"
ARCHS = ("small-cnn", "resnet18", "resnet50", "mobilenetv2_100", "vit", LORA)


def make(arch: str, dtype: torch.dtype = torch.float64, n: int = 6):
    """A model in train mode with non-trivial running statistics, W, a batch and a validation one."""
    size = 16 if arch == "small-cnn" else 32
    model = small_vit(size) if arch == "vit" else build_classifier(arch, 4, size, seed=1)
    model = model.to(dtype).train()
    net = WeightNet(hidden=20, seed=2).to(dtype)
    for name, p in model.named_parameters():
        if "lora_B" in name:  # it starts at zero, where A has no gradient
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        net.out.weight.normal_(generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(0)
    x, v = torch.rand(2, n, 3, size, size, generator=generator, dtype=dtype)
    y, u = torch.randint(4, (2, n), generator=generator)
    return model, net, (x, y), (v, u)


def small_vit(size: int) -> Classifier:
    """timm's VisionTransformer (fused attention and all), two blocks of it."""
    torch.manual_seed(1)
    tower = VisionTransformer(size, 8, num_classes=0, embed_dim=32, depth=2, num_heads=2)
    return Classifier("vit", tower, 32, 4, {"size": size, "mean": [0.5] * 3, "std": [0.5] * 3})


def distance(a, b) -> float:
    a, b = (torch.cat([t.flatten() for t in g]) for g in (a, b))
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("arch", ARCHS, ids=lambda a: a.partition(":")[0])
def test_one_jvp_is_double_backward_in_fp64(arch):
    model, net, batch, val = make(arch)
    one = meta_gradient_jvp(model, net, batch, val, eta=0.05)
    two = meta_gradient_exact_double(model, net, batch, val, eta=0.05)
    assert torch.cat([g.flatten() for g in two.phi_gradient]).norm() > 0
    assert distance(one.phi_gradient, two.phi_gradient) < 1e-12
    assert one.val_loss.item() == pytest.approx(two.val_loss.item(), rel=1e-12)


# MobileNet's batch norm over few values amplifies fp32's rounding: there either of the two is far
# from what fp64 says, and they are this near to each other. The ViT's matrix products depend on the
# processor: 6e-8 with AVX2's kernels, 1.2e-6 with those of AVX-512 for AMX, where in three batches
# double backward itself is 1.4e-6 from fp64's.
@pytest.mark.parametrize(
    ("arch", "tolerance"),
    [("small-cnn", 1e-6), ("resnet18", 1e-6), ("resnet50", 1e-6), ("mobilenetv2_100", 5e-6),
     ("vit", 2e-6)],
)  # fmt: skip
def test_one_jvp_is_double_backward_in_fp32(arch, tolerance):
    model, net, batch, val = make(arch, torch.float32, n=16)
    one = meta_gradient_jvp(model, net, batch, val, eta=0.05)
    two = meta_gradient_exact_double(model, net, batch, val, eta=0.05)
    assert distance(one.phi_gradient, two.phi_gradient) < tolerance


@pytest.mark.parametrize("gradient", [meta_gradient_jvp, meta_gradient_exact_double])
def test_running_statistics_and_gradients_are_untouched(gradient):
    model, net, batch, val = make("resnet18")
    before = {k: t.clone() for k, t in model.state_dict().items()}
    gradient(model, net, batch, val, eta=0.05)
    assert all(torch.equal(before[k], t) for k, t in model.state_dict().items())
    assert all(p.grad is None for p in [*model.parameters(), *net.parameters()])


def test_the_meta_gradient_is_the_slope_of_the_validation_loss():
    """Central differences through a virtual step made with nothing but a plain SGD step."""
    model, net, batch, val = make("small-cnn")
    found = meta_gradient_jvp(model, net, batch, val, eta=0.1).phi_gradient

    def val_loss() -> float:
        import copy

        moved = copy.deepcopy(model)
        losses = nn.functional.cross_entropy(moved(batch[0]), batch[1], reduction="none")
        w = net(losses.detach())
        ((w / w.sum()).detach() * losses).sum().backward()
        torch.optim.SGD(moved.parameters(), lr=0.1).step()
        return nn.functional.cross_entropy(moved(val[0]), val[1]).item()

    parameter, step = net.out.weight, 1e-4
    for i in (0, 7, 13):
        parameter.data[0, i] += step
        up = val_loss()
        parameter.data[0, i] -= 2 * step
        down = val_loss()
        parameter.data[0, i] += step
        assert found[2][0, i].item() == pytest.approx((up - down) / (2 * step), rel=1e-5, abs=1e-12)


def test_normalised_weights_make_the_gradient_blind_to_their_scale():
    """sum_i w_i dL/dw_i = 0 when only ratios count: scaling all weights changes nothing."""
    model, _, batch, val = make("small-cnn")

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.log_scale = nn.Parameter(torch.zeros((), dtype=torch.float64))

        def forward(self, losses):
            return self.log_scale.exp() * (1 + losses)

    net = Scaled()
    step = meta_gradient_jvp(model, net, batch, val, eta=0.1)
    plain = meta_gradient_jvp(model, net, batch, val, eta=0.1, normalise=lambda w: w / len(w))
    assert abs(step.phi_gradient[0].item()) < 1e-15 < abs(plain.phi_gradient[0].item())


@pytest.mark.parametrize("gradient", [meta_gradient_jvp, meta_gradient_exact_double])
def test_the_shared_step_is_a_plain_training_step(gradient):
    """Weights and running statistics after it equal those of model(x), backward and step."""
    model, net, batch, val = make("mobilenetv2_100")
    inner = gradient(model, net, batch, val, eta=0.05).inner
    take_step(model, torch.optim.SGD(model.parameters(), lr=0.1), inner)
    other = make("mobilenetv2_100")[0]
    losses = nn.functional.cross_entropy(other(batch[0]), batch[1], reduction="none")
    (normalised(net(losses.detach())).detach() @ losses).backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert distance(model.parameters(), other.parameters()) < 1e-12
    for (name, a), b in zip(model.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_dropout_draws_the_same_mask_in_every_pass():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(12, 3)).double().train()
    x, y = torch.rand(5, 3, 2, 2, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    losses, _ = sample_losses(model, (x, y), noise=4)
    tangent = {k: torch.randn_like(p) for k, p in model.named_parameters()}
    rows = [torch.autograd.grad(one, list(model.parameters()), retain_graph=True) for one in losses]
    expected = torch.stack(
        [sum((g * t).sum() for g, t in zip(row, tangent.values(), strict=True)) for row in rows]
    )
    torch.testing.assert_close(loss_jvp(model, (x, y), tangent, noise=4), expected)


def test_losses_outside_the_trained_range_count_as_its_ends():
    net = WeightNet(seed=0)
    net.see(torch.tensor([0.5, 2.0]))
    inside = net(torch.tensor([0.5, 2.0]))
    assert torch.equal(net(torch.tensor([0.0, 9.0])), inside)
    assert inside[0] > inside[1]


def test_a_loss_above_the_range_still_feels_the_way_down():
    net = WeightNet(seed=0)
    net.see(torch.tensor([0.5, 2.0]))
    x = torch.tensor([0.1, 9.0], requires_grad=True)
    net.logit(x).sum().backward()
    assert x.grad[0] == 0 and x.grad[1] < 0
