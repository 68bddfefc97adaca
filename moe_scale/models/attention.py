"""Grouped-query attention with RoPE, QK-norm and an output gate.

Shapes: B batch, S sequence, T new tokens, D model width, H query heads, G key/value heads, A head width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_scale.config import DecoderConfig
from moe_scale.initialization import Init
from moe_scale.models.cache import KeysValues
from moe_scale.models.layers import Linear


class Rope(NamedTuple):
    """Cosines and sines of the rotation angles, each [S, A], or [B, 1, S, A] where rows have their own positions."""

    cos: Tensor
    sin: Tensor


def rope_tables(seq_len: int, head_width: int, theta: float, device: torch.device, start: int = 0) -> Rope:
    """Angles of rotary position embedding (arXiv 2104.09864), halves rotated against each other.

    Computed anew in fp32 for each forward pass: a buffer would be cast to bf16 with the model, and positions above
    256 have no exact bf16 value.
    """
    return rope_at(torch.arange(start, start + seq_len, device=device), head_width, theta)


def rope_at(positions: Tensor, head_width: int, theta: float) -> Rope:
    """The angles of any positions: those of a sequence [S], or of each row's own [B, 1, S]."""
    even = torch.arange(0, head_width, 2, dtype=torch.float32, device=positions.device)
    angles = positions.float().unsqueeze(-1) * theta ** (-even / head_width)
    angles = torch.cat([angles, angles], dim=-1)
    return Rope(angles.cos(), angles.sin())


def rotate(x_BHSA: Tensor, rope: Rope) -> Tensor:
    """Turn each pair (a, a + A/2) of a head by its position's angle."""
    first, second = x_BHSA.chunk(2, dim=-1)
    swapped = torch.cat([-second, first], dim=-1)
    return x_BHSA * rope.cos.to(x_BHSA.dtype) + swapped * rope.sin.to(x_BHSA.dtype)


def attention_mask(document_ids_BS: Tensor, queries: int | None = None) -> Tensor:
    """Which keys each query may see: earlier tokens of its own document. Returns bool [B, 1, T, S].

    Padding carries an id of its own and so is seen by padding alone; it sees itself at least, so that no row is
    empty (a softmax over nothing is NaN).

    Args:
        queries: T, the last of the tokens; None is all of them.
    """
    seq_len = document_ids_BS.shape[1]
    queries = seq_len if queries is None else queries
    earlier = torch.ones(queries, seq_len, dtype=torch.bool, device=document_ids_BS.device).tril(seq_len - queries)
    same = document_ids_BS[:, seq_len - queries :].unsqueeze(2) == document_ids_BS.unsqueeze(1)
    return (same & earlier).unsqueeze(1)


