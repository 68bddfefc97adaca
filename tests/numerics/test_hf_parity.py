"""The decoder against Hugging Face with the same weights: logits, the loss and the gradient of every weight, fp32.

Without a gate the decoder is a Qwen3-MoE; with the elementwise gate it is a Qwen3-Next whose layers are all full
attention, whose rotary embedding turns the whole head and whose shared expert is zero.

Shapes: B batch, S sequence, D model width, H query heads, G key/value heads, A head width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM

from moe_scale.config import DecoderConfig, MoEConfig
from moe_scale.models.decoder import DecoderLM

TOLERANCE = 1e-4
VOCAB = 61


class Shape(NamedTuple):
    """A tiny model and batch."""

    batch: int = 2
    seq_len: int = 9
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_width: int = 8
    d_model: int = 24
    experts: int = 5
    top_k: int = 2
    hidden: int = 12
    renormalize: bool = True
    every: int = 1
    theta: float = 10000.0


SHAPES = {
    "default": Shape(),
    "mha": Shape(kv_heads=4, layers=1, seq_len=17),
    "mqa": Shape(heads=6, kv_heads=1, head_width=4, layers=3),
    "top1": Shape(top_k=1, experts=8, batch=3),
    "all-experts": Shape(top_k=4, experts=4, seq_len=5),
    "one-expert": Shape(top_k=1, experts=1, hidden=7),
    "raw-weights": Shape(top_k=3, experts=16, renormalize=False),
    "every-second": Shape(every=2, layers=4, theta=500.0),
    "one-token": Shape(batch=1, seq_len=1),
    "long": Shape(batch=1, seq_len=64, heads=8, kv_heads=2, head_width=2, theta=1e6),
}
GATES = ("none", "elementwise")


def our_model(shape: Shape, gate: str, seed: int = 0) -> DecoderLM:
    config = DecoderConfig(
        vocab_size=VOCAB, num_layers=shape.layers, d_model=shape.d_model, num_heads=shape.heads,
        num_kv_heads=shape.kv_heads, head_dim=shape.head_width, attention_gate=gate, rope_theta=shape.theta,
        loss_chunk_tokens=7,
    )  # fmt: skip
    moe = MoEConfig(
        num_experts=shape.experts, top_k=shape.top_k, intermediate_size=shape.hidden, every=shape.every,
        renormalize=shape.renormalize,
    )  # fmt: skip
    model = DecoderLM(config, moe, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):  # all ones would hide a norm that is left out or misplaced
                weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    return model


def their_model(shape: Shape, gate: str) -> PreTrainedModel:
    """An untrained Hugging Face model of the same shape."""
    common: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": shape.d_model, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_width,
        "intermediate_size": shape.top_k * shape.hidden, "moe_intermediate_size": shape.hidden,
        "num_experts": shape.experts, "num_experts_per_tok": shape.top_k, "decoder_sparse_step": shape.every,
        # For K=1 this project never rescales; theirs would make the weight 1.
        "norm_topk_prob": shape.renormalize and shape.top_k > 1,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": shape.theta}
    if gate == "none":
        config = Qwen3MoeConfig(**common, rope_parameters=rope)
        model: PreTrainedModel = Qwen3MoeForCausalLM(config)
    else:
        # The factor defaults to 0.25 when it is not given both ways.
        config = Qwen3NextConfig(
            **common, rope_parameters={**rope, "partial_rotary_factor": 1.0}, partial_rotary_factor=1.0,
            layer_types=["full_attention"] * shape.layers, shared_expert_intermediate_size=1,
        )  # fmt: skip
        model = Qwen3NextForCausalLM(config)
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    return model


def to_theirs(ours: dict[str, Tensor], shape: Shape, gate: str, *, is_gradient: bool = False) -> dict[str, Tensor]:
    """Our weights, or gradients, under their names and in their layout."""
    inner, kv_inner = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    zero_centred = gate == "elementwise" and not is_gradient
    theirs: dict[str, Tensor] = {}
    for name, value in ours.items():
        if name == "embedding.weight":
            theirs["model.embed_tokens.weight"] = value
        elif name == "final_norm.weight":
            theirs["model.norm.weight"] = value - 1 if zero_centred else value
        elif name.startswith("layers."):
            _, layer, part = name.split(".", 2)
            to = f"model.layers.{layer}"
            if part.endswith("norm.weight"):
                place = {
                    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
                    "attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm",
                }[part.removesuffix(".weight")]  # fmt: skip
                theirs[f"{to}.{place}.weight"] = value - 1 if zero_centred else value
            elif part == "attention.qkv.weight":
                q, k, v = value.split([inner, kv_inner, kv_inner])
                if gate == "elementwise":
                    # Theirs has a head's query and gate side by side in one projection.
                    gate_weight = ours[f"layers.{layer}.attention.gate.weight"]
                    per_head = (shape.heads, shape.head_width, -1)
                    q = torch.cat([q.reshape(per_head), gate_weight.reshape(per_head)], dim=1).flatten(0, 1)
                theirs |= {f"{to}.self_attn.{n}_proj.weight": w for n, w in (("q", q), ("k", k), ("v", v))}
            elif part == "ffn.gate_up.weight":
                gate_proj, up_proj = value.chunk(2)
                theirs |= {f"{to}.mlp.gate_proj.weight": gate_proj, f"{to}.mlp.up_proj.weight": up_proj}
            elif part != "attention.gate.weight":
                place = {
                    "attention.out.weight": "self_attn.o_proj.weight", "ffn.down.weight": "mlp.down_proj.weight",
                    "moe.router.weight": "mlp.gate.weight", "moe.experts.gate_up": "mlp.experts.gate_up_proj",
                    "moe.experts.down": "mlp.experts.down_proj",
                }[part]  # fmt: skip
                theirs[f"{to}.{place}"] = value
        else:
            raise AssertionError(f"{name} has no counterpart")
    return theirs


def same_models(shape: Shape, gate: str) -> tuple[DecoderLM, PreTrainedModel]:
    ours, theirs = our_model(shape, gate), their_model(shape, gate)
    state = to_theirs({name: p.detach() for name, p in ours.named_parameters()}, shape, gate)
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    left = [name for name in missing if name != "lm_head.weight" and "shared_expert" not in name]
    assert not left, "every weight of theirs but the shared expert's comes from ours"
    for name, parameter in theirs.named_parameters():
        if "shared_expert." in name:
            parameter.data.zero_()
    return ours, theirs


def make_ids(shape: Shape, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (shape.batch, shape.seq_len), generator=torch.Generator().manual_seed(seed))


def assert_same_gradients(ours: DecoderLM, theirs: PreTrainedModel, shape: Shape, gate: str) -> None:
    """Of all weights, to 1e-4 of each one's largest entry: gradients differ in size by orders of magnitude."""
    expected = {n: p.grad for n, p in theirs.named_parameters() if "shared_expert" not in n}
    found = to_theirs({n: p.grad for n, p in ours.named_parameters()}, shape, gate, is_gradient=True)
    assert found.keys() == expected.keys()
    # With one token to look at, or one expert to choose, some gradients are zero up to rounding.
    rounding = 1e-6 * max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        largest = float(gradient.abs().max())
        assert largest > rounding or shape.seq_len == 1 or shape.experts == 1, f"{name} has no gradient to compare"
        difference = float((found[name] - gradient).abs().max())
        assert difference <= TOLERANCE * largest + rounding, f"{name}: {difference:.2e} of {largest:.2e}"


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("name", SHAPES)
def test_logits_and_gradients(name: str, gate: str) -> None:
    shape = SHAPES[name]
    ours, theirs = same_models(shape, gate)
    ids_BS, targets_BS = make_ids(shape), make_ids(shape, seed=1)
    targets_BS[0, 0] = -100 if shape.seq_len > 1 else 3
    logits_BSV = theirs(input_ids=ids_BS).logits
    torch.testing.assert_close(ours(ids_BS), logits_BSV, rtol=TOLERANCE, atol=TOLERANCE)

    expected = F.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten())
    output = ours(ids_BS, targets_BS)
    torch.testing.assert_close(output.lm_loss, expected, rtol=1e-5, atol=1e-5)
    # Summed, so that gradients do not shrink with the batch below what a tolerance can see.
    (output.lm_loss * output.num_targets).backward()
    (expected * output.num_targets).backward()
    assert_same_gradients(ours, theirs, shape, gate)


