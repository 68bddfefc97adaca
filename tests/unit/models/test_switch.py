"""The Switch Transformer against torch's encoder, its masks against one token at a time, and its counts.

Shapes: B batch, S sequence, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moe_scale.config import SwitchModelConfig, SwitchMoEConfig
from moe_scale.models.build import build_model
from moe_scale.models.switch import SwitchLayer, SwitchLM
from moe_scale.models.switch_counts import num_active_params, num_params, training_flops_per_token
from moe_scale.models.transformer import sinusoids
from moe_scale.moe import experts
from moe_scale.settings import to_dict

VOCAB = 61
MODEL = SwitchModelConfig(
    vocab_size=VOCAB, num_layers=2, d_model=24, num_heads=4, dropout=0.0, bias=True, positions="sinusoidal"
)
MOE = SwitchMoEConfig(num_experts=4, intermediate_size=16, dispatch="dropless", expert_bias=True)


def build(model: SwitchModelConfig = MODEL, moe: SwitchMoEConfig = MOE, dtype: torch.dtype = torch.float32) -> SwitchLM:
    """A model in evaluation mode none of whose norms and biases are at their initial ones and zeros."""
    built = SwitchLM(model, moe, seed=3).eval().to(dtype)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.dim() == 1 or parameter.shape[-1:] == parameter.shape:
                parameter += 0.2 * torch.randn_like(parameter)
    return built


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def torch_twin(model: SwitchLM) -> nn.TransformerEncoder:
    """torch's encoder with the weights of a model that has one expert a sparse layer."""
    config, moe = model.config, model.moe_config
    layer = nn.TransformerEncoderLayer(
        config.d_model, config.num_heads, moe.intermediate_size, dropout=0.0, activation=moe.activation,
        layer_norm_eps=config.norm_eps, batch_first=True, norm_first=config.norm_order == "pre", bias=config.bias,
        dtype=torch.float64,
    )  # fmt: skip
    norm = nn.LayerNorm(config.d_model, config.norm_eps, bias=config.bias, dtype=torch.float64)
    twin = nn.TransformerEncoder(layer, config.num_layers, norm if config.norm_order == "pre" else None, False)
    weights = model.state_dict()
    twin.load_state_dict({theirs: weights[ours].view_as(twin.get_parameter(theirs)) for ours, theirs in pairs(model)})
    return twin


def pairs(model: SwitchLM) -> Iterator[tuple[str, str]]:
    """Names of the parameters that torch's encoder has too, ours and torch's."""
    renamed = {
        "moe.experts.gate_up": "linear1.weight",
        "moe.experts.gate_up_bias": "linear1.bias",
        "moe.experts.down": "linear2.weight",
        "moe.experts.down_bias": "linear2.bias",
    }
    for name, _ in model.named_parameters():
        if name.startswith(("layers.", "norm.")) and ".router." not in name:
            own = next((part for part in renamed if name.endswith(f".{part}")), "")
            yield name, name.removesuffix(own) + renamed.get(own, "")


@pytest.mark.parametrize("dispatch", ["dropless", "capacity"])
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("norm_order", "activation"), [("pre", "relu"), ("post", "gelu")])
def test_one_expert_equals_torchs_encoder(
    norm_order: Any, activation: Any, bias: bool, every: int, dispatch: Any
) -> None:
    config = replace(MODEL, norm_order=norm_order, bias=bias)
    moe = replace(MOE, num_experts=1, activation=activation, every=every, expert_bias=bias, dispatch=dispatch)
    model = build(config, moe, torch.float64)
    twin = torch_twin(model)
    ids_BS = tokens(3, 9)
    causal = nn.Transformer.generate_square_subsequent_mask(9, dtype=torch.float64)

    logits = model(ids_BS)
    places = sinusoids(torch.arange(9), config.d_model).double()
    theirs = twin(model.embedding(ids_BS) * config.d_model**0.5 + places, mask=causal, is_causal=True)
    expected = theirs @ model.embedding.weight.T
    torch.testing.assert_close(logits, expected, atol=1e-10, rtol=1e-10)

    direction = torch.randn_like(logits)
    (logits * direction).sum().backward()
    mine = {ours: model.get_parameter(ours).grad for ours, _ in pairs(model)}
    (expected * direction).sum().backward()
    for ours, name in pairs(model):
        grad, wanted = mine[ours], twin.get_parameter(name).grad
        assert grad is not None
        assert wanted is not None
        torch.testing.assert_close(grad.view_as(wanted), wanted, atol=1e-9, rtol=1e-9, msg=name)


