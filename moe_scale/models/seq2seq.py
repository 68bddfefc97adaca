"""The encoder-decoder Transformer: sparse or dense feed-forwards in either half, one embedding, cached decoding.

Shapes: B batch, S source tokens, T target tokens, D model width, V vocabulary, E experts, M sparse layers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_scale.config import MoEConfig, Seq2SeqConfig
from moe_scale.initialization import Init
from moe_scale.models.attention import Rope
from moe_scale.models.cache import KeysValues
from moe_scale.models.encoder import EncoderLayer, key_mask, with_positions
from moe_scale.models.layers import TiedHead, TokenEmbedding
from moe_scale.models.transformer import (
    FeedForward,
    LearnedPositions,
    MultiHeadAttention,
    Sublayer,
    build_norm,
)
from moe_scale.moe.layer import MoEStats
from moe_scale.parallel.groups import ParallelGroups

PAD_ID = 0
"""The token that is no source."""


class Seq2SeqOutput(NamedTuple):
    """What a forward pass with targets returns. Losses are in nats a target token."""

    loss: Tensor
    """The smoothed loss plus the weighted router losses: what is trained."""
    lm_loss: Tensor
    """Mean -log p(target) over the targets that count, without smoothing."""
    num_targets: Tensor
    """fp32 number of targets that count."""
    moe: MoEStats | None
    """The layers' statistics stacked, encoder first: scalars as [M], counts as [M, E]; None without sparse layers."""


class LayerState(NamedTuple):
    """What one decoder layer keeps between steps."""

    past: KeysValues | None
    """Of the target so far; None before the first token."""
    source: KeysValues
    """Of the encoded source."""


class DecoderState(NamedTuple):
    """Encoded sources and the targets so far, to continue token by token."""

    layers: tuple[LayerState, ...]
    source_mask: Tensor
    """bool [B, 1, 1, S], True for real source tokens."""
    length: int
    """Target tokens so far."""

    def select(self, rows: Tensor) -> DecoderState:
        """The state of the batch's ``rows`` (int64), in that order and as often as they are named."""
        layers = tuple(
            LayerState(None if past is None else past.select(rows), source.select(rows)) for past, source in self.layers
        )
        return DecoderState(layers, self.source_mask.index_select(0, rows), self.length)


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the encoded source, then the feed-forward."""

    def __init__(self, config: Seq2SeqConfig, feed_forward: FeedForward, init: Init, depth_scale: float):
        super().__init__()
        self.self_attention = MultiHeadAttention(config, init / "self_attention", depth_scale)
        self.attention_residual = Sublayer(config)
        self.cross_attention = MultiHeadAttention(config, init / "cross_attention", depth_scale)
        self.cross_residual = Sublayer(config)
        self.feed_forward = feed_forward

    def forward(
        self,
        x_BTD: Tensor,
        ids_BT: Tensor,
        valid_BT: Tensor | None,
        state: LayerState,
        source_mask: Tensor,
        rope: Rope | None,
    ) -> tuple[Tensor, MoEStats | None, KeysValues]:
        """Continue the target by T tokens. Returns the stream, statistics, and the target's keys and values so far."""
        given = self.attention_residual.before(x_BTD)
        new = self.self_attention.keys_values(given, rope)
        so_far = new if state.past is None else state.past.then(new)
        mask = None if state.past is None else _causal_mask(x_BTD.shape[1], so_far.keys.shape[2], x_BTD.device)
        attended = self.self_attention(given, so_far, mask, rope, causal=mask is None)
        x_BTD = self.attention_residual.after(x_BTD, attended)
        looked_up = self.cross_attention(self.cross_residual.before(x_BTD), state.source, source_mask)
        x_BTD, stats = self.feed_forward(self.cross_residual.after(x_BTD, looked_up), valid_BT, ids_BT)
        return x_BTD, stats, so_far


