"""Parameters of a stack of Transformer layers from settings alone: what encoders, decoders and classifiers count."""

from __future__ import annotations

from dataclasses import dataclass

from moe_scale.config import MoEConfig
from moe_scale.models.layers import dense_width, is_sparse
from moe_scale.models.transformer import TransformerConfig


@dataclass(frozen=True)
class PartCounts:
    """Parameters of a stack of layers; of the experts all, or those that a token uses."""

    attention: int
    router: int
    experts: int
    dense_ffn: int
    norms: int
    expert_biases: int
    """Those of ``experts`` that are no matrices."""

    @property
    def total(self) -> int:
        return self.attention + self.router + self.experts + self.dense_ffn + self.norms

    @property
    def matrices(self) -> int:
        return self.total - self.norms - self.expert_biases


def stack_params(
    model: TransformerConfig, moe: MoEConfig, *, layers: int, attentions: int, active: bool = False
) -> PartCounts:
    """Parameters of ``layers`` layers with ``attentions`` attentions each, and the norm after them if there is one.

    Args:
        active: count of a layer's experts only the K that a token uses.
    """
    sparse = sum(is_sparse(moe, layer) for layer in range(layers))
    d_model, matrices = model.d_model, 3 if moe.activation == "swiglu" else 2
    norm = d_model * (2 if model.norm == "layernorm" else 1)
    counted = sparse * (moe.top_k if active else moe.num_experts)
    biases = (matrices - 1) * moe.intermediate_size + d_model if moe.expert_bias else 0
    scores = {"hash": 0, "noisy": 2}.get(moe.router, 1)
    dense_half = moe.intermediate_size if moe.residual else moe.shared_intermediate_size
    return PartCounts(
        attention=layers * attentions * 4 * d_model * model.num_heads * model.head_width,
        router=sparse * d_model * (moe.num_experts * scores + 2 * moe.residual),
        experts=counted * (matrices * d_model * moe.intermediate_size + biases),
        dense_ffn=matrices * d_model * ((layers - sparse) * dense_width(moe) + sparse * dense_half),
        norms=norm * (layers * (attentions + 1) + (model.norm_order == "pre")),
        expert_biases=counted * biases,
    )