def test_alibi_is_a_bias_of_torchs_attention() -> None:
    config, moe = replace(MODEL, positions="alibi", num_layers=1), replace(MOE, num_experts=1, every=1)
    model = build(config, moe, torch.float64)
    ids_BS = tokens(2, 9)
    steps = torch.arange(9)
    slopes = torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8], dtype=torch.float64)
    bias = -slopes[:, None, None] * (steps[:, None] - steps).abs()
    bias = bias.masked_fill(steps > steps[:, None], float("-inf")).repeat(2, 1, 1)
    theirs = torch_twin(model)(model.embedding(ids_BS) * config.d_model**0.5, mask=bias)
    torch.testing.assert_close(model(ids_BS), theirs @ model.embedding.weight.T, atol=1e-10, rtol=1e-10)


def test_a_sparse_layer_is_torchs_layer_without_its_feed_forward() -> None:
    dense, sparse = build().layers
    assert isinstance(dense, nn.TransformerEncoderLayer)
    assert isinstance(sparse, nn.TransformerEncoderLayer)
    assert dense.moe is None
    assert not hasattr(sparse, "linear1")


POSITIONS = ["alibi", "sinusoidal", "learned"]


@pytest.mark.parametrize("positions", POSITIONS)
def test_a_causal_model_sees_nothing_later(positions: Any) -> None:
    model = build(replace(MODEL, positions=positions))
    ids_BS = tokens(2, 8)
    changed = ids_BS.clone()
    changed[:, 5:] = tokens(2, 3, seed=9)
    torch.testing.assert_close(model(changed)[:, :5], model(ids_BS)[:, :5])
    assert not torch.allclose(model(changed)[:, 5:], model(ids_BS)[:, 5:])


def test_documents_of_a_row_do_not_see_each_other() -> None:
    model = build()
    ids_BS, documents_BS = tokens(1, 8), torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    targets_BS = tokens(1, 8, seed=2)
    both = model(ids_BS, targets_BS, documents_BS)
    changed = ids_BS.clone()
    changed[:, :3] = tokens(1, 3, seed=7)
    only = torch.where(documents_BS == 1, targets_BS, -100)
    torch.testing.assert_close(model(changed, only, documents_BS).lm_loss, model(ids_BS, only, documents_BS).lm_loss)
    assert both.num_targets == 8


def test_a_prefix_is_seen_whole_and_what_follows_is_not() -> None:
    model = build(replace(MODEL, objective="span_corruption"))
    ids_BS = tokens(2, 8)
    whole = model(ids_BS, prefix=5)
    changed = ids_BS.clone()
    changed[:, 4] = (changed[:, 4] + 1) % VOCAB  # the prefix's last token
    assert not torch.allclose(model(changed, prefix=5)[:, 0], whole[:, 0]), "the first sees the last of the prefix"
    changed = ids_BS.clone()
    changed[:, 6:] = tokens(2, 2, seed=9)
    torch.testing.assert_close(model(changed, prefix=5)[:, :6], whole[:, :6])


def test_targets_inside_a_prefix_do_not_count() -> None:
    model = build(replace(MODEL, objective="span_corruption"))
    ids_BS, targets_BS = tokens(2, 8), tokens(2, 8, seed=2)
    output = model(ids_BS, targets_BS, prefix=5)
    assert output.num_targets == 2 * 4  # the prefix's last position predicts the first token after it
    log_probs = model(ids_BS, prefix=5)[:, 4:].log_softmax(-1)
    expected = -log_probs.gather(-1, targets_BS[:, 4:, None]).mean()
    torch.testing.assert_close(output.lm_loss, expected)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("objective", ["causal", "span_corruption"])
def test_continuing_from_a_cache_is_a_forward_pass(objective: Any, positions: Any) -> None:
    model = build(replace(MODEL, objective=objective, positions=positions))
    lengths, later = (6, 1, 4), tokens(3, 3, seed=4)
    rows = [tokens(length, seed=length) for length in lengths]
    ids_BS = torch.zeros(3, 6, dtype=torch.int64)
    valid_BS = torch.arange(6) >= 6 - torch.tensor(lengths)[:, None]
    for row, ids in enumerate(rows):
        ids_BS[row, -len(ids) :] = ids
    logits_BV, state = model.start(ids_BS, valid_BS)
    for step in range(4):
        for row, (ids, length) in enumerate(zip(rows, lengths, strict=True)):
            alone = torch.cat([ids, later[row, :step]])[None]
            prefix = 0 if objective == "causal" else length
            torch.testing.assert_close(logits_BV[row], model(alone, prefix=prefix)[0, -1], atol=1e-5, rtol=1e-5)
        if step < 3:
            logits_BV, state = model.step(later[:, step], state)


