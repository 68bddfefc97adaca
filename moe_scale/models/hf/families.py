"""The decoders of Hugging Face transformers that compute what :class:`moe_scale.models.decoder.DecoderLM` computes.

All are pre-norm Transformers with RMSNorm, rotary positions whose halves are turned against each other, grouped-query
attention without biases, and SwiGLU. What tells them apart is in the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Family:
    """A kind of decoder.

    Attributes:
        model_type: as ``config.json`` names it.
        architecture: the class that ``AutoModelForCausalLM`` makes of it.
        qk_norm: as our ``model.qk_norm``.
        gated: whether attention has an elementwise output gate, which ``q_proj`` computes beside each head's query.
        sparse: whether layers have experts.
        mixes: whether some of the layers may be dense all the same.
        router: how experts are chosen: by a softmax of their scores, or by sigmoids with a bias for the choice alone.
        shared: whether sparse layers have a shared expert: none; one that is added as it is (plain), in units of an
            expert's width; or one times the sigmoid of a score of the token (scored).
        always_normed: whether the weights of a token's experts always sum to 1; otherwise ``norm_topk_prob`` says so.
        norm_shift: what is added to the stored weight of a norm.
        block: the sparse feed-forward in a layer.
        expert: an expert's gate, up and down projection.
        hidden: the name of the hidden width of an expert, or where there are none of the feed-forward.
        counted: the name of the number of experts.
        ties: whether programs beside transformers are known to take the embedding for the head where it is tied; of the
            other families all published models have a head of their own, so it is always stored.
    """

    model_type: str
    architecture: str
    qk_norm: Literal["head", "whole", "none"]
    gated: bool = False
    sparse: bool = False
    mixes: bool = False
    router: Literal["softmax", "sigmoid"] = "softmax"
    shared: Literal["none", "plain", "scored"] = "none"
    always_normed: bool = False
    norm_shift: float = 0.0
    block: str = "mlp"
    expert: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    hidden: str = "intermediate_size"
    counted: str = "num_experts"
    ties: bool = True


FAMILIES = (
    Family("llama", "LlamaForCausalLM", "none"),
    Family("qwen3", "Qwen3ForCausalLM", "head"),
    Family(
        "mixtral", "MixtralForCausalLM", "none", sparse=True, always_normed=True,
        block="block_sparse_moe", expert=("w1", "w3", "w2"), counted="num_local_experts", ties=False,
    ),
    Family("olmoe", "OlmoeForCausalLM", "whole", sparse=True, ties=False),
    Family("qwen3_moe", "Qwen3MoeForCausalLM", "head", sparse=True, mixes=True, hidden="moe_intermediate_size"),
    Family(
        "qwen3_next", "Qwen3NextForCausalLM", "head", gated=True, sparse=True, mixes=True, shared="scored",
        norm_shift=1.0, hidden="moe_intermediate_size", ties=False,
    ),
    Family(
        "glm4_moe", "Glm4MoeForCausalLM", "head", sparse=True, router="sigmoid", shared="plain",
        hidden="moe_intermediate_size", counted="n_routed_experts", ties=False,
    ),
)  # fmt: skip
BY_TYPE = {family.model_type: family for family in FAMILIES}

SILENT_SHARED_WIDTH = 16
"""Hidden width of a scored shared expert that is all zeros, as there must be one: up to 16 ranks can share it."""

SHARED_NAMES = {"scored": "shared_expert", "plain": "shared_experts"}
SELECTION_BIAS = "gate.e_score_correction_bias"
"""Of a sigmoid router. It stays in fp32: its steps are too small for bf16."""

GLOBAL_NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "final_norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.k_norm.weight": "self_attn.k_norm.weight",
    "attention.out.weight": "self_attn.o_proj.weight",
}
"""Tensors that have one counterpart each, of the same shape."""
