"""Every router, activation and dense half of the layer against a slow MoE in fp64: outputs, losses and all gradients.

The reference runs every expert on every token and adds the results up with a matrix of weights [T, E], which is 0
where an expert did not take a token. Routing decisions are made by sorting one token's (or one expert's) scores.

Shapes: B batch, S sequence, T = B*S tokens, D model width, F expert hidden width, E experts, K experts per token.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_scale.config import MoEConfig
from moe_scale.initialization import Init
from moe_scale.moe.experts import Experts
from moe_scale.moe.layer import MoELayer, MoEStats, rows_per_expert
from moe_scale.parallel.groups import ParallelGroups
from tests.oracle import kept_choices

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
D_MODEL = 5
ROUTERS = ("softmax", "noisy", "sigmoid", "expert_choice", "hash")
ACTIVATIONS = ("swiglu", "gelu", "relu")


class Result(NamedTuple):
    """What the reference returns; of the statistics those that a router has."""

    y_TD: Tensor
    aux_loss: Tensor
    z_loss: Tensor
    assignments_E: list[int]
    dropped: int


def make_config(router: str, **changes: Any) -> MoEConfig:
    settings = {"num_experts": 4, "top_k": 2, "intermediate_size": 3, "router": router, "min_capacity": 1}
    if router == "expert_choice":
        settings["dispatch"] = "capacity"
    return MoEConfig(**(settings | changes))


def make_layer(config: MoEConfig, d_model: int = D_MODEL, seed: int = 0) -> MoELayer:
    """A layer in fp64 in which nothing that starts at zero is zero."""
    layer = MoELayer(config, d_model, ParallelGroups(), Init(seed)).double()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for tensor in itertools.chain(layer.parameters(), layer.buffers()):
            if not tensor.any():
                tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))
    return layer


def make_input(batch: int = 2, seq_len: int = 6, d_model: int = D_MODEL, seed: int = 2) -> tuple[Tensor, Tensor]:
    """x_BSD and token ids."""
    generator = torch.Generator().manual_seed(seed)
    x_BSD = torch.randn(batch, seq_len, d_model, generator=generator, dtype=torch.float64)
    return x_BSD.requires_grad_(), torch.randint(50_257, (batch, seq_len), generator=generator)


def slow_ffn(x_TD: Tensor, up_ID: Tensor, down_DF: Tensor, activation: str, biases: tuple[Any, Any]) -> Tensor:
    """down(activation(up(x) + b1)) + b2 of all tokens."""
    hidden_TI = torch.einsum("td,id->ti", x_TD, up_ID)
    if biases[0] is not None:
        hidden_TI = hidden_TI + biases[0]
    if activation == "swiglu":
        half = hidden_TI.shape[1] // 2
        gate_TF, up_TF = hidden_TI[:, :half], hidden_TI[:, half:]
        hidden_TF = gate_TF / (1 + torch.exp(-gate_TF)) * up_TF
    elif activation == "gelu":
        hidden_TF = hidden_TI * 0.5 * (1 + torch.erf(hidden_TI / math.sqrt(2)))
    else:
        hidden_TF = torch.where(hidden_TI > 0, hidden_TI, 0.0)
    y_TD = torch.einsum("tf,df->td", hidden_TF, down_DF)
    return y_TD if biases[1] is None else y_TD + biases[1]


def top(scores: Tensor, count: int) -> list[int]:
    values = scores.tolist()
    return sorted(range(len(values)), key=lambda i: -values[i])[:count]


class Decision(NamedTuple):
    logits_TE: Tensor
    probs_TE: Tensor
    weights_TE: Tensor
    """0 where the expert did not take the token."""
    chosen: list[list[int]]
    """The tokens' experts."""


