"""Downstream classifiers f_theta: a small CNN, any timm architecture, or an open_clip image tower.

All of them take images in [0, 1] of any size, resize and normalise inside, and are differentiable
with respect to the images, so that utility can be pushed back into a generator.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..runtime.checkpoint import save_tensors
from ..runtime.errors import BadInput, NoInput, UsageError, first_line
from ..runtime.offline import offline
from ..runtime.seeds import seed_modules
from .clip import OPEN_CLIP, OPEN_CLIP_LORA, add_lora, is_clip, load_tower

SMALL_CNN = "small-cnn"


class Classifier(nn.Module):
    """Transform, tower, linear head.

    `transform` is {"size", "mean", "std"}; `tower` maps [B, 3, size, size] to features [B, D].
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        arch: str,
        tower: nn.Module,
        num_features: int,
        num_classes: int,
        transform: dict[str, Any],
        frozen: bool = False,
    ) -> None:
        super().__init__()
        self.arch, self.num_classes = arch, num_classes
        self.transform, self.frozen = transform, frozen
        self.tower = tower
        self.head = nn.Linear(num_features, num_classes)
        for name in ("mean", "std"):
            value = torch.tensor(transform[name]).view(1, 3, 1, 1)
            self.register_buffer(name, value, persistent=False)
        if frozen:
            self.tower.requires_grad_(False)

    def train(self, mode: bool = True) -> Classifier:
        """Switch the mode; a frozen tower stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.tower.eval()
        return self

    def prepare(self, images_bchw: Tensor) -> Tensor:
        """Resize and normalise images in [0, 1]; one channel becomes three."""
        x, size = images_bchw, self.transform["size"]
        if x.shape[1] == 1:
            x = x.expand(-1, 3, -1, -1)
        if x.shape[-2:] != (size, size):
            x = F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)
        return (x - self.mean) / self.std

    def features(self, images_bchw: Tensor) -> Tensor:
        """Penultimate features [B, D]."""
        return self.tower(self.prepare(images_bchw))

    def forward(self, images_bchw: Tensor) -> Tensor:
        """Logits [B, C]."""
        return self.head(self.features(images_bchw))


def conv_block(channels_in: int, channels_out: int) -> nn.Sequential:
    """4x4 convolution of stride 2 (it halves the sides), batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 4, 2, 1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )


