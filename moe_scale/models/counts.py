"""Parameters and FLOPs of a decoder from its settings alone: no module is built, no tensor allocated."""

from __future__ import annotations

from dataclasses import dataclass

from moe_scale.config import DecoderConfig, MoEConfig
from moe_scale.models.layers import dense_hidden, is_sparse


@dataclass(frozen=True)
class Counts:
    """Counts by part; which unit, the function that returns them says."""

    embedding: int
    attention: int
    router: int
    experts: int
    dense_ffn: int
    norms: int

    @property
    def total(self) -> int:
        return self.embedding + self.attention + self.router + self.experts + self.dense_ffn + self.norms


def num_params(model: DecoderConfig, moe: MoEConfig) -> Counts:
    """Parameters of the whole model; the head counts with the embedding, once where it is tied."""
    return _params(model, moe, moe.num_experts)


def num_active_params(model: DecoderConfig, moe: MoEConfig) -> Counts:
    """Parameters that one token uses: of the experts only the K that it is sent to."""
    return _params(model, moe, moe.top_k)


def forward_flops_per_token(model: DecoderConfig, moe: MoEConfig, seq_len: int) -> float:
    """FLOPs of one token's forward pass in a causal sequence of ``seq_len`` tokens; a multiply-add is two.

    Matrix products only: 2 FLOPs a weight used (the embedding look-up is none, the head is one), and for scores and
    weighted values 4*H*A FLOPs a visible token, of which a causal query sees (S + 1) / 2 on average.
    """
    active = num_active_params(model, moe)
    sparse = sum(is_sparse(moe, layer) for layer in range(model.num_layers))
    looked_up = 0 if model.tie_embeddings else model.vocab_size * model.d_model
    weights = active.total - looked_up - active.norms - sparse * moe.top_k * _expert_biases(model, moe)
    return 2 * weights + _score_flops(model, seq_len)


def training_flops_per_token(model: DecoderConfig, moe: MoEConfig, seq_len: int) -> float:
    """Forward and backward: three times the forward pass. Recomputation is not counted, as usual for MFU."""
    return 3 * forward_flops_per_token(model, moe, seq_len)


def adapter_training_flops_per_token(model: DecoderConfig, moe: MoEConfig, seq_len: int) -> float:
    """As :func:`training_flops_per_token` where adapters alone are trained: no gradients of the model's own weights.

    Without the adapters' own products, a few per cent.
    """
    forward, scores = forward_flops_per_token(model, moe, seq_len), _score_flops(model, seq_len)
    return 2 * (forward - scores) + 3 * scores


def _score_flops(model: DecoderConfig, seq_len: int) -> float:
    """Of a token's scores and weighted values in all layers, forward."""
    visible = (seq_len + 1) / 2
    return model.num_layers * 4 * model.num_heads * model.head_width * visible


def _params(model: DecoderConfig, moe: MoEConfig, experts_counted: int) -> Counts:
    d_model, heads, kv_heads, width = model.d_model, model.num_heads, model.num_kv_heads, model.head_width
    gates = {"none": 0, "headwise": heads, "elementwise": heads * width}[model.attention_gate]
    attention = d_model * (heads + 2 * kv_heads) * width + heads * width * d_model + d_model * gates
    sparse = sum(is_sparse(moe, layer) for layer in range(model.num_layers))
    scores = {"hash": 0, "noisy": 2}.get(moe.router, 1)
    matrices = 3 if moe.activation == "swiglu" else 2
    expert = matrices * d_model * moe.intermediate_size + _expert_biases(model, moe)
    qk_norms = {"none": 0, "head": 2, "whole": heads + kv_heads}[model.qk_norm] * width
    return Counts(
        embedding=model.vocab_size * d_model * (1 if model.tie_embeddings else 2),
        attention=model.num_layers * attention,
        router=sparse * d_model * (moe.num_experts * scores + 2 * moe.residual),
        experts=sparse * experts_counted * expert,
        dense_ffn=(model.num_layers - sparse) * 3 * d_model * dense_hidden(moe)
        + sparse * matrices * d_model * (moe.intermediate_size if moe.residual else moe.shared_intermediate_size),
        norms=model.num_layers * (2 * d_model + qk_norms) + d_model,
    )


def _expert_biases(model: DecoderConfig, moe: MoEConfig) -> int:
    """Biases of one expert."""
    if not moe.expert_bias:
        return 0
    return (2 if moe.activation == "swiglu" else 1) * moe.intermediate_size + model.d_model
