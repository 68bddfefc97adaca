"""Continue a prompt by sampling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


@torch.no_grad()
def sample(
    model: Callable[..., Any],
    prompt: list[int],
    *,
    num_tokens: int,
    vocab_size: int,
    context: int,
    seed: int,
    device: torch.device,
    temperature: float = 0.8,
    top_k: int = 50,
) -> list[int]:
    """Token ids that follow ``prompt``.

    With a sharded model all ranks must call it together; they draw the same tokens, from the same seed.

    Args:
        model: the engine (or a bare model) in evaluation mode.
        prompt: token ids, at least one.
        num_tokens: how many to draw.
        vocab_size: tokens that the tokenizer has; the embedding's padding rows are never drawn.
        context: how many of the last tokens the model is shown.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt)
    for _ in range(num_tokens):
        window = torch.tensor([ids[-context:]], device=device)
        logits_V = model(window, last_only=True)[0, -1, :vocab_size].float().cpu()
        best = logits_V.topk(min(top_k, vocab_size))
        probs = (best.values / temperature).softmax(dim=0)
        ids.append(int(best.indices[torch.multinomial(probs, 1, generator=generator)]))
    return ids[len(prompt) :]
