"""Parts of encoders and decoders: norms, positions, multi-head attention, and a feed-forward that may be sparse.

Shapes: B batch, S keys' sequence, T queries' sequence, D model width, H heads, A head width.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_scale.config import MoEConfig
from moe_scale.initialization import Init
from moe_scale.models.attention import Rope, rotate
from moe_scale.models.cache import KeysValues
from moe_scale.models.layers import Linear, dense_width, is_sparse
from moe_scale.moe.backends import build_moe
from moe_scale.moe.experts import SharedExpert
from moe_scale.moe.layer import MoEStats
from moe_scale.parallel.groups import ParallelGroups


class TransformerConfig(Protocol):
    """The settings that these parts read."""

    @property
    def d_model(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def head_width(self) -> int: ...
    @property
    def norm(self) -> str: ...
    @property
    def norm_order(self) -> str: ...
    @property
    def norm_eps(self) -> float: ...
    @property
    def dropout(self) -> float: ...


def build_norm(config: TransformerConfig) -> nn.Module:
    """The norm that ``config.norm`` names, over the model's width."""
    kind = {"rmsnorm": nn.RMSNorm, "layernorm": nn.LayerNorm}[config.norm]
    return kind(config.d_model, eps=config.norm_eps)


def sinusoids(positions_T: Tensor, d_model: int) -> Tensor:
    """Position encoding (arXiv 1706.03762, section 3.5): sin and cos of pos / 10000^(2i/D) at places 2i and 2i + 1.

    Returns fp32 [T, D]; an odd width lacks the last cosine.
    """
    frequencies = 10000.0 ** (-torch.arange(0, d_model, 2, dtype=torch.float32, device=positions_T.device) / d_model)
    angles = torch.outer(positions_T.float(), frequencies)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :d_model]


class LearnedPositions(nn.Module):
    """One learned vector a position."""

    def __init__(self, num_positions: int, d_model: int, init: Init):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_positions, d_model))
        init.normal_(self.weight, d_model**-0.5)

    def forward(self, positions_T: Tensor) -> Tensor:
        return F.embedding(positions_T, self.weight)


class MultiHeadAttention(nn.Module):
    """Scaled dot-product attention in several heads (arXiv 1706.03762, section 3.2), without biases.

    Keys and values are made by :meth:`keys_values`, of the queries' own sequence or of another, so that they can be
    kept while a sequence grows.
    """

    def __init__(self, config: TransformerConfig, init: Init, depth_scale: float):
        super().__init__()
        self.heads, self.width, self.dropout = config.num_heads, config.head_width, config.dropout
        inner = self.heads * self.width
        self.query = Linear(config.d_model, inner, init / "query")
        self.key_value = Linear(config.d_model, 2 * inner, init / "key_value")
        self.out = Linear(inner, config.d_model, init / "out", std=depth_scale * inner**-0.5)

    def keys_values(self, x_BSD: Tensor, rope: Rope | None = None) -> KeysValues:
        """What the positions of ``x_BSD`` offer to queries."""
        keys, values = (self._by_head(half) for half in self.key_value(x_BSD).chunk(2, dim=-1))
        return KeysValues(keys if rope is None else rotate(keys, rope), values)

    def forward(
        self, x_BTD: Tensor, to: KeysValues, mask: Tensor | None = None, rope: Rope | None = None, causal: bool = False
    ) -> Tensor:
        """Let each position of ``x_BTD`` attend to the keys. Returns y_BTD.

        Args:
            mask: broadcast to [B, H, T, S], bool: True where a query may look; or numbers, added to the scores. None
                lets it look everywhere.
            rope: angles of the queries' positions.
            causal: position t sees keys 0 to t; takes no mask.
        """
        queries = self._by_head(self.query(x_BTD))
        if rope is not None:
            queries = rotate(queries, rope)
        dropout = self.dropout if self.training else 0.0
        y_BHTA = F.scaled_dot_product_attention(queries, *to, attn_mask=mask, dropout_p=dropout, is_causal=causal)
        return self.out(y_BHTA.transpose(1, 2).flatten(2))

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.width)).transpose(1, 2)


class Sublayer(nn.Module):
    """The residual around a part of a layer: x + dropout(part(norm(x))), or post-norm, norm(x + dropout(part(x)))."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.norm = build_norm(config)
        self.dropout = nn.Dropout(config.dropout)
        self.pre_norm = config.norm_order == "pre"

    def before(self, x: Tensor) -> Tensor:
        """What the part is given."""
        return self.norm(x) if self.pre_norm else x

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """The layer's stream after the part gave ``y``."""
        x = x + self.dropout(y)
        return x if self.pre_norm else self.norm(x)


class FeedForward(nn.Module):
    """The position-wise half of a layer with its residual: experts where the layer is sparse, else dense.

    Args:
        moe: of the experts; the dense one has their activation, and the width of :func:`dense_width`.
        layer: its number.
    """

    def __init__(
        self,
        config: TransformerConfig,
        moe: MoEConfig,
        layer: int,
        groups: ParallelGroups,
        init: Init,
        depth_scale: float,
    ):
        super().__init__()
        self.residual = Sublayer(config)
        self.moe = self.ffn = None
        if is_sparse(moe, layer):
            self.moe = build_moe(moe, config.d_model, groups, init / "moe", depth_scale)
        else:
            self.ffn = SharedExpert(config.d_model, dense_width(moe), moe.activation, init / "ffn", depth_scale)

    def forward(self, x_BSD: Tensor, valid_BS: Tensor | None, ids_BS: Tensor) -> tuple[Tensor, MoEStats | None]:
        """Apply it. Returns the layer's stream and, of experts, their statistics."""
        given_BSD, stats = self.residual.before(x_BSD), None
        if self.moe is not None:
            y_BSD, stats = self.moe(given_BSD, valid_BS, ids_BS)
        else:
            assert self.ffn is not None
            y_BSD = self.ffn(given_BSD)
        return self.residual.after(x_BSD, y_BSD), stats
