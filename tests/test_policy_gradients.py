"""Gradients through the sampler against a plain loop over diffusers' DDIMScheduler in float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

from utilgen_cli.diffusion.image_gradients import accumulate, unit_scale
from utilgen_cli.diffusion.noise import counted
from utilgen_cli.diffusion.rollout import GradSteps, Rollout, default_chunk
from utilgen_cli.runtime.errors import UsageError

STEPS, SCALE = 6, 2.5


def tiny_model(prediction_type: str = "epsilon") -> SimpleNamespace:
    """Random U-Net and VAE in float64."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        cross_attention_dim=12, attention_head_dim=4, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8,), latent_channels=4, norm_num_groups=4, layers_per_block=1, sample_size=8,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1, prediction_type=prediction_type,
    )  # fmt: skip
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    vae = vae.double().eval().requires_grad_(False)
    return SimpleNamespace(
        unet=unet.double().eval().requires_grad_(False), vae=vae, scheduler=scheduler,
        decode=lambda z: (vae.decode(z).sample / 2 + 0.5), device=torch.device("cpu"),
    )  # fmt: skip


def inputs(n: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noise, prompts and the empty prompt."""
    g = torch.Generator().manual_seed(1)
    noise = torch.randn(n, 4, 8, 8, generator=g, dtype=torch.float64)
    cond = 10 * torch.randn(n, 5, 12, generator=g, dtype=torch.float64)
    return noise, cond, torch.randn(1, 5, 12, generator=g, dtype=torch.float64)


def value(images: torch.Tensor) -> torch.Tensor:
    """Some smooth function of the images."""
    weights = torch.linspace(-1, 1, images[0].numel(), dtype=images.dtype).view(images[0].shape)
    return (images * weights).flatten(1).sum(1).sin().sum()


def oracle(
    model: SimpleNamespace, noise: torch.Tensor, cond: torch.Tensor, uncond: torch.Tensor
) -> torch.Tensor:
    """The whole graph, nothing detached, with diffusers' scheduler."""
    cond = cond.clone().requires_grad_()
    x = noise
    model.scheduler.set_timesteps(STEPS)
    for t in model.scheduler.timesteps:
        text = torch.cat([uncond.expand_as(cond), cond])
        low, high = model.unet(torch.cat([x, x]), t, text).sample.chunk(2)
        x = model.scheduler.step(low + SCALE * (high - low), t, x).prev_sample
    value(model.vae.decode(x).sample / 2 + 0.5).backward()
    assert cond.grad is not None
    return cond.grad


def ours(model: SimpleNamespace, grad_steps: str, chunk: int = 100) -> torch.Tensor:
    """The gradient as prompt optimisation takes it."""
    noise, cond, uncond = inputs()
    rollout = Rollout(model, uncond, STEPS, SCALE, GradSteps.parse(grad_steps))  # type: ignore[arg-type]
    chosen = rollout.grad_steps.choose(rollout.timesteps(), torch.Generator().manual_seed(0))

    def gradient_of(images: torch.Tensor) -> torch.Tensor:
        leaf = images.detach().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(value(leaf), leaf)[0]

    return accumulate(rollout, cond, noise, chosen, gradient_of, chunk)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_all_equals_the_full_graph(kind: str) -> None:
    """`--grad-steps all` is exact: equal to the oracle to 1e-9 of its size."""
    model = tiny_model(kind)
    expected = oracle(model, *inputs())
    assert expected.norm() > 1e-6
    for chunk in (3 * STEPS + 3, 3 * STEPS + 2, 3, 2, 1):
        got = ours(model, "all", chunk)
        assert (got - expected).norm() / expected.norm() < 1e-9, chunk


@pytest.mark.parametrize(("grad_steps", "calls"), [("all", 2 * STEPS), ("last:2", STEPS + 2),
                                                   ("random:2", STEPS + 2), ("x0@480", 3 + 1)])  # fmt: skip
def test_a_step_at_a_time_is_the_same_gradient(grad_steps: str, calls: int) -> None:
    """Beyond the drawing, one U-Net call for every step with gradient."""
    model = tiny_model()
    expected = ours(model, grad_steps)
    with counted(model.unet) as count:
        got = ours(model, grad_steps, chunk=2)
    assert (got - expected).norm() / expected.norm() < 1e-9
    assert count.calls == 2 * calls  # two chunks


def test_a_step_at_a_time_holds_one_step() -> None:
    """The most that is saved for backward at once does not grow with the steps."""
    model = tiny_model()
    noise, cond, uncond = inputs()

    def most(steps: int) -> int:
        held = highest = 0

        class Saved:
            def __init__(self, tensor: torch.Tensor) -> None:
                nonlocal held, highest
                self.tensor = tensor
                held += tensor.numel()
                highest = max(highest, held)

            def __del__(self) -> None:
                nonlocal held
                held -= self.tensor.numel()

        rollout = Rollout(model, uncond, steps, SCALE)  # type: ignore[arg-type]
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            accumulate(rollout, cond, noise, set(range(steps)), torch.ones_like, 3)
        assert held == 0
        return highest

    assert 0 < most(8) == most(2)


def test_one_graph_counts_the_decoding() -> None:
    """The graph of the VAE weighs as much as one of the U-Net's, and one run holds both."""
    model = tiny_model()
    for chunk, calls in ((6, 1), (5, 2)):  # of 3 images, one step with gradient; drawn again or not
        with counted(model.unet) as count:
            ours(model, "last:1", chunk)
        assert count.calls == STEPS + calls - 1, chunk


@pytest.mark.parametrize(("device", "gigabytes", "dtype", "expected"), [
    ("cpu", 0, torch.float32, 1), ("cuda", 8, torch.float32, 1), ("cuda", 24, torch.float32, 2),
    ("cuda", 80, torch.bfloat16, 14)])  # fmt: skip
def test_a_gpu_holds_what_it_has_room_for(
    monkeypatch: pytest.MonkeyPatch, device: str, gigabytes: int, dtype: torch.dtype, expected: int
) -> None:
    """Images of 512 px, in four fifths of what is free or kept by torch for later."""
    for name, found in {"mem_get_info": (gigabytes * 10**9 - 10**9, 10**12),
                        "memory_reserved": 3 * 10**9, "memory_allocated": 2 * 10**9}.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda device, found=found: found)
    model = SimpleNamespace(latent_shape=(4, 64, 64), device=torch.device(device), dtype=dtype)
    assert default_chunk(model) == expected  # type: ignore[arg-type]