def small_cnn_tower(widths: tuple[int, int, int] = (32, 64, 128)) -> nn.Sequential:
    """Three strided convolutions and a mean: 166,000 parameters, features [B, 128].

    On 16 shots of Fashion-MNIST it beats 3x3 convolutions with pooling (75 against 73 %) at a
    quarter of their time a step.
    """
    a, b, c = widths
    return nn.Sequential(
        conv_block(3, a),
        conv_block(a, b),
        conv_block(b, c),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def build_classifier(
    arch: str,
    num_classes: int,
    image_size: int,
    pretrained: bool = False,
    seed: int = 0,
    like: Classifier | None = None,
) -> Classifier:
    """Build f_theta; the weights depend on `seed` only (and on the pretrained file, if asked for).
    Where a tower is never trained, it is that of `like`, one of the same architecture.

    `arch` is "small-cnn", a timm name ("resnet50"), or "open_clip:" with a model name (optionally
    NAME/TAG for its weights) or a local directory: a frozen image tower under a linear head. With
    "open_clip-lora:" the tower gets trainable low-rank adapters.
    Raises UsageError for an unknown name, NoInput when weights cannot be had.
    """
    with torch.random.fork_rng([]):
        seed_modules(seed)
        if arch == SMALL_CNN:
            transform = {"size": image_size, "mean": (0.5,) * 3, "std": (0.25,) * 3}
            return Classifier(arch, small_cnn_tower(), 128, num_classes, transform)
        if like is not None and has_common_tower(arch):
            return _beside(like, num_classes)
        if is_clip(arch):
            model = _clip_classifier(arch, num_classes)
            if has_common_tower(arch):  # the head is the one that it has beside another's tower
                seed_modules(seed)
                model.head.reset_parameters()
            return model
        return _timm_classifier(arch, num_classes, image_size, pretrained)


def has_common_tower(arch: str) -> bool:
    """True where a classifier never trains its tower, so that several can share one."""
    return arch.startswith(OPEN_CLIP)


def _beside(like: Classifier, num_classes: int) -> Classifier:
    """A classifier on the same frozen tower, with a head of its own."""
    width, facts = like.head.in_features, like.transform
    return Classifier(like.arch, like.tower, width, num_classes, facts, frozen=True)


def refuse_pretrained(archs: Sequence[str], pretrained: bool) -> None:
    """UsageError where nobody has weights to start from."""
    if pretrained and set(archs) <= {SMALL_CNN}:
        raise UsageError("--pretrained", f"there are no weights of {SMALL_CNN}",
                         "Name a timm model with --arch.")  # fmt: skip


def refuse_unknown(archs: Sequence[str]) -> None:
    """UsageError for a name that is neither ours, open_clip's by its prefix, nor timm's."""
    named = [arch for arch in archs if arch != SMALL_CNN and not is_clip(arch)]
    if not named:
        return
    import timm

    for arch in named:
        if not timm.is_model(arch):
            raise UsageError(
                f"--arch {arch}", "unknown architecture",
                f"Use {SMALL_CNN}, a timm name such as resnet50, or {OPEN_CLIP}NAME-or-directory "
                f"({OPEN_CLIP_LORA}... to adapt the tower).",
            )  # fmt: skip


def _timm_classifier(arch: str, num_classes: int, image_size: int, pretrained: bool) -> Classifier:
    import timm
    from timm.data import resolve_model_data_config

    refuse_unknown([arch])
    try:
        tower = timm.create_model(arch, pretrained=pretrained, num_classes=0)
    except (OSError, RuntimeError, ValueError) as error:
        raise _no_weights(arch, error) from None
    data = resolve_model_data_config(tower)
    facts: Any = tower.pretrained_cfg
    size = data["input_size"][-1] if facts.get("fixed_input_size") else image_size
    transform = {"size": size, "mean": tuple(data["mean"]), "std": tuple(data["std"])}
    return Classifier(arch, tower, feature_width(tower, size), num_classes, transform)


def _clip_classifier(
    arch: str, num_classes: int, transform: dict[str, Any] | None = None
) -> Classifier:
    """With a transform the tower is an empty one, whose weights come from elsewhere."""
    try:
        tower, own = load_tower(arch, weights=transform is None)
    except Exception as error:  # open_clip, the hub and the unpicklers each raise their own
        raise _no_weights(arch, error) from None
    transform = transform or own
    width = feature_width(tower, transform["size"])
    model = Classifier(arch, tower, width, num_classes, transform, frozen=True)
    if arch.startswith(OPEN_CLIP_LORA):
        add_lora(tower)
    return model


def _no_weights(arch: str, error: Exception) -> NoInput:
    return NoInput(
        f"--arch {arch}", f"cannot be built ({first_line(error)})",
        "Download it once with network access, name a local directory, or train from scratch.",
    )  # fmt: skip


@torch.no_grad()
def feature_width(tower: nn.Module, size: int) -> int:
    """D of a tower's output for images of `size`, found by asking it (in eval mode)."""
    tower.eval()
    width = tower(torch.zeros(1, 3, size, size)).shape[-1]
    tower.train()
    return width


def learnt_state(model: Classifier) -> dict[str, Tensor]:
    """Its state, without that of a tower that is never trained."""
    if has_common_tower(model.arch):
        return {f"head.{name}": t for name, t in model.head.state_dict().items()}
    return model.state_dict()


def load_learnt(model: Classifier, state: dict[str, Tensor]) -> None:
    """Load what `learnt_state` gave. RuntimeError: it lacks something, or has another shape."""
    kept = model.state_dict()
    for name in learnt_state(model):
        del kept[name]
    model.load_state_dict({**kept, **state})


def save_classifier(path: Path, model: Classifier, whole: bool = True) -> None:
    """Write one safetensors file whose metadata holds the JSON that rebuilds the module.

    Unless `whole`, a tower that is never trained is left out: `load_classifier` is told of one.
    """
    facts = {
        "arch": model.arch,
        "num_classes": model.num_classes,
        "transform": model.transform,
    }
    state = model.state_dict() if whole else learnt_state(model)
    save_tensors(path, state, {"classifier": json.dumps(facts, sort_keys=True)})


def load_classifier(path: Path, like: Classifier | None = None, share: bool = False) -> Classifier:
    """Read what `save_classifier` wrote; the model comes back on the CPU in eval mode.

    A tower that is not in the file is that of `like`; `share`: one that is, too.
    Raises NoInput when there is no such file, BadInput when it is not one of ours.
    """
    if not path.exists():
        raise NoInput(str(path), "no such classifier", "Train one with utilgen value train.")
    try:
        with safe_open(path, framework="pt") as f:
            facts = json.loads((f.metadata() or {})["classifier"])
            names = [name for name in f.keys() if not (share and name.startswith("tower."))]  # noqa: SIM118
            tensors = {name: f.get_tensor(name) for name in names}
    except (SafetensorError, KeyError, ValueError) as error:
        raise BadInput(str(path), f"not a classifier file ({error})") from None
    arch, count, transform = (facts[name] for name in ("arch", "num_classes", "transform"))
    whole = not has_common_tower(arch) or any(name.startswith("tower.") for name in tensors)
    try:
        with offline(), torch.random.fork_rng([]):
            if like is not None and like.arch == arch and not whole:
                model = _beside(like, count)
                load_learnt(model, tensors)
                return model.eval()
            if is_clip(arch):
                model = _clip_classifier(arch, count, transform)
            else:
                model = build_classifier(arch, count, transform["size"])
        model.load_state_dict(tensors)
    except RuntimeError:
        raise BadInput(
            str(path), f"holds other weights than {arch} has here", "Train it again."
        ) from None
    return model.eval()