def test_the_initial_weights_have_the_scale() -> None:
    config = replace(MODEL, d_model=128, init_scale=0.1, bias=False)
    model = SwitchLM(config, replace(MOE, intermediate_size=256, expert_bias=False), seed=1)
    cut = 0.9866  # standard deviation of a normal distribution cut at three
    for name, fan_in in [("layers.0.self_attn.in_proj_weight", 128), ("layers.0.self_attn.out_proj.weight", 128),
                         ("layers.0.linear2.weight", 256), ("layers.1.moe.experts.gate_up", 128),
                         ("layers.1.moe.experts.down", 256)]:  # fmt: skip
        deviation = model.get_parameter(name).std().item()
        assert deviation == pytest.approx(cut * (0.1 / fan_in) ** 0.5, rel=0.03), name


VARIANTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"bias": False, "norm_order": "post"}, {"expert_bias": False}),
    ({"positions": "learned", "num_layers": 4}, {"every": 3, "shared_intermediate_size": 8}),
    ({"bias": False}, {"enabled": False}),
    ({}, {"enabled": False, "dense_size": "total"}),
    ({}, {"router": "hash", "every": 1}),
    ({}, {"router": "noisy", "top_k": 2}),
]


@pytest.mark.parametrize(("model", "moe"), VARIANTS)
def test_counts_equal_the_module(model: dict[str, Any], moe: dict[str, Any]) -> None:
    config, layer = replace(MODEL, **model), replace(MOE, **moe)
    built = SwitchLM(config, layer)
    total = sum(p.numel() for p in built.parameters())
    assert num_params(config, layer) == total
    sparse = [m for m in built.layers if cast(SwitchLayer, m).moe is not None]
    unused = sum(p.numel() for m in sparse for p in cast(Any, m).moe.experts.parameters()) * (
        1 - layer.top_k / layer.num_experts
    )
    assert num_active_params(config, layer) == total - round(unused)


def expert_by_expert(x_RD: Tensor, weight_LOD: Tensor, counts_L: Tensor) -> Tensor:
    """The experts' grouped product as products that torch counts."""
    rows = x_RD.split(counts_L.tolist())
    return torch.cat([F.linear(x_ND, weight_OD) for x_ND, weight_OD in zip(rows, weight_LOD, strict=True)])


@pytest.mark.parametrize(
    "moe",
    [
        {"enabled": False},
        {},
        {"every": 1, "top_k": 2, "shared_intermediate_size": 8},
        {"router": "noisy", "top_k": 3},
        {"every": 1, "residual": True},
        {"router": "hash"},
    ],
)
@pytest.mark.parametrize("prefix", [0, 5])
def test_flops_equal_those_that_torch_counts(prefix: int, moe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, those of experts for as many rows as they are sent, and no look-up."""
    config, length, batch = replace(MODEL, bias=False), 16, 2
    layer = replace(MOE, **moe)  # with biases, as experts without have kernels that torch does not count
    monkeypatch.setattr(experts, "grouped_linear", expert_by_expert)
    model = SwitchLM(config, layer).train()
    ids_BS, targets_BS = tokens(batch, length), tokens(batch, length, seed=2)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(ids_BS, targets_BS, prefix=prefix)
    ours = training_flops_per_token(config, layer, length, prefix) / 3
    # torch counts whole squares of scores, and of the head both products of the backward pass in its forward pass.
    seen = (prefix * max(prefix, 1) + sum(range(prefix + 1, length + 1))) / length
    whole = config.num_layers * 4 * config.d_model * (length - seen)
    head = 2 * config.vocab_size * config.d_model * (length - max(prefix - 1, 0)) / length
    assert counter.get_total_flops() == pytest.approx(batch * length * (ours + whole + 2 * head))


def test_it_is_built_by_name() -> None:
    model = build_model("switch", {"model": to_dict(MODEL), "moe": to_dict(MOE)})
    assert sum(p.numel() for p in model.parameters()) == num_params(MODEL, MOE)
