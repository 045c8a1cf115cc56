"""Objectives, CLIP scores and set terms against independent computations."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tests.policy_parts import make_clip, publish_clip
from utilgen_cli.classification.models import build_classifier
from utilgen_cli.diffusion.bundle import find_model
from utilgen_cli.diffusion.clip import image_image_score, image_text_score, load_clip
from utilgen_cli.diffusion.image_gradients import Term, image_gradients
from utilgen_cli.diffusion.objectives import make_objective
from utilgen_cli.diffusion.set_terms import coverage, gradient_match, spread
from utilgen_cli.runtime.errors import BadInput, NoInput, UsageError

TEXTS = ["a dress", "a bag", "an ankle boot"]


def images(n: int, size: int = 16, seed: int = 0) -> torch.Tensor:
    """Random pictures whose pixels are multiples of 1/255, as files have them."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, size, size), generator=g).float() / 255


@pytest.mark.parametrize(
    ("shape", "mode"), [((40, 40), "squash"), ((24, 40), "squash"), ((24, 40), "shortest")]
)
def test_clip_preprocessing_equals_open_clips_own(
    tmp_path: Path, shape: tuple[int, int], mode: str
) -> None:
    """Our differentiable transform agrees with open_clip's on PIL images to two grey levels."""
    clip = load_clip(str(make_clip(tmp_path / "clip", resize_mode=mode)))
    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'clip'}")
    low = torch.rand(1, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    smooth = (F.interpolate(low, shape, mode="bilinear") * 255).round() / 255
    pil = Image.fromarray((smooth[0] * 255).byte().permute(1, 2, 0).numpy().astype(np.uint8))
    difference = (clip.preprocess(smooth)[0] - transform(pil)).abs() * clip.std[0]
    assert difference.max() < 2.5 / 255


def test_published_weights_run_with_the_activation_that_they_were_trained_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name of OpenAI's models says nothing of QuickGELU; the tag of their weights does."""
    trained, _ = publish_clip(monkeypatch, tmp_path / "small")
    for name in ("small:openai", "small"):  # the second takes the first tag there is
        clip = load_clip(name)
        x = images(3)
        with torch.no_grad():
            expected = F.normalize(trained.encode_image(clip.preprocess(x)), dim=1)
        torch.testing.assert_close(clip.image_embeds(x), expected)


def test_clip_scores_are_cosines_of_open_clips_embeddings(tmp_path: Path) -> None:
    """image-to-text and image-to-image forms, and zero-shot labels, computed again from scratch."""
    path = make_clip(tmp_path / "clip")
    clip, model = load_clip(str(path)), open_clip.create_model(f"local-dir:{path}").eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{path}")
    x, y, shots = images(4), torch.tensor([0, 1, 2, 1]), images(6, seed=1)
    shot_labels = torch.tensor([0, 0, 1, 1, 2, 2])
    with torch.no_grad():
        normal = lambda z: (z - clip.mean) / clip.std  # noqa: E731
        a = F.normalize(model.encode_image(normal(x)), dim=1)
        b = F.normalize(model.encode_image(normal(shots)), dim=1)
        t = F.normalize(model.encode_text(tokenizer(TEXTS)), dim=1)
        by_text = image_text_score(clip, TEXTS)(x, y)
        by_image = image_image_score(clip, shots, shot_labels)(x, y)
    for i in range(4):
        assert by_text[i] == pytest.approx(float(a[i] @ t[y[i]]), abs=1e-5)
        own = [float(a[i] @ b[j]) for j in range(6) if shot_labels[j] == y[i]]
        assert by_image[i] == pytest.approx(sum(own) / 2, abs=1e-5)
    assert clip.zero_shot(x, clip.text_embeds(TEXTS)).tolist() == (a @ t.T).argmax(1).tolist()


def test_an_unknown_clip_says_what_to_do() -> None:
    with pytest.raises(NoInput, match="NAME:PRETRAINED"):
        load_clip("no-such-model")


def judged(x: torch.Tensor, y: torch.Tensor) -> SimpleNamespace:
    """A stand-in value model that is linear in the images' means."""
    logits = torch.stack([x.mean((1, 2, 3)) * k for k in (1.0, 2.0, -1.0)], 1)
    losses = F.cross_entropy(logits, y, reduction="none")
    return SimpleNamespace(logit=3 - losses, loss=losses, probabilities=logits.softmax(1))


def test_built_in_objectives_are_what_they_say() -> None:
    """utility is the logit, loss the cross-entropy, entropy that of the predictive distribution."""
    x, y = images(4), torch.tensor([0, 1, 2, 1])
    verdict = judged(x, y)
    torch.testing.assert_close(make_objective("utility", judged, None)(x, y), verdict.logit)
    torch.testing.assert_close(make_objective("loss", judged, None)(x, y), verdict.loss)
    expected = torch.distributions.Categorical(verdict.probabilities).entropy()
    torch.testing.assert_close(make_objective("entropy", judged, None)(x, y), expected)


def brightness(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """An objective of one's own."""
    return x.mean((1, 2, 3))


def one_number(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A wrong one: no score an image."""
    return x.mean()


def in_numpy(x: torch.Tensor, y: torch.Tensor) -> object:
    return x.detach().mean((1, 2, 3)).numpy()


def cut_off(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x.detach().mean((1, 2, 3))


def broken(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    raise KeyError("x")


def out_of_memory(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")


def its_input(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    raise BadInput("shots/", "has no images")


@pytest.mark.parametrize(("function", "kind"), [("out_of_memory", RuntimeError), ("its_input", BadInput)])  # fmt: skip
def test_what_has_a_word_of_its_own_keeps_it(function: str, kind: type[Exception]) -> None:
    with pytest.raises(kind) as found:
        make_objective(f"{__name__}:{function}", judged, None)(images(4), torch.zeros(4))
    assert "--objective" not in str(found.value)


@pytest.mark.parametrize(("function", "why"), [
    ("one_number", r"returned shape \(\), not \(4,\)\. Return one score an image"),
    ("in_numpy", "returned ndarray. Return a torch.Tensor of one score an image"),
    ("cut_off", "returned scores without a gradient to the images"), ("broken", "raised KeyError: 'x'")])  # fmt: skip
def test_what_is_wrong_with_an_objective_is_said_of_it(function: str, why: str) -> None:
    x, y = images(4).requires_grad_(), torch.tensor([0, 1, 2, 1])
    with pytest.raises(UsageError, match=f"--objective {__name__}:{function}: {why}"):
        make_objective(f"{__name__}:{function}", judged, None)(x, y)


def test_an_objective_can_be_imported_and_is_checked() -> None:
    x, y = images(4), torch.tensor([0, 1, 2, 1])
    own = make_objective(f"{__name__}:brightness", judged, None)
    torch.testing.assert_close(own(x, y), x.mean((1, 2, 3)))
    for name in ("nothing", "no_such_module:f", f"{__name__}:absent"):
        with pytest.raises(UsageError, match="MODULE:FUNCTION"):
            make_objective(name, judged, None)


def test_a_terms_own_scale_does_not_matter() -> None:
    """Multiplying a score by 1,000 leaves the normalised gradient as it was; its weight counts."""
    x, y = images(4), torch.tensor([0, 1, 2, 1])

    def score(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x.square().mean((1, 2, 3))

    one, _ = image_gradients([Term("a", 1.0, score)], x, y)
    big, scales = image_gradients([Term("a", 1.0, lambda x, y: 1000 * score(x, y))], x, y)
    twice, _ = image_gradients([Term("a", 2.0, score)], x, y)
    torch.testing.assert_close(one, big)
    torch.testing.assert_close(2 * one, twice)
    assert one.flatten(1).norm(dim=1).square().mean().sqrt() == pytest.approx(1, rel=1e-5)
    assert scales["a"] == pytest.approx(
        1000 * 2 * float(x.square().sum((1, 2, 3)).mean().sqrt()) / x[0].numel(), rel=1e-4
    )


def flat(x: torch.Tensor) -> torch.Tensor:
    """Pixels as features."""
    return x.flatten(1)


@pytest.mark.parametrize("rows", [1, 4, 5, 12])
def test_terms_that_see_a_few_classes_at_once_give_the_same_gradient(rows: int) -> None:
    """Of 3 classes with 4 images each: a score a sample, and one a class."""
    x, y = images(12), torch.arange(3).repeat(4)
    weights = torch.rand(3 * 16 * 16, 5, generator=torch.Generator().manual_seed(1))
    seen = []

    def score(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen.append(len(images))
        return (images.flatten(1) @ weights).pow(2).mean(1) * (labels + 1)

    terms = [Term("a", 1.0, score), Term("b", 0.5, spread(lambda z: z.flatten(1) @ weights))]
    whole, scales = image_gradients(terms, x, y)
    seen.clear()
    blocks, again = image_gradients(terms, x, y, rows)
    torch.testing.assert_close(blocks, whole)
    assert again == pytest.approx(scales, rel=1e-4)
    place = x.clone()
    there, _ = image_gradients(terms, place, y, rows, in_place=True)
    assert there is place and torch.equal(there, blocks)
    assert seen[: len(seen) // 2] == {1: [4, 4, 4], 4: [4, 4, 4], 5: [4, 4, 4], 12: [12]}[rows]


def test_spread_is_the_mean_pairwise_distance_within_a_class() -> None:
    """Written out pair by pair; copies of one image have none, and it falls as images draw together."""
    x, y = images(6), torch.tensor([1, 0, 0, 1, 1, 0])
    z = F.normalize(flat(x), dim=1)
    expected = []
    for c in (0, 1):
        own = [i for i in range(6) if y[i] == c]
        pairs = [(i, j) for i in own for j in own if i < j]
        expected.append(sum(1 - float(z[i] @ z[j]) for i, j in pairs) / len(pairs))
    assert spread(flat)(x, y).tolist() == pytest.approx(expected, abs=1e-5)
    assert spread(flat)(x[:1].expand(6, -1, -1, -1), y).abs().max() < 1e-5


def test_coverage_prefers_images_near_all_real_shots() -> None:
    """Two images at both modes cover two shots better than two images at one of them."""
    shots, labels = images(2), torch.tensor([0, 0])
    term = coverage(flat, shots, labels)
    both = term(shots, labels)
    one = term(shots[:1].expand(2, -1, -1, -1), labels)
    assert both > one


def test_many_shots_are_looked_at_in_parts_and_count_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = load_clip(str(make_clip(tmp_path / "clip")))
    x, y, shots, labels = (
        images(4),
        torch.tensor([0, 1, 0, 1]),
        images(7, seed=1),
        torch.arange(7) % 2,
    )

    def scores() -> list[torch.Tensor]:
        return [coverage(flat, shots, labels)(x, y), image_image_score(clip, shots, labels)(x, y)]

    whole = scores()
    for module in ("clip", "set_terms"):
        monkeypatch.setattr(f"utilgen_cli.diffusion.{module}.AT_ONCE", 2)
    for one, other in zip(whole, scores(), strict=True):
        torch.testing.assert_close(one, other)


def test_gradient_match_equals_plain_autograd() -> None:
    """Per class and weight the cosine of two gradients, each from its own backward pass."""
    net = build_classifier("small-cnn", 3, 16).eval()
    shots, labels = images(6, seed=1), torch.tensor([0, 1, 2, 0, 1, 2])
    x, y = images(9, seed=2), torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
    term = gradient_match([net], shots, labels)(x, y)
    weights = [p for p in net.parameters() if p.dim() >= 2]
    for c in range(3):
        g = torch.autograd.grad(F.cross_entropy(net(x[y == c]), y[y == c]), weights)
        real = labels == c
        h = torch.autograd.grad(F.cross_entropy(net(shots[real]), labels[real]), weights)
        cosines = [
            float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0))
            for a, b in zip(g, h, strict=True)
        ]
        assert term[c] == pytest.approx(sum(cosines) / len(cosines), abs=1e-4)
    same = gradient_match([net], shots, labels)(shots, labels)
    torch.testing.assert_close(same, torch.ones(3), atol=1e-4, rtol=0)


@pytest.mark.parametrize("arch", ["small-cnn", f"open_clip:{find_model('tiny') / 'open_clip'}"])
def test_gradient_match_can_be_differentiated(arch: str) -> None:
    """A small step along its gradient raises it."""
    net = build_classifier(arch, 2, 16).eval()
    term = gradient_match([net], images(4, seed=1), torch.tensor([0, 0, 1, 1]))
    x, y = images(4, seed=3).requires_grad_(), torch.tensor([0, 0, 1, 1])
    before = term(x, y).sum()
    (g,) = torch.autograd.grad(before, x)
    with torch.no_grad():
        after = term(x + 0.05 * g / g.norm(), y).sum()
    assert after > before


def test_gradient_match_takes_unequal_numbers_of_shots() -> None:
    """Only the drawn images are equally many; a class's shots count by their mean."""
    torch.manual_seed(0)
    net = build_classifier("small-cnn", 2, 16)
    shots, labels = images(5), torch.tensor([0, 1, 0, 0, 1])
    x, y = images(4, seed=1), torch.tensor([0, 0, 1, 1])
    both = gradient_match([net], shots, labels)(x, y)
    each = [gradient_match([net], shots[labels == c], labels[labels == c])(x[y == c], y[y == c])
            for c in (0, 1)]  # fmt: skip
    torch.testing.assert_close(both, torch.cat(each))


def test_unequal_classes_are_refused() -> None:
    with pytest.raises(UsageError, match="equally many"):
        spread(flat)(images(3), torch.tensor([0, 0, 1]))