def slow_route(layer: MoELayer, x_TD: Tensor, token_ids: list[int], valid: list[bool]) -> Decision:
    """Who takes whom. Draws the same noise as the layer from the global generator."""
    config, num_tokens, num_experts = layer.config, len(x_TD), layer.config.num_experts
    weights_TE = [[x_TD.new_zeros(()) for _ in range(num_experts)] for _ in range(num_tokens)]
    chosen: list[list[int]] = [[] for _ in range(num_tokens)]
    if config.router == "hash":
        for t, token in enumerate(token_ids):
            first = (token * 2654435761 % 2**32) * num_experts >> 32
            chosen[t] = [(first + k) % num_experts for k in range(config.top_k)]
            for e in chosen[t]:
                weights_TE[t][e] = x_TD.new_tensor(1 / config.top_k)
        probs_TE = torch.stack([torch.stack(row) for row in weights_TE])
        return Decision(torch.zeros_like(probs_TE), probs_TE, probs_TE, chosen)

    logits_TE = torch.einsum("td,ed->te", x_TD, layer.router.weight) / config.router_temperature
    if config.router == "noisy" and layer.training:
        spread_TE = torch.log(1 + torch.exp(torch.einsum("td,ed->te", x_TD, layer.noise.weight)))
        logits_TE = logits_TE + torch.randn(num_tokens, num_experts, dtype=x_TD.dtype) * spread_TE
    gates_TE = 1 / (1 + torch.exp(-logits_TE)) if config.router == "sigmoid" else torch.exp(logits_TE)
    probs_TE = gates_TE / gates_TE.sum(dim=1, keepdim=True)
    if config.router == "expert_choice":
        factor = config.capacity_factor if layer.training else config.eval_capacity_factor
        places = min(max(math.ceil(num_tokens * config.top_k / num_experts * factor), config.min_capacity), num_tokens)
        real = [t for t in range(num_tokens) if valid[t]]
        for e in range(num_experts):
            for place in top(probs_TE[real, e], places):
                weights_TE[real[place]][e] = probs_TE[real[place], e]
                chosen[real[place]].append(e)
    else:
        shares_TE = gates_TE if config.router == "sigmoid" else probs_TE
        for t in range(num_tokens):
            preference = gates_TE[t] + layer.selection_bias_E if config.router == "sigmoid" else probs_TE[t]
            chosen[t] = top(preference, config.top_k)
            rescaled = config.top_k > 1 and (config.renormalize or config.router == "noisy")
            total = sum(shares_TE[t, e] for e in chosen[t]) if rescaled else 1.0
            for e in chosen[t]:
                weights_TE[t][e] = shares_TE[t, e] / total
    return Decision(logits_TE, probs_TE, torch.stack([torch.stack(row) for row in weights_TE]), chosen)


def reference(layer: MoELayer, x_BSD: Tensor, ids_BS: Tensor, valid_BS: Tensor | None) -> Result:
    config, experts = layer.config, layer.experts
    x_TD, num_experts = x_BSD.flatten(0, 1), config.num_experts
    valid = [True] * len(x_TD) if valid_BS is None else valid_BS.flatten().tolist()
    route = slow_route(layer, x_TD, ids_BS.flatten().tolist(), valid)
    weights_TE, lost = route.weights_TE, 0
    if config.dispatch == "capacity" and config.router != "expert_choice":
        ids_TK, places = torch.tensor(route.chosen), rows_per_expert(config, len(x_TD), training=layer.training)
        probs_TK = route.probs_TE.detach().gather(1, ids_TK)
        kept_TK = kept_choices(ids_TK, probs_TK, torch.tensor(valid), places, config.drop_policy)
        weights_TE = weights_TE * torch.zeros_like(weights_TE).scatter(1, ids_TK, kept_TK.to(x_TD.dtype))
        lost = int((~kept_TK & torch.tensor(valid).unsqueeze(1)).sum())

    y_TD = torch.zeros_like(x_TD)
    mask_T = torch.tensor(valid, dtype=x_TD.dtype)
    for e in range(num_experts):
        biases = (None, None) if experts.down_bias is None else (experts.gate_up_bias[e], experts.down_bias[e])
        out_TD = slow_ffn(x_TD, experts.gate_up[e], experts.down[e], config.activation, biases)
        y_TD = y_TD + (weights_TE[:, e] * mask_T).unsqueeze(1) * out_TD
    if layer.dense is not None:
        dense_TD = slow_ffn(x_TD, layer.dense.gate_up, layer.dense.down, config.activation, (None, None))
        if layer.mix is None:
            y_TD = y_TD + dense_TD
        else:
            scores_T2 = torch.einsum("td,md->tm", x_TD, layer.mix.weight).exp()
            share_T2 = scores_T2 / scores_T2.sum(dim=1, keepdim=True)
            y_TD = y_TD * share_T2[:, :1] + dense_TD * share_T2[:, 1:]

    real = [t for t in range(len(x_TD)) if valid[t]]
    given = [sum(route.chosen[t].count(e) for t in real) for e in range(num_experts)]
    none = x_TD.new_zeros(())
    aux_loss = z_loss = none
    if real and config.router != "hash":
        z_loss = sum((route.logits_TE[t].exp().sum().log() ** 2 for t in real), none) / len(real)
    if real and config.router not in ("hash", "expert_choice"):
        mean_E = sum((route.probs_TE[t] for t in real), torch.zeros_like(route.probs_TE[0])) / len(real)
        aux_loss = num_experts * sum((given[e] / sum(given) * mean_E[e] for e in range(num_experts)), none)
    missed = sum(config.top_k for t in real if not route.chosen[t])
    return Result(y_TD, aux_loss, z_loss, given, lost + missed)


