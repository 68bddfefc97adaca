"""A Switch Transformer (arXiv 2101.03961): torch's encoder layer with its feed-forward replaced by the MoE layer.

Shapes: B batch, S sequence, T new positions, D model width, H heads, A head width, V vocabulary, E experts, M sparse
layers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_scale.config import MoEConfig, SwitchModelConfig
from moe_scale.initialization import Init
from moe_scale.models.alibi import alibi_bias
from moe_scale.models.attention import attention_mask
from moe_scale.models.cache import KeysValues, Past, positions_of
from moe_scale.models.decoder import LMOutput
from moe_scale.models.layers import TiedHead, TokenEmbedding, dense_width, is_sparse
from moe_scale.models.transformer import LearnedPositions, sinusoids
from moe_scale.moe.backends import build_moe
from moe_scale.moe.layer import MoEStats
from moe_scale.parallel.groups import ParallelGroups


class SeededLinear(nn.Linear):
    """torch's linear map, its weight from a seeded :class:`Init`, of standard deviation ``in_features ** -0.5``."""

    def __init__(self, in_features: int, out_features: int, bias: bool, init: Init):
        super().__init__(in_features, out_features, bias)
        init.normal_(self.weight, in_features**-0.5)
        if bias:
            nn.init.zeros_(self.bias)


class SelfAttention(nn.MultiheadAttention):
    """torch's multi-head self-attention with seeded weights, which can go on from keys and values that were kept."""

    def __init__(self, config: SwitchModelConfig, init: Init):
        super().__init__(config.d_model, config.num_heads, dropout=config.dropout, bias=config.bias, batch_first=True)
        (init / "in_proj").normal_(self.in_proj_weight, config.d_model**-0.5)
        # Of a class of its own, because under zero.Init torch's is sharded by now.
        out_proj: Any = SeededLinear(config.d_model, config.d_model, config.bias, init / "out_proj")
        self.out_proj = out_proj

    def forward(  # type: ignore[override]  # torch's takes queries, keys and values apart
        self, x_BTD: Tensor, past: KeysValues | None, mask: Tensor | None
    ) -> tuple[Tensor, KeysValues]:
        """Let T positions attend to earlier ones and, as far as the mask lets them, to each other.

        Args:
            past: keys and values of the positions before these.
            mask: broadcast to [B, H, T, S]: bool, True where a query may look, or what is added to the scores; None
                means causal.

        Returns:
            y_BTD, and the keys and values of all positions so far.
        """
        projected = F.linear(x_BTD, self.in_proj_weight, self.in_proj_bias)
        queries, *new = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in projected.chunk(3, -1))
        to = KeysValues(*new) if past is None else past.then(KeysValues(*new))
        dropout = self.dropout if self.training else 0.0
        y_BHTA = F.scaled_dot_product_attention(
            queries, *to, attn_mask=mask, dropout_p=dropout, is_causal=mask is None and past is None
        )
        return self.out_proj(y_BHTA.transpose(1, 2).flatten(2)), to


class SwitchLayer(nn.TransformerEncoderLayer):
    """``torch.nn.TransformerEncoderLayer`` whose feed-forward, where the layer is sparse, is the MoE layer.

    Attributes:
        moe: the MoE layer, in place of ``linear1`` and ``linear2``; None where the layer is dense.
    """

    def __init__(self, config: SwitchModelConfig, moe: MoEConfig, number: int, groups: ParallelGroups, init: Init):
        sparse = is_sparse(moe, number)
        super().__init__(
            config.d_model,
            config.num_heads,
            dim_feedforward=1 if sparse else dense_width(moe),
            dropout=config.dropout,
            activation=moe.activation,
            layer_norm_eps=config.norm_eps,
            batch_first=True,
            norm_first=config.norm_order == "pre",
            bias=config.bias,
        )
        self.self_attn = SelfAttention(config, init / "self_attn")
        self.moe = None
        if sparse:
            del self.linear1, self.linear2, self.dropout
            self.moe = build_moe(moe, config.d_model, groups, init / "moe")
        else:
            width = dense_width(moe)
            self.linear1 = SeededLinear(config.d_model, width, config.bias, init / "linear1")
            self.linear2 = SeededLinear(width, config.d_model, config.bias, init / "linear2")

    def forward(  # type: ignore[override]  # torch's knows neither statistics nor a cache
        self, x_BTD: Tensor, ids_BT: Tensor, valid_BT: Tensor | None, past: KeysValues | None, mask: Tensor | None
    ) -> tuple[Tensor, MoEStats | None, KeysValues]:
        """Apply the layer. Returns the stream, the experts' statistics, and keys and values of all positions so far."""
        attended_BTD, so_far = self.self_attn(self.norm1(x_BTD) if self.norm_first else x_BTD, past, mask)
        x_BTD = x_BTD + self.dropout1(attended_BTD)
        x_BTD = x_BTD if self.norm_first else self.norm1(x_BTD)
        y_BTD, stats = self._feed_forward(self.norm2(x_BTD) if self.norm_first else x_BTD, ids_BT, valid_BT)
        x_BTD = x_BTD + y_BTD
        return x_BTD if self.norm_first else self.norm2(x_BTD), stats, so_far

    def _feed_forward(self, x_BTD: Tensor, ids_BT: Tensor, valid_BT: Tensor | None) -> tuple[Tensor, MoEStats | None]:
        if self.moe is None:
            return self._ff_block(x_BTD), None
        y_BTD, stats = self.moe(x_BTD, valid_BT, ids_BT)
        return self.dropout2(y_BTD), stats