@pytest.mark.parametrize("gate", GATES)
def test_right_padding(gate: str) -> None:
    shape = SHAPES["default"]._replace(batch=3)
    ours, theirs = same_models(shape, gate)
    ids_BS, targets_BS = make_ids(shape), make_ids(shape, seed=1)
    real_BS = torch.arange(shape.seq_len) < torch.tensor([[9], [4], [1]])
    targets_BS[~real_BS] = -100
    document_ids_BS = torch.where(real_BS, 0, -1)

    logits_BSV = theirs(input_ids=ids_BS, attention_mask=real_BS.long()).logits
    found_BSV = ours(ids_BS, document_ids_BS=document_ids_BS)
    torch.testing.assert_close(found_BSV[real_BS], logits_BSV[real_BS], rtol=TOLERANCE, atol=TOLERANCE)
    assert found_BSV.isfinite().all()

    output = ours(ids_BS, targets_BS, document_ids_BS)
    (output.lm_loss * output.num_targets).backward()
    F.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten(), reduction="sum").backward()
    assert_same_gradients(ours, theirs, shape, gate)


@pytest.mark.parametrize("gate", GATES)
def test_packed_documents(gate: str) -> None:
    """Each document of a packed row gets the logits that it gets alone, from our model and from theirs."""
    shape = SHAPES["default"]._replace(seq_len=12)
    ours, theirs = same_models(shape, gate)
    ids_BS = make_ids(shape)
    lengths = ((5, 1, 6), (3, 7, -2))  # the last two tokens of the second row are padding
    document_ids_BS = torch.tensor([[0] * 5 + [1] + [2] * 6, [0] * 3 + [1] * 7 + [-1] * 2])
    found_BSV = ours(ids_BS, document_ids_BS=document_ids_BS)
    for row, row_lengths in enumerate(lengths):
        start = 0
        for length in row_lengths:
            if length > 0:
                alone = ids_BS[row : row + 1, start : start + length]
                close = {"rtol": TOLERANCE, "atol": TOLERANCE}
                torch.testing.assert_close(found_BSV[row, start : start + length], ours(alone)[0], **close)
                torch.testing.assert_close(
                    found_BSV[row, start : start + length], theirs(input_ids=alone).logits[0], **close
                )
            start += abs(length)


@pytest.mark.parametrize("gate", GATES)
def test_packed_gradients_are_those_of_documents_alone(gate: str) -> None:
    shape = SHAPES["default"]._replace(batch=1, seq_len=11)
    ids_BS, targets_BS = make_ids(shape), make_ids(shape, seed=1)
    document_ids_BS = torch.tensor([[0] * 4 + [1] * 7])
    packed, alone = our_model(shape, gate), our_model(shape, gate)
    output = packed(ids_BS, targets_BS, document_ids_BS)
    (output.lm_loss * output.num_targets).backward()
    for part in (slice(0, 4), slice(4, 11)):
        output = alone(ids_BS[:, part], targets_BS[:, part])
        (output.lm_loss * output.num_targets).backward()
    for (name, a), (_, b) in zip(packed.named_parameters(), alone.named_parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() <= TOLERANCE * b.grad.abs().max(), name