def assert_equals_reference(
    layer: MoELayer, x_BSD: Tensor, ids_BS: Tensor, valid_BS: Tensor | None = None
) -> tuple[MoEStats, dict[str, Tensor]]:
    """Compare everything. Returns the layer's statistics and gradients of a random projection plus both losses."""
    torch.manual_seed(4)
    y_BSD, stats = layer(x_BSD, valid_BS, ids_BS)
    torch.manual_seed(4)
    expected = reference(layer, x_BSD, ids_BS, valid_BS)
    torch.testing.assert_close(y_BSD.flatten(0, 1), expected.y_TD, **CLOSE)
    torch.testing.assert_close(stats.aux_loss.to(x_BSD.dtype), expected.aux_loss, **CLOSE)
    torch.testing.assert_close(stats.z_loss.to(x_BSD.dtype), expected.z_loss, **CLOSE)
    assert stats.assignments_E.tolist() == expected.assignments_E
    assert stats.dropped == expected.dropped

    generator = torch.Generator().manual_seed(3)
    direction_TD = torch.randn(expected.y_TD.shape, generator=generator, dtype=torch.float64)
    if not layer.training:
        return stats, {}
    wanted = {"x": x_BSD, **dict(layer.named_parameters())}
    ours, theirs = (
        torch.autograd.grad((y * direction_TD).sum() + aux + z, list(wanted.values()), materialize_grads=True)
        for y, aux, z in ((y_BSD.flatten(0, 1), stats.aux_loss, stats.z_loss), expected[:3])
    )
    for name, a, b in zip(wanted, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **CLOSE, msg=lambda text, name=name: f"gradient of {name}: {text}")
    return stats, dict(zip(wanted, ours, strict=True))


