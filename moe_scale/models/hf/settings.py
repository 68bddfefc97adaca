"""The settings of a decoder as Hugging Face's ``config.json`` has them, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from moe_scale.config import DecoderConfig, MoEConfig
from moe_scale.errors import ConfigError, Problem, raise_if
from moe_scale.models.hf.directory import Directory
from moe_scale.models.hf.families import (
    BY_TYPE,
    FAMILIES,
    GLOBAL_NAMES,
    SHARED_NAMES,
    SILENT_SHARED_WIDTH,
    Family,
)
from moe_scale.models.layers import dense_hidden, is_sparse

_BOTH_ENDS = GLOBAL_NAMES["embedding.weight"], GLOBAL_NAMES["head.weight"]
"""Two tensors that are one where the head is tied."""

_ONLY_GROUP: dict[str, Any] = {
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 0,
    "use_qk_norm": True,
}
"""Settings of GLM-4-MoE that have one value here."""


def home_of(model: DecoderConfig, moe: MoEConfig) -> Family:
    """The family that computes what such a decoder computes, tokens being dropped by none.

    Raises:
        ConfigError: with every setting that no family has, or all those that none has together.
    """
    raise_if(_homeless(model, moe))
    wanted = _wanted(model, moe)
    for family in FAMILIES:  # the plainest first
        if all(has(family) for has in wanted.values()):
            return family
    what = "none of their models has all of: " + ", ".join(wanted)
    raise ConfigError(Problem("model", what, "change one of them"))


def _wanted(model: DecoderConfig, moe: MoEConfig) -> dict[str, Callable[[Family], bool]]:
    """What a family must have, in words."""
    gated = model.attention_gate != "none"
    found: dict[str, Callable[[Family], bool]] = {
        f"model.qk_norm {model.qk_norm}": lambda family: family.qk_norm == model.qk_norm
    }
    if gated:
        found[f"model.attention_gate {model.attention_gate}"] = lambda family: family.gated
    if not moe.enabled:
        return found | {"moe.enabled false": lambda family: not family.sparse or (family.mixes and gated)}
    router = "sigmoid" if moe.router == "sigmoid" else "softmax"
    found[f"moe.router {moe.router}"] = lambda family: family.sparse and family.router == router
    if moe.shared_intermediate_size:
        units = moe.shared_intermediate_size % moe.intermediate_size == 0
        found["moe.shared_intermediate_size" + ("" if units else " that is no multiple of moe.intermediate_size")] = (
            lambda family: family.shared == "scored" or (family.shared == "plain" and units)
        )
    if not all(is_sparse(moe, layer) for layer in range(model.num_layers)):
        found[f"moe.every {moe.every}"] = lambda family: family.mixes
    if not _is_normed(moe):
        what = "moe.top_k 1" if moe.top_k == 1 else "moe.renormalize false"
        found[what] = lambda family: not family.always_normed
    return found


def _homeless(model: DecoderConfig, moe: MoEConfig) -> list[Problem]:
    """Settings that no family has."""
    found = []
    if model.qk_norm == "whole" and model.num_heads * model.head_width != model.d_model:
        what = f"heads of {model.head_width} with model.qk_norm whole"
        found.append(Problem("model.head_dim", what, "they have it with heads of d_model / num_heads alone"))
    if not moe.enabled:
        return found
    if moe.router not in ("softmax", "noisy", "sigmoid"):
        found.append(Problem("moe.router", moe.router, "they choose experts by a softmax, or by sigmoids"))
    if moe.activation != "swiglu":
        found.append(Problem("moe.activation", moe.activation, "their experts are SwiGLU"))
    if moe.expert_bias:
        found.append(Problem("moe.expert_bias", "true", "their experts have no biases"))
    if moe.residual:
        found.append(Problem("moe.residual", "true", "they mix no dense half by a softmax"))
    return found


def _is_normed(moe: MoEConfig) -> bool:
    """Whether the weights of a token's experts sum to 1. A single expert keeps its probability here."""
    return moe.renormalize and moe.top_k > 1


