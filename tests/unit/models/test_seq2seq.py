"""The encoder-decoder against torch's own, its cache against none, and its counts against the module."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moe_scale.config import MoEConfig, Seq2SeqConfig
from moe_scale.models import seq2seq_counts
from moe_scale.models.seq2seq import PAD_ID as PAD
from moe_scale.models.seq2seq import Seq2Seq
from moe_scale.models.transformer import sinusoids

BOS, VOCAB = 2, 307
MODEL = Seq2SeqConfig(
    vocab_size=VOCAB, num_encoder_layers=2, num_decoder_layers=2, d_model=24, num_heads=4, max_positions=40,
    dropout=0.0, loss_chunk_tokens=16,
)  # fmt: skip
MOE = MoEConfig(num_experts=4, top_k=2, intermediate_size=12)
DENSE = MoEConfig(enabled=False, top_k=1, intermediate_size=32, activation="relu")


def build(moe: MoEConfig = MOE, **changes: Any) -> Seq2Seq:
    """A model in fp64 whose vectors are not all ones and zeros."""
    model = Seq2Seq(replace(MODEL, **changes), moe, seed=5).double().eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def sentences(*lengths: int, seed: int = 1) -> Tensor:
    """Rows of random tokens, padded to the longest."""
    torch.manual_seed(seed)
    ids = torch.full((len(lengths), max(lengths)), PAD)
    for row, length in zip(ids, lengths, strict=True):
        row[:length] = torch.randint(3, VOCAB, (length,))
    return ids


def reference(model: Seq2Seq) -> nn.Transformer:
    """``torch.nn.Transformer`` with the same weights."""
    config, hidden = model.config, DENSE.intermediate_size
    layer: dict[str, Any] = {
        "d_model": config.d_model, "nhead": config.num_heads, "dim_feedforward": hidden, "dropout": 0.0,
        "activation": model.moe_config.activation, "layer_norm_eps": config.norm_eps, "batch_first": True,
        "norm_first": config.norm_order == "pre",
    }  # fmt: skip

    def final() -> nn.Module | None:
        return nn.LayerNorm(config.d_model, config.norm_eps) if config.norm_order == "pre" else None

    theirs = nn.Transformer(
        **layer,
        custom_encoder=nn.TransformerEncoder(
            nn.TransformerEncoderLayer(**layer), 2, final(), enable_nested_tensor=False
        ),
        custom_decoder=nn.TransformerDecoder(nn.TransformerDecoderLayer(**layer), 2, final()),
    ).double()

    def copy_attention(to: nn.MultiheadAttention, ours: Any) -> None:
        to.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key_value.weight]))
        to.out_proj.weight.copy_(ours.out.weight)
        to.in_proj_bias.zero_()
        to.out_proj.bias.zero_()

    def copy_layer(to: Any, ours: Any) -> None:
        copy_attention(to.self_attn, ours.self_attention)
        norms = [ours.attention_residual.norm]
        if hasattr(ours, "cross_attention"):
            copy_attention(to.multihead_attn, ours.cross_attention)
            norms.append(ours.cross_residual.norm)
        for number, norm in enumerate([*norms, ours.feed_forward.residual.norm], start=1):
            getattr(to, f"norm{number}").load_state_dict(norm.state_dict())
        to.linear1.weight.copy_(ours.feed_forward.ffn.gate_up)
        to.linear2.weight.copy_(ours.feed_forward.ffn.down)
        to.linear1.bias.zero_()
        to.linear2.bias.zero_()

    with torch.no_grad():
        for to, ours in zip(
            [*theirs.encoder.layers, *theirs.decoder.layers], [*model.encoder, *model.decoder], strict=True
        ):
            copy_layer(to, ours)
        if config.norm_order == "pre":
            theirs.encoder.norm.load_state_dict(model.encoder_norm.state_dict())
            theirs.decoder.norm.load_state_dict(model.decoder_norm.state_dict())
    return theirs


@pytest.mark.parametrize("norm_order", ["pre", "post"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_dense_model_is_torchs_transformer(norm_order: str, activation: Any) -> None:
    moe = replace(DENSE, activation=activation)
    model = build(moe, norm="layernorm", norm_order=norm_order, positions="sinusoidal")
    theirs = reference(model).eval()
    source, inputs = sentences(7, 4, 1), sentences(5, 2, 6, seed=2)
    padding = source == PAD

    def embed(ids: Tensor) -> Tensor:
        scaled = model.embedding.weight[ids] * model.config.d_model**0.5
        return scaled + sinusoids(torch.arange(ids.shape[1]), model.config.d_model).double()

    hidden = theirs(
        embed(source),
        embed(inputs),
        tgt_mask=torch.ones(6, 6).triu(1).bool(),
        src_key_padding_mask=padding,
        memory_key_padding_mask=padding,
        tgt_is_causal=True,
    )
    expected = hidden @ model.embedding.weight.T
    logits = model(source, inputs)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)

    weights = torch.randn(logits.shape, dtype=torch.float64)
    pairs = [
        (model.encoder[0].self_attention.query.weight, lambda g: g["encoder.layers.0.self_attn.in_proj_weight"][:24]),
        (model.decoder[1].cross_attention.out.weight, lambda g: g["decoder.layers.1.multihead_attn.out_proj.weight"]),
        (model.decoder[0].feed_forward.ffn.down, lambda g: g["decoder.layers.0.linear2.weight"]),
        (model.encoder[1].feed_forward.residual.norm.bias, lambda g: g["encoder.layers.1.norm2.bias"]),
    ]
    ours = torch.autograd.grad((logits * weights).sum(), [ours for ours, _ in pairs])
    names = [name for name, _ in theirs.named_parameters()]
    grads = torch.autograd.grad((expected * weights).sum(), [*theirs.parameters()], allow_unused=True)
    by_name = dict(zip(names, grads, strict=True))
    for mine, (_, look_up) in zip(ours, pairs, strict=True):
        torch.testing.assert_close(mine, look_up(by_name), rtol=1e-8, atol=1e-9)


VARIANTS = [
    *({"positions": p, "norm": n, "norm_order": o} for p, n, o in itertools.product(
        ["rotary", "sinusoidal", "learned"], ["rmsnorm", "layernorm"], ["pre", "post"])),
    {"experts_in": "encoder"},
    {"experts_in": "decoder"},
]  # fmt: skip
ROUTERS = [{"router": "softmax"}, {"router": "noisy"}, {"router": "sigmoid"}, {"router": "hash"}, {"residual": True}]


@pytest.mark.parametrize(
    ("model", "moe"), [*((m, {}) for m in VARIANTS), *(({}, r) for r in ROUTERS), ({}, {"enabled": False})], ids=str
)
def test_a_step_at_a_time_is_the_whole_at_once(model: dict[str, Any], moe: dict[str, Any]) -> None:
    built = build(replace(MOE, **moe), **model)
    source, inputs = sentences(6, 3, 5), sentences(7, 7, 7, seed=3)
    with torch.no_grad():
        at_once = built(source, inputs)
        state = built(source)
        for cut in ((0, 1), (1, 2), (2, 5), (5, 6), (6, 7)):  # single tokens and several together
            logits, state = built(inputs[:, slice(*cut)], state=state)
            torch.testing.assert_close(logits, at_once[:, cut[1] - 1], rtol=1e-6, atol=1e-6)
    assert state.length == 7


@pytest.mark.parametrize("model", VARIANTS, ids=str)
def test_padding_and_company_change_nothing(model: dict[str, Any]) -> None:
    built = build(**model)
    source, inputs = sentences(6), sentences(5, seed=4)
    targets = sentences(5, seed=5)
    crowd, crowd_inputs = sentences(9, 6, 2, seed=6), sentences(8, 5, 3, seed=7)
    crowd[1] = torch.cat([source[0], torch.full((3,), PAD)])
    crowd_inputs[1, :5] = inputs[0]
    with torch.no_grad():
        alone = built(source, inputs)
        torch.testing.assert_close(built(crowd, crowd_inputs)[1, :5], alone[0], rtol=1e-9, atol=1e-9)
        scored = built(source, inputs, targets)
        padded = torch.cat([targets, torch.full((1, 3), -100)], dim=1)
        more_source, more_inputs = torch.full((1, 4), PAD), torch.full((1, 3), PAD)
        wider = built(torch.cat([source, more_source], dim=1), torch.cat([inputs, more_inputs], dim=1), padded)
    assert wider.num_targets == scored.num_targets == 5
    torch.testing.assert_close(wider.loss, scored.loss, rtol=1e-9, atol=0)
    for ours, theirs in zip(wider.moe, scored.moe, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_rows_of_a_state_are_those_asked_for() -> None:
    built = build()
    source, inputs = sentences(6, 3, 5), sentences(4, 4, 4, seed=3)
    rows = torch.tensor([2, 2, 0])
    with torch.no_grad():
        _, state = built(inputs[:, :3], state=built(source))
        logits, _ = built(inputs[rows, 3:], state=state.select(rows))
        expected = built(source, inputs)[rows, 3]
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)


def test_a_source_of_padding_alone_is_finite() -> None:
    out = build()(torch.full((2, 3), PAD), torch.full((2, 2), BOS), torch.full((2, 2), -100))
    assert out.num_targets == 0
    assert out.lm_loss == 0
    assert torch.isfinite(out.loss)


def test_loss_is_cross_entropy_with_label_smoothing() -> None:
    built = build(replace(MOE, aux_loss_weight=0.0, z_loss_weight=0.0), label_smoothing=0.2)
    source, inputs, targets = sentences(6, 3), sentences(5, 4, seed=3), sentences(5, 4, seed=4)
    targets = targets.masked_fill(targets == PAD, -100)
    logits = built(source, inputs).flatten(0, 1)
    for training, smoothing in ((True, 0.2), (False, 0.0)):
        out = built.train(training)(source, inputs, targets)
        expected = nn.functional.cross_entropy(logits, targets.flatten(), label_smoothing=smoothing)
        plain = nn.functional.cross_entropy(logits, targets.flatten())
        torch.testing.assert_close(out.loss, expected, rtol=1e-9, atol=0)
        torch.testing.assert_close(out.lm_loss, plain.detach(), rtol=1e-9, atol=0)


def test_loss_adds_the_router_losses_of_both_halves() -> None:
    built = build(replace(MOE, aux_loss_weight=0.3, z_loss_weight=0.7), label_smoothing=0.0)
    out = built(sentences(6, 3), sentences(5, 4, seed=3), sentences(5, 5, seed=4))
    assert out.moe.assignments_E.shape == (4, 4)
    expected = out.lm_loss + 0.3 * out.moe.aux_loss.sum() + 0.7 * out.moe.z_loss.sum()
    torch.testing.assert_close(out.loss, expected)
    # The encoder sends its 9 tokens, the decoder its 10 targets, each to 2 experts.
    assert out.moe.assignments_E.sum(dim=1).tolist() == [18, 18, 20, 20]


def test_recomputing_changes_no_gradient() -> None:
    grads = []
    for recompute in (False, True):
        built = build(activation_checkpointing=recompute, dropout=0.3).train()
        torch.manual_seed(3)
        built(sentences(6, 3), sentences(5, 4, seed=3), sentences(5, 5, seed=4)).loss.backward()
        grads.append([p.grad for p in built.parameters()])
    torch.testing.assert_close(*grads)


COUNTED = [
    {}, {"every": 2}, {"residual": True}, {"shared_intermediate_size": 8}, {"router": "hash"}, {"router": "noisy"},
    {"activation": "gelu", "expert_bias": True}, {"enabled": False}, {"enabled": False, "dense_size": "total"},
    {"enabled": False, "dense_size": "total", "every": 2},
]  # fmt: skip


@pytest.mark.parametrize("moe", COUNTED, ids=str)
@pytest.mark.parametrize("model", VARIANTS, ids=str)
def test_counts_are_those_of_the_module(model: dict[str, Any], moe: dict[str, Any]) -> None:
    config, moe_config = replace(MODEL, **model), replace(MOE, **moe)
    with torch.device("meta"):
        built = Seq2Seq(config, moe_config)
    assert seq2seq_counts.num_params(config, moe_config) == sum(p.numel() for p in built.parameters())
    for part in ("encoder", "decoder"):
        norm = getattr(built, f"{part}_norm")
        expected = sum(p.numel() for m in (getattr(built, part), norm) for p in m.parameters())
        assert seq2seq_counts.part_params(config, moe_config, part).total == expected


@pytest.mark.parametrize("every", [1, 2])
def test_dense_models_are_of_equal_size(every: int) -> None:
    moe = replace(MOE, every=every)
    model = replace(MODEL, num_encoder_layers=4, num_decoder_layers=4)
    routers = sum(seq2seq_counts.part_params(model, moe, part).router for part in ("encoder", "decoder"))
    sparse = seq2seq_counts.num_params(model, moe) - routers
    total = replace(moe, enabled=False, dense_size="total")
    assert seq2seq_counts.num_params(model, total) == sparse
    active = replace(moe, enabled=False)
    assert seq2seq_counts.num_params(model, active) == seq2seq_counts.num_active_params(model, moe) - routers


@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_flops_are_those_of_the_products(activation: Any) -> None:
    """Against torch's own counter, over all products of a forward pass."""
    dense = replace(MOE, enabled=False, activation=activation)
    built = build(dense)
    source, inputs = sentences(6, 6), sentences(5, 5, seed=3)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        built(source, inputs)
    ours = 2 * seq2seq_counts.training_flops(MODEL, dense, 6, 5) / 3
    # The counter takes causal attention, of 15 scores, for a full one of 25, in both sentences and both layers.
    assert counter.get_total_flops() == ours + 2 * 2 * 4 * MODEL.d_model * (25 - 15)

    routers = 6 * MOE.num_experts * MODEL.d_model * (2 * 6 + 2 * 5)
    sparse = seq2seq_counts.training_flops(MODEL, replace(dense, enabled=True), 6, 5)
    assert sparse == seq2seq_counts.training_flops(MODEL, dense, 6, 5) + routers