@pytest.mark.parametrize("expert_bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_and_activation_equals_the_reference(router: str, activation: str, expert_bias: bool) -> None:
    layer = make_layer(make_config(router, activation=activation, expert_bias=expert_bias))
    names = {name for name, _ in layer.named_parameters()}
    assert ("experts.down_bias" in names) == ("experts.gate_up_bias" in names) == expert_bias
    assert_equals_reference(layer, *make_input())
    layer.eval()
    assert_equals_reference_at_evaluation(layer, *make_input())


def assert_equals_reference_at_evaluation(layer: MoELayer, x_BSD: Tensor, ids_BS: Tensor) -> None:
    with torch.no_grad():
        y_BSD, _ = layer(x_BSD, None, ids_BS)
        torch.testing.assert_close(y_BSD.flatten(0, 1), reference(layer, x_BSD, ids_BS, None).y_TD, **CLOSE)


class Drawn(NamedTuple):
    """A layer, and tokens of which some may be padding."""

    config: MoEConfig
    batch: int
    seq_len: int
    d_model: int
    seed: int
    real: float
    """Share of tokens that are not padding."""
    training: bool


@st.composite
def drawn(draw: st.DrawFn) -> Drawn:
    router = draw(st.sampled_from(ROUTERS), label="router")
    # A single expert likes all tokens equally: which of them it chooses is nobody's rule.
    num_experts = draw(st.integers(2 if router == "expert_choice" else 1, 10), label="E")
    changes = {
        "num_experts": num_experts,
        "top_k": draw(st.integers(1, min(4, num_experts)), label="K"),
        "intermediate_size": draw(st.integers(1, 4), label="F"),
        "activation": draw(st.sampled_from(ACTIVATIONS), label="activation"),
        "expert_bias": draw(st.booleans(), label="expert_bias"),
        "capacity_factor": draw(st.sampled_from([0.1, 0.4, 0.7, 1.0, 1.25, 3.0]), label="capacity_factor"),
        "min_capacity": draw(st.integers(1, 3), label="min_capacity"),
        "drop_policy": draw(st.sampled_from(["position", "probability"]), label="drop_policy"),
        **draw(st.sampled_from([{}, {"residual": True}, {"shared_intermediate_size": 3}]), label="dense half"),
    }
    if router in ("softmax", "sigmoid"):
        changes["renormalize"] = draw(st.booleans(), label="renormalize")
    if router != "expert_choice":
        changes["dispatch"] = draw(st.sampled_from(["dropless", "capacity"]), label="dispatch")
    made = make_config(router, **changes)
    assert made.problems("moe") == []
    return Drawn(
        made,
        draw(st.integers(1, 3), label="B"),
        draw(st.integers(1, 7), label="S"),
        draw(st.integers(1, 6), label="D"),
        draw(st.integers(0, 2**16), label="seed"),
        draw(st.sampled_from([1.0, 1.0, 0.6, 0.0]), label="real"),
        draw(st.sampled_from([True, True, False]), label="training"),
    )


@settings(max_examples=200, deadline=None, derandomize=True)
@given(drawn())
def test_any_layer_equals_the_reference(case: Drawn) -> None:
    """Shapes, routers, capacities, padding and empty experts, as hypothesis draws them."""
    layer = make_layer(case.config, case.d_model, case.seed).train(case.training)
    x_BSD, ids_BS = make_input(case.batch, case.seq_len, case.d_model, case.seed)
    generator = torch.Generator().manual_seed(case.seed)
    valid_BS = None if case.real == 1 else torch.rand(case.batch, case.seq_len, generator=generator) < case.real
    assert_equals_reference(layer, x_BSD, ids_BS, valid_BS)


@pytest.mark.parametrize("half", [{"shared_intermediate_size": 7}, {"residual": True}])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("router", ROUTERS)
def test_layers_with_a_dense_half_equal_the_reference(router: str, activation: str, half: dict[str, Any]) -> None:
    """A shared expert is added; Residual MoE mixes by a softmax over two scores (arXiv 2201.05596)."""
    layer = make_layer(make_config(router, activation=activation, **half))
    assert layer.dense is not None
    assert layer.dense.down.shape == (D_MODEL, 7 if "shared_intermediate_size" in half else 3)
    assert_equals_reference(layer, *make_input())


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("router", ["softmax", "noisy", "sigmoid"])
def test_any_k_with_and_without_renormalization_equals_the_reference(
    router: str, renormalize: bool, top_k: int
) -> None:
    layer = make_layer(make_config(router, top_k=top_k, renormalize=renormalize, router_temperature=1.7))
    _, gradients = assert_equals_reference(layer, *make_input())
    assert gradients["router.weight"].any()


@pytest.mark.parametrize("changes", [{}, {"residual": True}, {"shared_intermediate_size": 2}])
@pytest.mark.parametrize("padding", ["some", "one sequence", "all"])
@pytest.mark.parametrize("router", ROUTERS)
def test_padding_equals_the_reference(router: str, padding: str, changes: dict[str, Any]) -> None:
    """Padding reaches no expert and no loss; only the dense half, which has no choice to make, sees it."""
    layer = make_layer(make_config(router, expert_bias=True, **changes))
    x_BSD, ids_BS = make_input()
    share_B = {"some": [6, 3], "one sequence": [0, 5], "all": [0, 0]}[padding]
    valid_BS = torch.arange(6) < torch.tensor(share_B).unsqueeze(1)
    _, gradients = assert_equals_reference(layer, x_BSD, ids_BS, valid_BS)
    if not changes:
        assert not gradients["x"][~valid_BS].any()


@pytest.mark.parametrize(("capacity_factor", "some_are_lost"), [(0.3, True), (1.0, False), (4.0, False)])
def test_experts_choice_equals_the_reference_at_any_capacity(capacity_factor: float, some_are_lost: bool) -> None:
    """Tokens taken by no expert, by some and by all of them."""
    layer = make_layer(make_config("expert_choice", capacity_factor=capacity_factor, activation="gelu"))
    stats, _ = assert_equals_reference(layer, *make_input(1, 40))
    assert (stats.dropped > 0) == some_are_lost


@pytest.mark.parametrize("router", ROUTERS)
def test_one_token_equals_the_reference(router: str) -> None:
    layer = make_layer(make_config(router, expert_bias=True, residual=True))
    assert_equals_reference(layer, *make_input(1, 1))


@pytest.mark.parametrize("shape", [(0, 6), (2, 0)])
@pytest.mark.parametrize("scope", ["micro_batch", "sequence", "global"])
@pytest.mark.parametrize(
    ("router", "dispatch"),
    [pair for pair in itertools.product(ROUTERS, ("dropless", "capacity")) if pair != ("expert_choice", "dropless")],
)
def test_no_token_gives_no_output_and_zero_gradients(
    router: str, dispatch: str, scope: str, shape: tuple[int, int]
) -> None:
    config = make_config(router, dispatch=dispatch, aux_loss_scope=scope, expert_bias=True, residual=True)
    layer = make_layer(config)
    x_BSD, ids_BS = make_input(*shape)
    y_BSD, stats = layer(x_BSD, None, ids_BS)
    assert y_BSD.shape == x_BSD.shape
    assert not any(torch.any(value) for value in stats)
    (y_BSD.sum() + stats.aux_loss + stats.z_loss).backward()
    assert not any(p.grad is None or p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("expert_bias", [False, True])
@pytest.mark.parametrize("router", ["softmax", "noisy", "sigmoid", "hash"])
def test_all_tokens_to_one_expert_equal_the_reference(router: str, expert_bias: bool) -> None:
    """The other experts are empty, and their gradients zero."""
    layer = make_layer(make_config(router, top_k=1, expert_bias=expert_bias))
    x_BSD, ids_BS = make_input()
    ids_BS = torch.full_like(ids_BS, 11)
    if router != "hash":
        with torch.no_grad():
            x_BSD[..., 0] = 1
            layer.router.weight[2, 0] += 12
            if router == "sigmoid":
                layer.selection_bias_E.zero_()
    stats, gradients = assert_equals_reference(layer, x_BSD, ids_BS)
    (busy,) = stats.assignments_E.nonzero().flatten().tolist()
    assert stats.assignments_E[busy] == 12
    for name, gradient in gradients.items():
        if name.startswith("experts."):
            empty = [e for e in range(4) if e != busy]
            assert gradient[busy].any(), name
            assert not gradient[empty].any(), name


# --- dropout inside the experts


def identity_experts(dropout: float, hidden: int = 200) -> Experts:
    """Two experts whose output is their hidden layer, relu(x)."""
    config = MoEConfig(num_experts=2, intermediate_size=hidden, activation="relu", expert_dropout=dropout)
    experts = Experts(config, hidden, ParallelGroups(), Init(0)).double()
    with torch.no_grad():
        experts.gate_up.copy_(torch.eye(hidden))
        experts.down.copy_(torch.eye(hidden))
    return experts


def test_expert_dropout_zeroes_its_share_and_scales_the_rest() -> None:
    experts, x_RD = identity_experts(0.4), torch.rand(100, 200, dtype=torch.float64) + 0.5
    torch.manual_seed(0)
    y_RD = experts(x_RD, torch.tensor([30, 70]))
    kept = y_RD != 0
    torch.testing.assert_close(y_RD[kept], x_RD[kept] / 0.6, rtol=1e-12, atol=1e-12)
    assert float(kept.double().mean()) == pytest.approx(0.6, abs=0.01)
    assert not torch.equal(kept, experts(x_RD, torch.tensor([30, 70])) != 0), "new at every pass"


@pytest.mark.parametrize("router", ROUTERS)
def test_expert_dropout_is_the_identity_at_evaluation(router: str) -> None:
    """The layer's output is that of a layer without; in training it is not, and the shared expert's stays."""
    config = make_config(router, shared_intermediate_size=3)
    plain, dropping = make_layer(config), make_layer(dataclasses.replace(config, expert_dropout=0.4))
    x_BSD, ids_BS = make_input()
    plain.eval()
    dropping.eval()
    assert torch.equal(plain(x_BSD, None, ids_BS)[0], dropping(x_BSD, None, ids_BS)[0])
    dropping.train()
    assert not torch.allclose(plain(x_BSD, None, ids_BS)[0], dropping(x_BSD, None, ids_BS)[0])
    assert torch.equal(plain.run_dense(x_BSD), dropping.run_dense(x_BSD))