class Seq2Seq(nn.Module):
    """An encoder-decoder Transformer (arXiv 1706.03762) with one embedding for source, target and head.

    Args:
        config: the model's settings.
        moe: the sparse layers' settings.
        groups: process groups.
        seed: of the initial weights.
    """

    def __init__(self, config: Seq2SeqConfig, moe: MoEConfig, groups: ParallelGroups | None = None, seed: int = 0):
        super().__init__()
        groups, init = groups or ParallelGroups(), Init(seed)
        self.config, self.moe_config = config, moe
        self.embedding = TokenEmbedding(config.vocab_size, config.d_model, init / "embedding")
        self.dropout = nn.Dropout(config.dropout)
        if config.positions == "learned":
            self.source_positions = LearnedPositions(config.max_positions, config.d_model, init / "source_positions")
            self.target_positions = LearnedPositions(config.max_positions, config.d_model, init / "target_positions")
        # Each sublayer adds to the residual stream; the scales keep its variance independent of depth.
        encoder_scale, decoder_scale = (2 * config.num_encoder_layers) ** -0.5, (3 * config.num_decoder_layers) ** -0.5
        self.encoder = nn.ModuleList()
        for number in range(config.num_encoder_layers):
            path = init / "encoder" / number
            feed_forward = FeedForward(
                config, part_moe(config, moe, "encoder"), number, groups, path / "feed_forward", encoder_scale
            )
            self.encoder.append(EncoderLayer(config, feed_forward, path, encoder_scale))
        self.decoder = nn.ModuleList()
        for number in range(config.num_decoder_layers):
            path = init / "decoder" / number
            feed_forward = FeedForward(
                config, part_moe(config, moe, "decoder"), number, groups, path / "feed_forward", decoder_scale
            )
            self.decoder.append(DecoderLayer(config, feed_forward, path, decoder_scale))
        # The stream of pre-norm layers comes out unnormed.
        pre_norm = config.norm_order == "pre"
        self.encoder_norm = build_norm(config) if pre_norm else nn.Identity()
        self.decoder_norm = build_norm(config) if pre_norm else nn.Identity()
        self.head = TiedHead(self.embedding, config.loss_chunk_tokens, config.label_smoothing)

    def forward(
        self,
        ids: Tensor,
        inputs_BT: Tensor | None = None,
        targets_BT: Tensor | None = None,
        *,
        state: DecoderState | None = None,
    ) -> Any:
        """Score targets, encode sources, or continue targets: everything that an engine has to run.

        Args:
            ids: int64, the sources [B, S]; with ``state`` the next tokens [B, T] of their targets.
            inputs_BT: int64, the targets moved by one: what the decoder reads.
            targets_BT: int64, what it is to predict; -100 does not count.
            state: the sources encoded, and targets so far.

        Returns:
            with ``targets_BT`` :class:`Seq2SeqOutput`; with ``inputs_BT`` alone logits [B, T, V]; with ``state`` the
            logits of the last of the next tokens [B, V] and the new state; else the encoded sources'
            :class:`DecoderState`.
        """
        if state is not None:
            return self._step(ids, state)
        begun, encoder_stats = self._encode(ids)
        if inputs_BT is None:
            return begun
        valid_BT = None if targets_BT is None else targets_BT >= 0
        x_BTD, decoder_stats, _ = self._decode(inputs_BT, valid_BT, begun)
        if targets_BT is None:
            return self.head(x_BTD)
        return self._score(x_BTD, targets_BT, encoder_stats + decoder_stats)

    def _encode(self, ids_BS: Tensor) -> tuple[DecoderState, list[MoEStats]]:
        valid_BS = ids_BS != PAD_ID
        mask = key_mask(valid_BS)
        x_BSD, rope = self._embed(ids_BS, 0, "source_positions")
        x_BSD, stats = self._run(self.encoder, x_BSD, ids_BS, valid_BS, mask, rope)
        x_BSD = self.encoder_norm(x_BSD)
        looked_at = (cast(DecoderLayer, layer).cross_attention for layer in self.decoder)
        layers = tuple(LayerState(None, attention.keys_values(x_BSD)) for attention in looked_at)
        return DecoderState(layers, mask, 0), stats

    def _decode(
        self, ids_BT: Tensor, valid_BT: Tensor | None, state: DecoderState
    ) -> tuple[Tensor, list[MoEStats], DecoderState]:
        x_BTD, rope = self._embed(ids_BT, state.length, "target_positions")
        stats, layers = [], []
        for layer, kept in zip(self.decoder, state.layers, strict=True):
            inputs = (x_BTD, ids_BT, valid_BT, kept, state.source_mask, rope)
            x_BTD, layer_stats, so_far = self._run_layer(layer, *inputs)
            stats += [] if layer_stats is None else [layer_stats]
            layers.append(LayerState(so_far, kept.source))
        return (
            self.decoder_norm(x_BTD),
            stats,
            DecoderState(tuple(layers), state.source_mask, state.length + ids_BT.shape[1]),
        )

    def _step(self, ids_BT: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        x_BTD, _, state = self._decode(ids_BT, None, state)
        return self.head(x_BTD[:, -1]), state

    def _embed(self, ids: Tensor, start: int, positions: str) -> tuple[Tensor, Rope | None]:
        """The scaled embedding (arXiv 1706.03762, section 3.4) with its positions, and the angles of rotary ones."""
        learned = getattr(self, positions) if self.config.positions == "learned" else None
        x, rope = with_positions(self.embedding(ids) * self.config.d_model**0.5, self.config, learned, start)
        return self.dropout(x), rope

    def _run(self, layers: nn.ModuleList, x_BSD: Tensor, *inputs: Any) -> tuple[Tensor, list[MoEStats]]:
        stats = []
        for layer in layers:
            x_BSD, layer_stats = self._run_layer(layer, x_BSD, *inputs)
            stats += [] if layer_stats is None else [layer_stats]
        return x_BSD, stats

    def _run_layer(self, layer: nn.Module, *inputs: Any) -> Any:
        recompute = self.config.activation_checkpointing and torch.is_grad_enabled()
        return checkpoint(layer, *inputs, use_reentrant=False) if recompute else layer(*inputs)

    def _score(self, x_BTD: Tensor, targets_BT: Tensor, stats: list[MoEStats]) -> Seq2SeqOutput:
        num_targets = (targets_BT >= 0).sum().float()
        summed = self.head(x_BTD.flatten(0, 1), targets_BT.flatten())
        loss, lm_loss = (value / num_targets.clamp(min=1) for value in summed)
        moe = MoEStats(*map(torch.stack, zip(*stats, strict=True))) if stats else None
        if moe is not None:
            weights = self.moe_config
            loss = loss + weights.aux_loss_weight * moe.aux_loss.sum() + weights.z_loss_weight * moe.z_loss.sum()
        return Seq2SeqOutput(loss, lm_loss, num_targets, moe)


def part_moe(config: Seq2SeqConfig, moe: MoEConfig, part: str) -> MoEConfig:
    """The experts' settings as they hold in the ``encoder`` or ``decoder``."""
    if config.experts_in not in ("both", part):
        return replace(moe, enabled=False, dense_size="active")
    return moe


def _causal_mask(new: int, total: int, device: torch.device) -> Tensor:
    """Which of ``total`` keys the last ``new`` positions see, bool [new, total]."""
    return torch.ones(new, total, dtype=torch.bool, device=device).tril(diagonal=total - new)
