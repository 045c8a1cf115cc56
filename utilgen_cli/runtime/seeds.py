"""Random numbers that depend on what they are for, never on the order of the work."""

from __future__ import annotations

import hashlib

import torch


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from any printable parts (blake2b), the same on every machine."""
    text = "\x1f".join(str(part) for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def sample_generator(seed: int, class_index: int, image_index: int) -> torch.Generator:
    """The CPU generator of image `image_index` of class `class_index` under `seed`."""
    return torch.Generator().manual_seed(derive_seed("sample", seed, class_index, image_index))


def step_generator(seed: int, step: int, purpose: str = "step") -> torch.Generator:
    """The CPU generator of one training step: a resumed run draws what it would have drawn."""
    return torch.Generator().manual_seed(derive_seed(purpose, seed, step))


def seed_modules(seed: int) -> None:
    """Seed the generator that modules on the CPU begin from. (`torch.manual_seed` would seed every
    GPU's as well.)"""
    torch.default_generator.manual_seed(derive_seed("global", seed))