def to_hf(
    family: Family, model: DecoderConfig, moe: MoEConfig, *, max_positions: int, eot_id: int, dtype: str
) -> dict[str, Any]:
    """The content of ``config.json``, as releases 4 and 5 of transformers read it.

    Args:
        max_positions: tokens that a sequence may have.
        eot_id: the token that begins documents and ends them.
        dtype: of the stored weights, as ``bfloat16``.
    """
    rope = {"rope_type": "default", "rope_theta": model.rope_theta}
    found: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_width,
        "intermediate_size": dense_hidden(moe),
        "hidden_act": "silu",
        "attention_bias": False,
        "max_position_embeddings": max_positions,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_parameters": rope,
        "tie_word_embeddings": model.tie_embeddings and family.ties,
        "bos_token_id": eot_id,
        "eos_token_id": eot_id,
        "torch_dtype": dtype,
    }
    if family.model_type in ("qwen3_next", "glm4_moe"):  # where it is not given, a part of each head is turned
        found |= {"partial_rotary_factor": 1.0, "rope_parameters": rope | {"partial_rotary_factor": 1.0}}
    if family.gated:
        found["layer_types"] = ["full_attention"] * model.num_layers
    if not family.sparse:
        return found
    found |= {
        family.counted: moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        family.hidden: moe.intermediate_size,
        "router_aux_loss_coef": moe.aux_loss_weight,
        "output_router_logits": False,
    }
    if not family.always_normed:
        found["norm_topk_prob"] = _is_normed(moe)
    if family.mixes:
        dense = [] if moe.enabled else list(range(model.num_layers))
        found |= {"decoder_sparse_step": moe.every if moe.enabled else 1, "mlp_only_layers": dense}
    if family.shared == "scored":
        found["shared_expert_intermediate_size"] = moe.shared_intermediate_size or SILENT_SHARED_WIDTH
    if family.router == "sigmoid":
        found |= _ONLY_GROUP | {"n_shared_experts": moe.shared_intermediate_size // moe.intermediate_size or 1}
    return found


def from_hf(directory: Directory) -> tuple[Family, DecoderConfig, MoEConfig]:
    """The family and our settings of the model in a directory.

    Raises:
        ConfigError: with everything that has no counterpart here.
    """
    theirs = directory.settings
    family = BY_TYPE.get(str(theirs.get("model_type")))
    if family is None:
        what = f"{theirs.get('model_type')!r} is not known here"
        raise ConfigError(Problem("model_type", what, f"import one of {', '.join(BY_TYPE)}"))
    raise_if(_without_counterpart(family, theirs))
    width, heads, head_dim = theirs["hidden_size"], theirs["num_attention_heads"], theirs.get("head_dim")
    model = _checked(
        DecoderConfig,
        vocab_size=theirs["vocab_size"],
        num_layers=theirs["num_hidden_layers"],
        d_model=width,
        num_heads=heads,
        num_kv_heads=theirs.get("num_key_value_heads") or heads,
        head_dim=0 if head_dim is None or head_dim * heads == width else head_dim,
        attention_gate="elementwise" if family.gated else "none",
        qk_norm=family.qk_norm,
        rope_theta=_rope(theirs)["rope_theta"],
        norm_eps=theirs["rms_norm_eps"],
        tie_embeddings=bool(theirs.get("tie_word_embeddings")) or directory.equal(*_BOTH_ENDS),
    )
    sparse_layers = _sparse_layers(family, theirs)
    if not sparse_layers:
        # As wide as one expert of one: the width of a dense feed-forward is that of the experts that a token uses.
        moe = _checked(MoEConfig, enabled=False, num_experts=1, top_k=1, intermediate_size=theirs["intermediate_size"])
    else:
        moe = _checked(
            MoEConfig,
            num_experts=_experts(family, theirs),
            top_k=theirs["num_experts_per_tok"],
            intermediate_size=theirs[family.hidden],
            renormalize=family.always_normed or bool(theirs.get("norm_topk_prob")),
            every=_every(sparse_layers, model.num_layers),
            router=family.router,
            shared_intermediate_size=_shared_width(family, directory, sparse_layers),
        )
    raise_if(model.problems("model") + moe.problems("moe") + _moe_misfits(family, theirs, model, moe))
    return family, model, moe


C = TypeVar("C", DecoderConfig, MoEConfig)


def _checked(kind: type[C], **values: Any) -> C:
    """The settings.

    Raises:
        ConfigError: with every value that is none of such a setting, as a number of heads of 0.
    """
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        what = [(".".join(map(str, one["loc"])), one["input"], one["msg"]) for one in error.errors()]
        raise ConfigError(Problem(name, f"{value!r} in config.json", said) for name, value, said in what) from None


def _without_counterpart(family: Family, theirs: Mapping[str, Any]) -> list[Problem]:
    """Settings with values that no decoder here has."""
    plain: dict[str, tuple[Any, ...]] = {
        "hidden_act": ("silu",),
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "clip_qkv": (None,),
        "sliding_window": (None,),
        "quantization_config": (None,),
        **({name: (value,) for name, value in _ONLY_GROUP.items()} if family.router == "sigmoid" else {}),
    }
    found = [
        Problem(name, f"{theirs[name]}", f"here it is {plain[name][0]} alone")
        for name in plain
        if name in theirs and theirs[name] not in plain[name]
    ]
    rope = _rope(theirs)
    if rope["rope_type"] != "default":
        found.append(Problem("rope_parameters", f"{rope['rope_type']}", "here angles are not scaled: default alone"))
    if rope["partial_rotary_factor"] != 1:
        what = f"{rope['partial_rotary_factor']}"
        found.append(Problem("partial_rotary_factor", what, "here whole heads are turned: 1.0 alone"))
    if kinds := set(theirs.get("layer_types") or []) - {"full_attention"}:
        found.append(Problem("layer_types", f"has {', '.join(sorted(kinds))}", "here all layers are full_attention"))
    return found


def _rope(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Of the rotary positions, as either release of transformers writes it."""
    found = {"rope_theta": 10_000.0, "rope_type": "default", "partial_rotary_factor": 1.0}
    found |= {name: theirs[name] for name in ("rope_theta", "partial_rotary_factor") if theirs.get(name) is not None}
    for section in ("rope_scaling", "rope_parameters"):
        found |= {name: value for name, value in (theirs.get(section) or {}).items() if value is not None}
    return found


def _experts(family: Family, theirs: Mapping[str, Any]) -> int:
    return int(theirs[family.counted] if family.counted in theirs else theirs["num_local_experts"])


def _sparse_layers(family: Family, theirs: Mapping[str, Any]) -> list[int]:
    if not family.sparse or not _experts(family, theirs):
        return []
    layers = range(theirs["num_hidden_layers"])
    if not family.mixes:
        return list(layers)
    step, dense = theirs.get("decoder_sparse_step") or 1, theirs.get("mlp_only_layers") or []
    return [layer for layer in layers if layer not in dense and (layer + 1) % step == 0]


def _every(sparse_layers: list[int], num_layers: int) -> int:
    """Our ``moe.every`` of the layers that have experts."""
    every = sparse_layers[0] + 1
    if sparse_layers != [layer for layer in range(num_layers) if (layer + 1) % every == 0]:
        what = f"layers {', '.join(map(str, sparse_layers))} have experts"
        raise ConfigError(Problem("mlp_only_layers", what, "here every n-th layer has them, or all"))
    return every


def _shared_width(family: Family, directory: Directory, sparse_layers: list[int]) -> int:
    """Hidden width of the shared expert, 0 for none or one that does nothing.

    Raises:
        ConfigError: if its gate depends on the token, which ours has none of.
    """
    if family.shared == "none":
        return 0
    theirs, blocks = directory.settings, [f"model.layers.{layer}.{family.block}." for layer in sparse_layers]
    if all(directory.is_zero(f"{block}{SHARED_NAMES[family.shared]}.down_proj.weight") for block in blocks):
        return 0
    if family.shared == "plain":
        return int(theirs["n_shared_experts"] * theirs[family.hidden])
    gates = [block + "shared_expert_gate.weight" for block in blocks]
    if all(directory.is_zero(gate) for gate in gates if gate in directory.names):  # what is missing is told elsewhere
        return int(theirs["shared_expert_intermediate_size"])
    what = "is not zero: the shared expert is weighted for each token"
    raise ConfigError(Problem("mlp.shared_expert_gate", what, "here a shared expert is added as it is"))


def _moe_misfits(family: Family, theirs: Mapping[str, Any], model: DecoderConfig, moe: MoEConfig) -> list[Problem]:
    if not moe.enabled:
        return []
    found = []
    if moe.top_k == 1 and moe.renormalize:
        what = "1, and the expert's weight is always 1"
        found.append(Problem("num_experts_per_tok", what, "here a single expert is weighted by its probability"))
    if moe.every > 1 and theirs["intermediate_size"] != dense_hidden(moe):
        what = f"{theirs['intermediate_size']} in dense layers beside {moe.top_k} experts of {moe.intermediate_size}"
        allowed = f"here dense layers are as wide as the experts that a token uses: {dense_hidden(moe)}"
        found.append(Problem("intermediate_size", what, allowed))
    return found
