"""What prompt optimisation moves: M prompts a class, as class-token or as prompt embeddings.

Shapes: C classes, M members, L tokens, E width of a token embedding, D of the encoded prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..runtime.seeds import derive_seed

if TYPE_CHECKING:
    from .load import LatentDiffusion


class PromptEmbeds(nn.Module):
    """theta [C, M, L, D]: the text encoder's output itself."""

    def __init__(
        self, model: LatentDiffusion, prompts: Sequence[str], population: int, seed: int
    ) -> None:
        super().__init__()
        with torch.no_grad():
            start = model.encode_prompts(prompts).float()
        self.theta = nn.Parameter(
            spread_members(start, torch.ones_like(start[..., :1]), population, seed)
        )

    @classmethod
    def at(cls, embeds: Tensor) -> PromptEmbeds:
        """The given prompts, [C, M, L, D]."""
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.theta = nn.Parameter(embeds.clone())
        return self

    def forward(self, classes: Tensor, members: Tensor) -> Tensor:
        """Prompt embeddings [B, L, D] of the given members."""
        return taken(self.theta.flatten(0, 1), classes * self.theta.shape[1] + members)


class TokenEmbeds(nn.Module):
    """theta [C, M, L, E]: embeddings of the class's tokens, which the text encoder then reads."""

    def __init__(
        self,
        model: LatentDiffusion,
        prompts: Sequence[str],
        population: int,
        seed: int,
        template: str,
    ) -> None:
        super().__init__()
        self.text_encoder = [model.text_encoder]  # in a list: its weights are not this module's
        self.ids = model.token_ids(prompts)  # [C, L]
        empty = model.token_ids([template.replace("{}", "")])[0]
        end = model.tokenizer.eos_token_id
        rows = [class_positions(row, empty, end) for row in self.ids]
        self.mask = torch.stack(rows).unsqueeze(-1)  # [C, L, 1]
        with torch.no_grad():
            start = model.text_encoder.get_input_embeddings()(self.ids).float()
        self.start = start
        self.theta = nn.Parameter(spread_members(start, self.mask, population, seed))

    def forward(self, classes: Tensor, members: Tensor) -> Tensor:
        """Prompt embeddings [B, L, D] of the given members; each is encoded once."""
        population = self.theta.shape[1]
        wanted, back = torch.unique(classes * population + members, return_inverse=True)
        c, theta = wanted // population, taken(self.theta.flatten(0, 1), wanted)
        tokens = torch.where(self.mask[c], theta, self.start[c])
        with replaced_embeddings(self.text_encoder[0], tokens):
            encoded = self.text_encoder[0](self.ids[c]).last_hidden_state.float()
        return taken(encoded, back)


def taken(x: Tensor, at: Tensor) -> Tensor:
    """x[at], [*at.shape, ...], where rows are taken more than once: the gradient of an indexed
    tensor then depends on the order in which the threads of a CPU add, and this one does not."""
    return F.embedding(at, x.flatten(1)).unflatten(-1, x.shape[1:])


@contextmanager
def replaced_embeddings(text_encoder: Any, tokens: Tensor) -> Iterator[None]:
    """Inside the block the encoder sees `tokens` [B, L, E] instead of the embeddings of its ids."""
    layer = text_encoder.get_input_embeddings()
    handle = layer.register_forward_hook(lambda module, inputs, output: tokens.to(output.dtype))
    try:
        yield
    finally:
        handle.remove()


def class_positions(ids: Tensor, empty: Tensor, end: int) -> Tensor:
    """bool [L]: where `ids` holds the class name, by comparison with the prompt without it."""
    row, bare = (content(x.tolist(), end) for x in (ids, empty))
    head = common_prefix(row, bare)
    tail = common_prefix(row[head:][::-1], bare[head:][::-1])
    found = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    found[head : max(head + 1, len(row) - tail)] = True
    return found


def content(ids: list[int], end: int) -> list[int]:
    """The ids before the first end-of-text (never at the very start)."""
    return ids[: ids.index(end, 1)] if end in ids[1:] else ids


def common_prefix(a: list[int], b: list[int]) -> int:
    """Length of the longest common prefix."""
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


def spread_members(
    start: Tensor, mask: Tensor, population: int, seed: int, scale: float = 0.1
) -> Tensor:
    """[C, M, L, D] from [C, L, D]: member 0 is the start, the rest `scale` of its RMS away."""
    generator = torch.Generator().manual_seed(derive_seed("ilpo-population", seed))
    shape = (start.shape[0], population, *start.shape[1:])
    jitter = torch.randn(shape, generator=generator).to(start)
    jitter[:, 0] = 0
    return start[:, None] + scale * rms(start) * jitter * mask[:, None]


def rms(x: Tensor) -> float:
    """Root mean square."""
    return float(x.float().square().mean().sqrt())