class SwitchLM(nn.Module):
    """A language model of :class:`SwitchLayer`, with the embedding as its head; a
    :class:`moe_scale.models.cache.CausalModel`, which sees a prompt whole where it was trained to.

    Args:
        config: the Transformer's settings.
        moe: the sparse layers' settings.
        groups: process groups.
        seed: of the initial weights.
    """

    def __init__(self, config: SwitchModelConfig, moe: MoEConfig, groups: ParallelGroups | None = None, seed: int = 0):
        super().__init__()
        groups, init = groups or ParallelGroups(), Init(seed)
        self.config, self.moe_config = config, moe
        self.embedding = TokenEmbedding(config.vocab_size, config.d_model, init / "embedding")
        self.positions: LearnedPositions | None = None
        if config.positions == "learned":
            self.positions = LearnedPositions(config.max_positions, config.d_model, init / "positions")
        self.dropout = nn.Dropout(config.dropout)
        scaled = Init(seed, gain=config.init_scale**0.5) / "layers"
        self.layers = nn.ModuleList(
            SwitchLayer(config, moe, number, groups, scaled / number) for number in range(config.num_layers)
        )
        # The stream of pre-norm layers comes out unnormed.
        pre_norm = config.norm_order == "pre"
        self.norm = nn.LayerNorm(config.d_model, config.norm_eps, bias=config.bias) if pre_norm else nn.Identity()
        self.head = TiedHead(self.embedding, config.loss_chunk_tokens)

    @property
    def max_positions(self) -> int | None:
        """Tokens that a sequence may have, at most; None where positions know no end."""
        return self.config.max_positions if self.positions is not None else None

    def forward(
        self,
        ids_BS: Tensor,
        targets_BS: Tensor | None = None,
        document_ids_BS: Tensor | None = None,
        *,
        prefix: int = 0,
        padded: bool = True,
        last_only: bool = False,
    ) -> LMOutput | Tensor:
        """Score targets, or without them return logits.

        Args:
            ids_BS: int64 token ids.
            targets_BS: int64 next tokens; -100 does not count.
            document_ids_BS: which document each token belongs to, -1 for padding; None is one document each row.
            prefix: so many first tokens of each row see each other, whatever their order; no target before the last
                of them counts.
            padded: whether ``document_ids_BS`` may hold padding; False where it is known to hold none spares the sparse
                layers a wait for the device.
            last_only: without targets, logits of the last position alone.

        Returns:
            :class:`LMOutput`, or logits [B, S or 1, V] without targets.
        """
        valid_BS = document_ids_BS >= 0 if document_ids_BS is not None and padded else None
        positions_S = torch.arange(ids_BS.shape[1], device=ids_BS.device)
        x_BSD, stats, _ = self._run(ids_BS, positions_S, valid_BS, _mask(positions_S, document_ids_BS, prefix), None)
        if targets_BS is None:
            return self.head(x_BSD[:, -1:] if last_only else x_BSD)
        first = max(prefix - 1, 0)
        num_targets = (targets_BS[:, first:] >= 0).sum().float()
        summed = self.head(x_BSD[:, first:].flatten(0, 1), targets_BS[:, first:].flatten())
        lm_loss = loss = summed.loss / num_targets.clamp(min=1)
        moe = MoEStats(*map(torch.stack, zip(*stats, strict=True))) if stats else None
        if moe is not None:
            weights = self.moe_config
            # Summed over layers: each router then feels the same weight at any depth.
            loss = loss + weights.aux_loss_weight * moe.aux_loss.sum() + weights.z_loss_weight * moe.z_loss.sum()
        return LMOutput(loss, lm_loss, num_targets, moe, None)

    @torch.no_grad()
    def start(self, ids_BS: Tensor, valid_BS: Tensor | None = None) -> tuple[Tensor, Past]:
        """Begin with prompts, padded on the left; see :meth:`moe_scale.models.cache.CausalModel.start`."""
        padded = valid_BS is not None and not bool(valid_BS.all())
        if valid_BS is None:
            valid_BS = torch.ones_like(ids_BS, dtype=torch.bool)
        mask = attention_mask(valid_BS.long() - 1) if self.config.is_causal else valid_BS[:, None, None, :]
        x_BSD, _, layers = self._run(ids_BS, positions_of(valid_BS), valid_BS if padded else None, mask, None)
        return self.head(x_BSD[:, -1]), Past(layers, valid_BS)

    @torch.no_grad()
    def step(self, ids_B: Tensor, state: Past) -> tuple[Tensor, Past]:
        """Append a token to every row; see :meth:`moe_scale.models.cache.CausalModel.step`."""
        valid_BS = F.pad(state.valid_BS, (0, 1), value=True)
        positions_B1, mask = state.lengths().unsqueeze(1), valid_BS[:, None, None, :]
        x_B1D, _, layers = self._run(ids_B.unsqueeze(1), positions_B1, None, mask, state.layers)
        return self.head(x_B1D[:, 0]), Past(layers, valid_BS)

    def _run(
        self,
        ids_BT: Tensor,
        positions: Tensor,
        valid_BT: Tensor | None,
        mask: Tensor | None,
        past: tuple[KeysValues, ...] | None,
    ) -> tuple[Tensor, list[MoEStats], tuple[KeysValues, ...]]:
        """The layers over T tokens, whose positions are [T] or [B, T].

        Returns:
            the last layer's output, normed; the sparse layers' statistics; keys and values of all tokens so far.
        """
        vectors = self._vectors(positions)
        x_BTD = self.embedding(ids_BT) * self.config.d_model**0.5  # the embedding is drawn small enough for a head
        x_BTD = self.dropout(x_BTD if vectors is None else x_BTD + vectors.to(x_BTD.dtype))
        total = ids_BT.shape[1] + (0 if past is None else past[0].keys.shape[2])
        mask = self._biased(mask, ids_BT.shape[1], total, x_BTD)
        stats, so_far = [], []
        recompute = self.config.activation_checkpointing and torch.is_grad_enabled()
        for number, layer in enumerate(self.layers):
            inputs = (x_BTD, ids_BT, valid_BT, None if past is None else past[number], mask)
            x_BTD, layer_stats, kept = checkpoint(layer, *inputs, use_reentrant=False) if recompute else layer(*inputs)
            stats += [] if layer_stats is None else [layer_stats]
            so_far.append(kept)
        return self.norm(x_BTD), stats, tuple(so_far)

    def _biased(self, mask: Tensor | None, new: int, total: int, like: Tensor) -> Tensor | None:
        """The mask of the last ``new`` of ``total`` columns, with what ALiBi adds to the scores.

        Rows are padded on the left, so columns are as far apart as the positions in them.
        """
        if self.config.positions != "alibi":
            return mask
        if mask is None:  # causal
            columns = torch.arange(total, device=like.device)
            mask = columns <= columns[total - new :].unsqueeze(1)
        bias_HTS = alibi_bias(total, self.config.num_heads, like.device, new).to(like.dtype)
        return bias_HTS.masked_fill(~mask, float("-inf"))

    def _vectors(self, positions: Tensor) -> Tensor | None:
        """What positions add to the stream, [..., D]; None for nothing."""
        if self.config.positions == "alibi":
            return None
        if self.positions is not None:
            return self.positions(positions) * self.config.d_model**0.5
        return sinusoids(positions.flatten(), self.config.d_model).unflatten(0, positions.shape)


def _mask(positions_S: Tensor, document_ids_BS: Tensor | None, prefix: int) -> Tensor | None:
    """Which keys each query of a training sequence may see, bool [B or 1, 1, S, S]; None for every earlier one.

    A prefix is seen by all, whatever documents it is cut from.
    """
    if prefix:
        return ((positions_S < prefix) | (positions_S <= positions_S.unsqueeze(1)))[None, None]
    return None if document_ids_BS is None else attention_mask(document_ids_BS)