class Attention(nn.Module):
    """Causal self-attention: one fused QKV projection, GQA (arXiv 2305.13245), QK-norm (arXiv 2302.05442), optional
    gate.

    The gate (G1 of arXiv 2505.06708) multiplies the attention's output, before the output projection, by a sigmoid
    of the layer's normed input: one value a head and position (``headwise``) or one an element (``elementwise``).
    """

    def __init__(self, config: DecoderConfig, init: Init, depth_scale: float):
        super().__init__()
        self.heads, self.kv_heads, self.width = config.num_heads, config.num_kv_heads, config.head_width
        inner = self.heads * self.width
        self.qkv = Linear(config.d_model, inner + 2 * self.kv_heads * self.width, init / "qkv")
        self.q_norm = _qk_norm(config, self.heads)
        self.k_norm = _qk_norm(config, self.kv_heads)
        self.out = Linear(inner, config.d_model, init / "out", std=depth_scale * inner**-0.5)
        self.gate: Linear | None = None
        if config.attention_gate != "none":
            gates = inner if config.attention_gate == "elementwise" else self.heads
            self.gate = Linear(config.d_model, gates, init / "gate")

    def forward(
        self,
        x_BSD: Tensor,
        rope: Rope,
        mask: Tensor | None = None,
        want_sink: bool = False,
        valid_BS: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            x_BSD: the normed hidden states.
            mask: bool [B, 1, S, S], True where a query may look; None is plain causal.
            want_sink: also measure the attention sink, which takes an explicit softmax and S^2 memory.
            valid_BS: bool, False for padding, whose queries count in no sink share.

        Returns:
            output_BSD, and with ``want_sink`` the share of attention that queries give to the first token they may
            see, averaged over heads and queries (that token's own query, which has no choice, left out).
        """
        q_BHSA, offered = self._project(x_BSD, rope)
        y_BSD = self._attend(x_BSD, q_BHSA, offered, mask)
        sink = _sink_share(q_BHSA, offered.keys, mask, valid_BS) if want_sink else None
        return y_BSD, sink

    def proceed(self, x_BTD: Tensor, rope: Rope, mask: Tensor, past: KeysValues | None) -> tuple[Tensor, KeysValues]:
        """Attend from T new positions to themselves and to what is kept of earlier ones.

        Args:
            rope: angles of the new positions.
            mask: bool [B, 1, T, S], True where a query may look, S counting the new positions too.
            past: of the earlier positions; None for none.

        Returns:
            output_BTD, and keys and values of all S positions.
        """
        q_BHTA, offered = self._project(x_BTD, rope)
        so_far = offered if past is None else past.then(offered)
        return self._attend(x_BTD, q_BHTA, so_far, mask), so_far

    def _project(self, x_BSD: Tensor, rope: Rope) -> tuple[Tensor, KeysValues]:
        """Queries of the positions, and what they offer to queries."""
        heads, width, kv_heads = self.heads, self.width, self.kv_heads
        q, k, v = self.qkv(x_BSD).split([heads * width, kv_heads * width, kv_heads * width], dim=-1)
        q_BHSA = rotate(_normed(q, self.q_norm, heads).transpose(1, 2), rope)
        k_BGSA = rotate(_normed(k, self.k_norm, kv_heads).transpose(1, 2), rope)
        return q_BHSA, KeysValues(k_BGSA, v.unflatten(-1, (kv_heads, width)).transpose(1, 2))

    def _attend(self, x_BSD: Tensor, q_BHSA: Tensor, to: KeysValues, mask: Tensor | None) -> Tensor:
        y_BHSA = F.scaled_dot_product_attention(
            q_BHSA, *to, attn_mask=mask, is_causal=mask is None, enable_gqa=self.heads != self.kv_heads
        )
        y_BSHA = y_BHSA.transpose(1, 2)
        if self.gate is not None:
            y_BSHA = y_BSHA * self.gate(x_BSD).sigmoid().unflatten(-1, (self.heads, -1))
        return self.out(y_BSHA.flatten(2))


def _qk_norm(config: DecoderConfig, heads: int) -> nn.RMSNorm | None:
    """The norm of queries or keys of ``heads`` heads."""
    if config.qk_norm == "none":
        return None
    return nn.RMSNorm(config.head_width * (heads if config.qk_norm == "whole" else 1), eps=config.norm_eps)


def _normed(x_BSI: Tensor, norm: nn.RMSNorm | None, heads: int) -> Tensor:
    """Queries or keys of all heads side by side (I = heads * A), normed and taken apart to [B, S, heads, A]."""
    x_BSHA = x_BSI.unflatten(-1, (heads, -1))
    if norm is None:
        return x_BSHA
    if norm.normalized_shape[0] == x_BSHA.shape[-1]:
        return norm(x_BSHA)
    return norm(x_BSI).unflatten(-1, (heads, -1))


@torch.no_grad()
def _sink_share(q_BHSA: Tensor, k_BGSA: Tensor, mask: Tensor | None, valid_BS: Tensor | None = None) -> Tensor:
    """Mean attention probability on the first token that each query may see."""
    heads, seq_len, width = q_BHSA.shape[1:]
    k_BHSA = k_BGSA.repeat_interleave(heads // k_BGSA.shape[1], dim=1)
    scores = (q_BHSA @ k_BHSA.transpose(-1, -2)).float() * width**-0.5
    if mask is None:
        mask = torch.ones(1, 1, seq_len, seq_len, dtype=torch.bool, device=scores.device).tril()
    probs = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    first = mask.to(torch.uint8).argmax(dim=-1, keepdim=True)  # [B or 1, 1, S, 1]
    on_first = probs.gather(-1, first.expand(*probs.shape[:3], 1)).squeeze(-1)
    has_choice = (mask.sum(dim=-1) > 1).expand(probs.shape[0], heads, seq_len)
    if valid_BS is not None:
        has_choice = has_choice & valid_BS[:, None, :]
    return (on_first * has_choice).sum() / has_choice.sum().clamp(min=1)
