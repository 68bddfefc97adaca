"""Generation without a cache: a forward pass over the whole sequence for every token.

It is what a model under an engine can do, whose forward pass alone is known to gather its weights; and what the cached
path is held against.

Shapes: B sequences, S tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_scale.generate.batch import Batch, Request, generate
from moe_scale.generate.sampling import Sampling
from moe_scale.generate.text import Tokenizer


class Rows(NamedTuple):
    """A :class:`moe_scale.models.cache.State`: each sequence's tokens so far."""

    ids: tuple[Tensor, ...]

    def select(self, rows: Tensor) -> Rows:
        return Rows(tuple(self.ids[row] for row in rows.tolist()))

    def join(self, other: Rows) -> Rows:
        return Rows(self.ids + other.ids)


class FullPasses:
    """A :class:`moe_scale.models.cache.CausalModel` made of forward passes, one for each row and token.

    Args:
        forward: ids_BS to logits [B, S or 1, V], the last of which counts: a model in evaluation mode, or an engine.
        window: how many of the last tokens it is shown.
    """

    max_positions = None

    def __init__(self, forward: Callable[..., Any], window: int):
        self.forward, self.window = forward, window

    def start(self, ids_BS: Tensor, valid_BS: Tensor | None = None) -> tuple[Tensor, Rows]:
        rows = [*ids_BS] if valid_BS is None else [ids[valid] for ids, valid in zip(ids_BS, valid_BS, strict=True)]
        return self._logits(Rows(tuple(rows)))

    def step(self, ids_B: Tensor, state: Rows) -> tuple[Tensor, Rows]:
        return self._logits(
            Rows(tuple(torch.cat([ids, new]) for ids, new in zip(state.ids, ids_B.split(1), strict=True)))
        )

    @torch.no_grad()
    def _logits(self, rows: Rows) -> tuple[Tensor, Rows]:
        seen = (ids[-self.window :].unsqueeze(0) for ids in rows.ids)
        return torch.stack([self.forward(ids_BS)[0, -1] for ids_BS in seen]), rows


def sample_ids(
    forward: Callable[..., Any],
    tokenizer: Tokenizer,
    prompt: list[int],
    *,
    num_tokens: int,
    window: int,
    seed: int,
    device: torch.device,
    temperature: float = 0.8,
    top_k: int = 50,
) -> list[int]:
    """``num_tokens`` tokens that follow ``prompt``, end-of-text tokens and what is after them included.

    With a sharded model all ranks must call it together: they take the same number of forward passes, whatever they
    draw, and draw the same tokens, from the same seed.

    Args:
        forward: as :class:`FullPasses` takes it.
        prompt: token ids, at least one.
        window: how many of the last tokens the model is shown.
    """
    batch: Batch[int] = Batch(FullPasses(forward, window), tokenizer, context=len(prompt) + num_tokens, device=device)
    sampling = Sampling(temperature=temperature, top_k=top_k, seed=seed)
    request = Request(prompt, num_tokens, sampling, stop_at_eot=False)
    return [event.token for event in generate(batch, [(0, request)], batch_size=1)]
