"""A Transformer encoder: every position sees every other, and feed-forwards may be sparse.

Shapes: B batch, S sequence, D model width, E experts, M sparse layers.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_scale.config import MoEConfig
from moe_scale.initialization import Init
from moe_scale.models.alibi import alibi_bias
from moe_scale.models.attention import Rope, rope_tables
from moe_scale.models.transformer import (
    FeedForward,
    LearnedPositions,
    MultiHeadAttention,
    Sublayer,
    TransformerConfig,
    build_norm,
    sinusoids,
)
from moe_scale.moe.layer import MoEStats
from moe_scale.parallel.groups import ParallelGroups


class PositionConfig(TransformerConfig, Protocol):
    """The settings that positions take."""

    @property
    def positions(self) -> str: ...
    @property
    def rope_theta(self) -> float: ...


class EncoderConfig(PositionConfig, Protocol):
    """The settings that an encoder reads."""

    @property
    def num_layers(self) -> int: ...
    @property
    def max_positions(self) -> int: ...
    @property
    def activation_checkpointing(self) -> bool: ...


class EncoderLayer(nn.Module):
    """Self-attention over the whole sequence, then the feed-forward."""

    def __init__(self, config: TransformerConfig, feed_forward: FeedForward, init: Init, depth_scale: float):
        super().__init__()
        self.self_attention = MultiHeadAttention(config, init / "self_attention", depth_scale)
        self.attention_residual = Sublayer(config)
        self.feed_forward = feed_forward

    def forward(
        self, x_BSD: Tensor, ids_BS: Tensor, valid_BS: Tensor, mask: Tensor, rope: Rope | None
    ) -> tuple[Tensor, MoEStats | None]:
        given = self.attention_residual.before(x_BSD)
        attended = self.self_attention(given, self.self_attention.keys_values(given, rope), mask, rope)
        return self.feed_forward(self.attention_residual.after(x_BSD, attended), valid_BS, ids_BS)


class Encoded(NamedTuple):
    """What an encoder makes of a batch."""

    x_BSD: Tensor
    """The last layer's output, normed."""
    moe: MoEStats | None
    """The layers' statistics stacked: scalars as [M], counts as [M, E]; None without sparse layers."""


class Encoder(nn.Module):
    """A stack of encoder layers with its positions, over vectors that are given.

    Args:
        config: its settings.
        moe: the sparse layers' settings.
        groups: process groups.
        init: of the weights.
    """

    def __init__(self, config: EncoderConfig, moe: MoEConfig, groups: ParallelGroups, init: Init):
        super().__init__()
        self.config = config
        self.positions: LearnedPositions | None = None
        if config.positions == "learned":
            self.positions = LearnedPositions(config.max_positions, config.d_model, init / "positions")
        self.dropout = nn.Dropout(config.dropout)
        scale = (2 * config.num_layers) ** -0.5  # two sublayers a layer add to the stream
        self.layers = nn.ModuleList()
        for number in range(config.num_layers):
            path = init / "layers" / number
            feed_forward = FeedForward(config, moe, number, groups, path / "feed_forward", scale)
            self.layers.append(EncoderLayer(config, feed_forward, path, scale))
        # The stream of pre-norm layers comes out unnormed.
        self.norm = build_norm(config) if config.norm_order == "pre" else nn.Identity()

    def forward(self, x_BSD: Tensor, valid_BS: Tensor, ids_BS: Tensor) -> Encoded:
        """Encode.

        Args:
            x_BSD: what enters, of unit variance.
            valid_BS: bool, False for padding, which nothing attends to and no expert takes.
            ids_BS: int64 token ids, for the hash router; any numbers for the others.
        """
        x_BSD, rope = with_positions(x_BSD, self.config, self.positions)
        x_BSD, stats = self.dropout(x_BSD), []
        mask = key_mask(valid_BS)
        if self.config.positions == "alibi":
            bias_HSS = alibi_bias(x_BSD.shape[1], self.config.num_heads, x_BSD.device)
            mask = torch.where(mask, bias_HSS, float("-inf")).to(x_BSD.dtype)
        for layer in self.layers:
            x_BSD, layer_stats = self._run_layer(layer, x_BSD, ids_BS, valid_BS, mask, rope)
            stats += [] if layer_stats is None else [layer_stats]
        moe = MoEStats(*map(torch.stack, zip(*stats, strict=True))) if stats else None
        return Encoded(self.norm(x_BSD), moe)

    def _run_layer(self, layer: nn.Module, *inputs: Any) -> Any:
        recompute = self.config.activation_checkpointing and torch.is_grad_enabled()
        return checkpoint(layer, *inputs, use_reentrant=False) if recompute else layer(*inputs)


def key_mask(valid_BS: Tensor) -> Tensor:
    """Which keys all queries of a sequence may see, bool [B, 1, 1, S].

    A row of padding alone, as ranks without an example have, looks at its first position: a softmax over nothing is
    NaN.
    """
    seen_BS = valid_BS.clone()
    seen_BS[:, 0] = True
    return seen_BS[:, None, None, :]


def with_positions(
    x_BSD: Tensor, config: PositionConfig, learned: LearnedPositions | None, start: int = 0
) -> tuple[Tensor, Rope | None]:
    """The stream with its positions added, or the angles by which rotary ones turn queries and keys.

    ALiBi leaves both alone: its positions are in the scores of the attention.

    Args:
        learned: the vectors of ``positions=learned``; drawn small, as an embedding is, and scaled up to the stream.
        start: the first position.
    """
    length, device = x_BSD.shape[1], x_BSD.device
    if config.positions == "alibi":
        return x_BSD, None
    if config.positions == "rotary":
        return x_BSD, rope_tables(length, config.head_width, config.rope_theta, device, start)
    places = torch.arange(start, start + length, device=device)
    if learned is not None:
        return x_BSD + learned(places) * config.d_model**0.5, None
    return x_BSD + sinusoids(places, config.d_model).to(x_BSD.dtype), None