def test_without_a_gradient_the_whole_run_is_drawn() -> None:
    """What is judged is the same for every --grad-steps."""
    model = tiny_model()
    noise, cond, uncond = inputs()
    ways = [Rollout(model, uncond, STEPS, SCALE, GradSteps.parse(g)) for g in ("all", "x0@480")]  # type: ignore[arg-type]
    with torch.no_grad():
        whole, x0 = (way.images(noise, cond, set()) for way in ways)
    torch.testing.assert_close(x0, whole, rtol=0, atol=0)


def test_truncation_keeps_less_and_less_of_the_gradient() -> None:
    """last:K approaches `all` as K grows and equals it at K = all steps."""
    model = tiny_model()
    full = ours(model, "all")
    errors = [
        float((ours(model, f"last:{k}") - full).norm() / full.norm()) for k in (1, 3, 5, STEPS)
    ]
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] < 1e-12
    assert errors[0] > 0.1


def test_random_steps_average_to_the_direction_of_all() -> None:
    """The mean over draws of random:2 points where `all` points (cosine above .9)."""
    model = tiny_model()
    noise, cond, uncond = inputs()
    full = ours(model, "all").flatten()
    rollout = Rollout(model, uncond, STEPS, SCALE, GradSteps.parse("random:2"))  # type: ignore[arg-type]
    total, generator = torch.zeros_like(full), torch.Generator().manual_seed(3)
    for _ in range(15):
        leaf = cond.clone().requires_grad_()
        value(
            rollout.images(noise, leaf, rollout.grad_steps.choose(rollout.timesteps(), generator))
        ).backward()
        total += leaf.grad.flatten()  # type: ignore[union-attr]
    assert torch.cosine_similarity(total, full, dim=0) > 0.9


def test_x0_gradient_is_that_of_one_step() -> None:
    """x0@T: the gradient of decoding x0(x_T) at the nearest timestep, with x_T constant."""
    model = tiny_model()
    noise, cond, uncond = inputs()
    model.scheduler.set_timesteps(STEPS)
    x = noise
    leaf = cond.clone().requires_grad_()
    for t in model.scheduler.timesteps:
        with torch.set_grad_enabled(int(t) == 499):
            text = torch.cat([uncond.expand_as(leaf), leaf])
            low, high = model.unet(torch.cat([x, x]), t, text).sample.chunk(2)
        step = model.scheduler.step(low + SCALE * (high - low), t, x)
        if int(t) == 499:
            break
        x = step.prev_sample
    value(model.decode(step.pred_original_sample)).backward()
    torch.testing.assert_close(ours(model, "x0@480"), leaf.grad, rtol=1e-9, atol=1e-12)


def test_steps_without_gradient_hold_no_graph() -> None:
    """last:1 saves as many tensors for backward as one step alone needs, not as many as `all`."""
    model = tiny_model()
    noise, cond, uncond = inputs()

    def saved(grad_steps: str) -> int:
        count = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal count
            count += tensor.numel()
            return tensor

        rollout = Rollout(model, uncond, STEPS, SCALE, GradSteps.parse(grad_steps))  # type: ignore[arg-type]
        chosen = rollout.grad_steps.choose(rollout.timesteps(), torch.Generator())
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            rollout.latents(noise, cond.clone().requires_grad_(), chosen)
        return count

    assert saved("last:1") * (STEPS - 1) < saved("all")


@pytest.mark.parametrize(
    "text", ["", "some", "last", "last:0", "last:²", "random:x", "x0", "x0:3", "last:-1"]
)
def test_a_wrong_grad_steps_is_a_usage_error(text: str) -> None:
    """It says what would be right."""
    with pytest.raises(UsageError, match="last:K"):
        GradSteps.parse(text)


def test_gradients_are_scaled_by_a_power_of_two_that_suits_half_precision() -> None:
    """The elements of an image of norm 1 come near to 1, and back to the bit."""
    image = torch.randn(3, 512, 512, generator=torch.Generator().manual_seed(0))
    image /= image.norm()
    scale = unit_scale(image)
    assert scale.bit_count() == 1 and torch.equal(image * scale / scale, image)
    scaled = (image * scale).square().mean().sqrt()
    assert 0.7 < scaled < 1.5
