"""The decoder language model: pre-norm Transformer layers with attention and a sparse or dense feed-forward.

Shapes: B batch, S sequence, T new tokens of it, D model width, V vocabulary, E experts, M sparse layers.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_scale.config import DecoderConfig, MoEConfig
from moe_scale.initialization import Init
from moe_scale.models.attention import Attention, Rope, attention_mask, rope_at, rope_tables
from moe_scale.models.cache import KeysValues, Past, positions_of
from moe_scale.models.layers import DenseFeedForward, TiedHead, TokenEmbedding, dense_hidden, is_sparse
from moe_scale.moe.backends import build_moe
from moe_scale.moe.layer import MoEStats
from moe_scale.parallel.groups import ParallelGroups


class LMOutput(NamedTuple):
    """What a forward pass with targets returns. Losses are in nats a token; ``None`` where nothing was asked for."""

    loss: Tensor
    """lm_loss plus the weighted router losses: what is trained."""
    lm_loss: Tensor
    """Mean -log p(target) over the targets that count."""
    num_targets: Tensor
    """fp32 number of targets that count."""
    moe: MoEStats | None
    """The layers' statistics stacked: scalars as [M], counts as [M, E]; None without sparse layers."""
    sink_share: Tensor | None
    """Attention-sink share per layer [num_layers]."""


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); the feed-forward is sparse where ``moe`` is given."""

    def __init__(
        self, config: DecoderConfig, moe: MoEConfig | None, dense_hidden: int, groups: ParallelGroups, init: Init
    ):
        super().__init__()
        # Each layer adds to the residual stream twice; the scale keeps its variance independent of depth.
        depth_scale = (2 * config.num_layers) ** -0.5
        self.attention_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.attention = Attention(config, init / "attention", depth_scale)
        self.ffn_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        if moe is not None:
            self.moe = build_moe(moe, config.d_model, groups, init / "moe", depth_scale)
        else:
            self.ffn = DenseFeedForward(config.d_model, dense_hidden, init / "ffn", depth_scale)

    def forward(
        self,
        x_BSD: Tensor,
        ids_BS: Tensor,
        rope: Rope,
        mask: Tensor | None,
        valid_BS: Tensor | None,
        want_sink: bool = False,
    ) -> tuple[Tensor, MoEStats | None, Tensor | None]:
        attended, sink = self.attention(self.attention_norm(x_BSD), rope, mask, want_sink, valid_BS)
        x_BSD, stats = self._feed_forward(x_BSD + attended, ids_BS, valid_BS)
        return x_BSD, stats, sink

    def proceed(
        self,
        x_BTD: Tensor,
        ids_BT: Tensor,
        rope: Rope,
        mask: Tensor,
        valid_BT: Tensor | None,
        past: KeysValues | None,
    ) -> tuple[Tensor, KeysValues]:
        """Apply the layer to T new positions; see :meth:`Attention.proceed`."""
        attended, so_far = self.attention.proceed(self.attention_norm(x_BTD), rope, mask, past)
        x_BTD, _ = self._feed_forward(x_BTD + attended, ids_BT, valid_BT)
        return x_BTD, so_far

    def _feed_forward(self, x_BSD: Tensor, ids_BS: Tensor, valid_BS: Tensor | None) -> tuple[Tensor, MoEStats | None]:
        normed = self.ffn_norm(x_BSD)
        if hasattr(self, "ffn"):
            return x_BSD + self.ffn(normed), None
        y_BSD, stats = self.moe(normed, valid_BS, ids_BS)
        return x_BSD + y_BSD, stats


class DecoderLM(nn.Module):
    """A decoder-only language model, a :class:`moe_scale.models.cache.CausalModel`.

    Args:
        config: the decoder's settings.
        moe: the sparse layers' settings.
        groups: process groups.
        seed: of the initial weights.
    """

    max_positions: int | None = None  # rotary positions know no end

    def __init__(self, config: DecoderConfig, moe: MoEConfig, groups: ParallelGroups | None = None, seed: int = 0):
        super().__init__()
        groups, init = groups or ParallelGroups(), Init(seed)
        self.config, self.moe_config = config, moe
        self.embedding = TokenEmbedding(config.vocab_size, config.d_model, init / "embedding")
        self.layers = nn.ModuleList(
            DecoderLayer(
                config, moe if is_sparse(moe, layer) else None, dense_hidden(moe), groups, init / "layers" / layer
            )
            for layer in range(config.num_layers)
        )
        self.final_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        rows = self.embedding
        if not config.tie_embeddings:
            rows = TokenEmbedding(config.vocab_size, config.d_model, init / "head")
        self.head = TiedHead(rows, config.loss_chunk_tokens)

    def forward(
        self,
        ids_BS: Tensor,
        targets_BS: Tensor | None = None,
        document_ids_BS: Tensor | None = None,
        *,
        padded: bool = True,
        want_sink: bool = False,
        last_only: bool = False,
    ) -> LMOutput | Tensor:
        """Score targets, or without them return logits.

        Args:
            ids_BS: int64 token ids.
            targets_BS: int64 next tokens; -100 does not count.
            document_ids_BS: which document each token belongs to, -1 for padding; None is one document each row.
            padded: whether ``document_ids_BS`` may hold padding; False where it is known to hold none spares the sparse
                layers a wait for the device.
            want_sink: measure the attention sink (slow).
            last_only: without targets, logits of the last position alone.

        Returns:
            :class:`LMOutput`, or logits [B, S or 1, V] without targets.
        """
        x_BSD = self.embedding(ids_BS)
        rope = rope_tables(ids_BS.shape[1], self.config.head_width, self.config.rope_theta, ids_BS.device)
        mask = valid_BS = None
        if document_ids_BS is not None:
            mask = attention_mask(document_ids_BS)
            valid_BS = document_ids_BS >= 0 if padded else None

        stats, sinks = [], []
        recompute = self.config.activation_checkpointing and torch.is_grad_enabled()
        for layer in self.layers:
            inputs = (x_BSD, ids_BS, rope, mask, valid_BS, want_sink)
            x_BSD, layer_stats, sink = checkpoint(layer, *inputs, use_reentrant=False) if recompute else layer(*inputs)
            stats += [] if layer_stats is None else [layer_stats]
            sinks += [] if sink is None else [sink]

        x_BSD = self.final_norm(x_BSD)
        if targets_BS is None:
            return self.head(x_BSD[:, -1:] if last_only else x_BSD)
        num_targets = (targets_BS >= 0).sum().float()
        lm_loss = self.head(x_BSD.flatten(0, 1), targets_BS.flatten()).loss / num_targets.clamp(min=1)
        moe = MoEStats(*map(torch.stack, zip(*stats, strict=True))) if stats else None
        loss = lm_loss
        if moe is not None:
            weights = self.moe_config
            # Summed over layers: each router then feels the same weight at any depth.
            loss = loss + weights.aux_loss_weight * moe.aux_loss.sum() + weights.z_loss_weight * moe.z_loss.sum()
        return LMOutput(loss, lm_loss, num_targets, moe, torch.stack(sinks) if sinks else None)

    @torch.no_grad()
    def start(self, ids_BS: Tensor, valid_BS: Tensor | None = None) -> tuple[Tensor, Past]:
        """Begin with prompts, padded on the left; see :meth:`moe_scale.models.cache.CausalModel.start`."""
        padded = valid_BS is not None and not bool(valid_BS.all())
        if valid_BS is None:
            valid_BS = torch.ones_like(ids_BS, dtype=torch.bool)
        # Known to hold no padding, the tokens spare the sparse layers a wait for the device.
        return self._proceed(ids_BS, positions_of(valid_BS), valid_BS if padded else None, None, valid_BS)

    @torch.no_grad()
    def step(self, ids_B: Tensor, state: Past) -> tuple[Tensor, Past]:
        """Append a token to every row; see :meth:`moe_scale.models.cache.CausalModel.step`."""
        valid_BS = F.pad(state.valid_BS, (0, 1), value=True)
        return self._proceed(ids_B.unsqueeze(1), state.lengths().unsqueeze(1), None, state, valid_BS)

    def _proceed(
        self, ids_BT: Tensor, positions_BT: Tensor, valid_BT: Tensor | None, past: Past | None, valid_BS: Tensor
    ) -> tuple[Tensor, Past]:
        """Append T tokens to every row: ``valid_BT`` is for the sparse layers, ``valid_BS`` counts earlier ones too."""
        x_BTD = self.embedding(ids_BT)
        rope = rope_at(positions_BT.unsqueeze(1), self.config.head_width, self.config.rope_theta)
        mask = attention_mask(valid_BS.long() - 1, queries=ids_BT.shape[1])
        layers = []
        for number, layer in enumerate(self.layers):
            kept = None if past is None else past.layers[number]
            x_BTD, so_far = cast(DecoderLayer, layer).proceed(x_BTD, ids_BT, rope, mask, valid_BT, kept)
            layers.append(so_far)
        return self.head(self.final_norm(x_BTD[:, -1])), Past(tuple(layers), valid_BS)
