"""Attention with linear biases (ALiBi, arXiv 2108.12409), symmetric as an encoder needs it.

Shapes: H heads, T queries, S sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor


def alibi_slopes(num_heads: int) -> list[float]:
    """The heads' slopes: 2^(-8/H), 2^(-16/H), ..., 2^-8 (section 3).

    Where H is no power of two, those of the power below, and between them every other one of the power above, as the
    paper's own code has it.
    """
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (head + 1) / power) for head in range(power)]
    if power == num_heads:
        return slopes
    return slopes + alibi_slopes(2 * power)[::2][: num_heads - power]


def alibi_bias(length: int, num_heads: int, device: torch.device, queries: int | None = None) -> Tensor:
    """What is added to the attention scores: -slope * |i - j|, fp32 [H, T, S].

    The distance counts alike in both directions. Left and right are told apart by what is at a known place: the first
    token, say, which is further from the last one.

    Args:
        length: S.
        queries: the last T positions alone look; None for all.
    """
    places = torch.arange(length, dtype=torch.float32, device=device)
    distances_TS = (places[length - (queries or length) :, None] - places[None, :]).abs()
    return -torch.tensor(alibi_slopes(num_heads), device=device)[:, None, None] * distances_TS
