"""The Triton kernels under Triton's interpreter, in fp32: run by ``test_fused_experts.py`` with TRITON_INTERPRET=1.

Shapes: T tokens, D model width, F expert hidden width, E experts, K experts per token, R rows sorted by expert.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_scale.config import MoEConfig
from moe_scale.initialization import Init
from moe_scale.moe.dispatch import DispatchPlan, plan_dispatch
from moe_scale.moe.experts import Experts
from moe_scale.moe.kernels import grouped_gemm
from moe_scale.moe.kernels.fused_experts import fused_experts
from moe_scale.moe.layer import MoELayer, rows_per_expert
from moe_scale.parallel.groups import ParallelGroups
from moe_scale.tools.peers import build_peer
from tests.oracle import dense_moe

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _nan_where_nothing_is_written() -> Iterator[None]:
    """Of the rows that are no expert's nothing may be read, wherever a plan has some."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make_experts(config: MoEConfig, d_model: int) -> tuple[Experts, Experts]:
    """The same experts by torch and by the kernels, with one set of parameters."""
    by_torch = Experts(config, d_model, ParallelGroups(), Init(0))
    fused = Experts(dataclasses.replace(config, kernels="triton"), d_model, ParallelGroups(), Init(0))
    fused.gate_up, fused.down = by_torch.gate_up, by_torch.down
    return by_torch, fused


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- against the oracle


@st.composite
def layers(draw: st.DrawFn) -> tuple[MoELayer, Tensor, Tensor | None]:
    num_experts = draw(st.integers(1, 6), label="E")
    config = MoEConfig(
        kernels="triton",
        num_experts=num_experts,
        top_k=draw(st.integers(1, min(3, num_experts)), label="K"),
        intermediate_size=draw(st.sampled_from([1, 8, 16, 19]), label="F"),
        renormalize=draw(st.booleans(), label="renormalize"),
        dispatch=draw(st.sampled_from(["dropless", "capacity"]), label="dispatch"),
        capacity_factor=draw(st.sampled_from([0.3, 1.0]), label="capacity_factor"),
        min_capacity=1,
    )
    d_model = draw(st.sampled_from([4, 16, 23]), label="D")
    num_tokens = draw(st.sampled_from([1, 5, 16, 33]), label="T")
    seed = draw(st.integers(0, 2**16), label="seed")
    layer = MoELayer(config, d_model, ParallelGroups(), Init(seed))
    x_BSD = randn(1, num_tokens, d_model, seed=seed)
    if draw(st.booleans(), label="first choices all go to one expert"):
        x_BSD[..., 0] = 1.0
        with torch.no_grad():
            layer.router.weight[0, 0] += 12.0
    valid_BS = None
    if draw(st.booleans(), label="padding"):
        valid_BS = torch.rand(1, num_tokens, generator=torch.Generator().manual_seed(seed)) < 0.7
    return layer, x_BSD.requires_grad_(), valid_BS


@settings(max_examples=20, deadline=None, derandomize=True)
@given(layers())
def test_layer_equals_the_dense_one(drawn: tuple[MoELayer, Tensor, Tensor | None]) -> None:
    layer, x_BSD, valid_BS = drawn
    config, num_tokens = layer.config, x_BSD.shape[1]
    y_BSD, _ = layer(x_BSD, valid_BS)
    direction = randn(*y_BSD.shape, seed=1)
    wanted = [x_BSD, layer.router.weight, layer.experts.gate_up, layer.experts.down]
    found = torch.autograd.grad((y_BSD * direction).sum(), wanted)

    exact = [tensor.detach().double().requires_grad_() for tensor in wanted]
    x_TD, *weights = exact
    oracle = dense_moe(
        x_TD[0], *weights, top_k=config.top_k, renormalize=config.renormalize,
        valid_T=None if valid_BS is None else valid_BS[0],
        rows_per_expert=rows_per_expert(config, num_tokens, training=True), drop_policy=config.drop_policy,
    )  # fmt: skip
    torch.testing.assert_close(y_BSD[0].double(), oracle.output_TD, **CLOSE)
    expected = torch.autograd.grad((oracle.output_TD * direction[0]).sum(), exact)
    for name, ours, theirs in zip(("x", "router", "gate_up", "down"), found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


# --- against torch's grouped products


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu"])
@pytest.mark.parametrize(
    ("counts", "d_model", "hidden"),
    [([7, 0, 21], 24, 20), ([0, 33, 0], 16, 16), ([1], 5, 3), ([0, 0], 8, 8)],
)
def test_rows_that_an_exchange_has_sorted(activation: str, counts: list[int], d_model: int, hidden: int) -> None:
    config = MoEConfig(num_experts=len(counts), intermediate_size=hidden, activation=activation)  # type: ignore[arg-type]
    by_torch, fused = make_experts(config, d_model)
    x_RD, grad_RD = randn(sum(counts), d_model).requires_grad_(), randn(sum(counts), d_model, seed=1)
    wanted = [x_RD, by_torch.gate_up, by_torch.down]
    expected_RD = by_torch(x_RD, torch.tensor(counts))
    found_RD = fused(x_RD, torch.tensor(counts))
    torch.testing.assert_close(found_RD, expected_RD, **CLOSE)
    expected = torch.autograd.grad(expected_RD, wanted, grad_RD)
    torch.testing.assert_close(torch.autograd.grad(found_RD, wanted, grad_RD), expected, **CLOSE)


def make_plan(num_tokens: int, num_experts: int, top_k: int) -> tuple[DispatchPlan, Tensor]:
    probs_TE = randn(num_tokens, num_experts, seed=2).softmax(dim=-1)
    weights_TK, ids_TK = probs_TE.topk(top_k)
    return plan_dispatch(ids_TK, weights_TK.requires_grad_(), num_experts, rows_per_expert=num_tokens // 2), weights_TK


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu"])
def test_tokens_with_drops_and_the_weights_gradient(activation: str) -> None:
    by_torch, fused = make_experts(MoEConfig(num_experts=3, intermediate_size=24, activation=activation), 17)  # type: ignore[arg-type]
    plan, weights_TK = make_plan(20, 3, 2)
    assert len(plan.token_N) < 40, "some pairs are dropped"
    x_TD, grad_TD = randn(20, 17).requires_grad_(), randn(20, 17, seed=1)
    wanted = [x_TD, weights_TK, by_torch.gate_up, by_torch.down]
    results = []
    for experts in (by_torch, fused):
        y_TD = experts(x_TD, plan.counts_E, plan)
        results.append([y_TD, *torch.autograd.grad(y_TD, wanted, grad_TD, retain_graph=True)])
    torch.testing.assert_close(results[1], results[0], **CLOSE)


def test_only_gradients_that_are_wanted() -> None:
    """Frozen experts, and a gradient that is not contiguous, as that of a sum."""
    by_torch, fused = make_experts(MoEConfig(num_experts=3, intermediate_size=8), 16)
    plan, _ = make_plan(9, 3, 2)
    plan = plan._replace(weight_N=plan.weight_N.detach())
    by_torch.requires_grad_(False)
    x_TD = randn(9, 16).requires_grad_()
    expected, found = (
        torch.autograd.grad(experts(x_TD, plan.counts_E, plan).sum(), x_TD) for experts in (by_torch, fused)
    )
    torch.testing.assert_close(found, expected, **CLOSE)


def test_rows_of_no_expert_are_left_alone() -> None:
    """The counts may sum to less than there are rows, so that a plan needs no host to cut it."""
    by_torch, fused = make_experts(MoEConfig(num_experts=2, intermediate_size=8), 16)
    x_TD = randn(6, 16).requires_grad_()
    weight_N = torch.ones(8, requires_grad=True)
    plan = DispatchPlan(
        token_N=torch.tensor([0, 2, 4, 1, 3, 999, 999, 999]), counts_E=torch.tensor([3, 2]), weight_N=weight_N,
        place_TK=torch.tensor([[0], [3], [1], [4], [2], [8]]), dropped=torch.tensor(0),
    )  # fmt: skip
    short = plan._replace(
        token_N=plan.token_N[:5], weight_N=weight_N[:5], place_TK=torch.tensor([[0], [3], [1], [4], [2], [5]])
    )
    wanted = [x_TD, weight_N, by_torch.gate_up, by_torch.down]
    expected_TD, found_TD = by_torch(x_TD, short.counts_E, short), fused(x_TD, plan.counts_E, plan)
    torch.testing.assert_close(found_TD, expected_TD, **CLOSE)
    expected = torch.autograd.grad(expected_TD.square().sum(), wanted)
    torch.testing.assert_close(torch.autograd.grad(found_TD.square().sum(), wanted), expected, **CLOSE)


# --- what is kept, and the schedule


def test_kept_are_the_parameters_and_one_tensor_of_rows() -> None:
    """ZeRO-3 empties a released parameter: a view of it would keep its memory. Nothing of [N, D] is kept."""
    _, fused = make_experts(MoEConfig(num_experts=3, intermediate_size=8), 40)
    plan, _ = make_plan(9, 3, 2)
    x_TD = randn(9, 40).requires_grad_()
    saved = fused(x_TD, plan.counts_E, plan).grad_fn.saved_tensors  # type: ignore[union-attr]
    for parameter in (fused.gate_up, fused.down, x_TD):
        assert any(tensor is parameter for tensor in saved)
    rows = [tensor for tensor in saved if tensor.dim() == 2 and len(tensor) == len(plan.token_N)]
    assert [tuple(tensor.shape) for tensor in rows] == [(len(plan.token_N), 16)], "gate and up of each row"


@pytest.mark.parametrize("counts", [[3, 0, 17, 16, 0, 33], [0], [1], [0, 0, 64], [16, 16]])
@pytest.mark.parametrize("beyond", [0, 5])
def test_schedule(counts: list[int], beyond: int) -> None:
    tiles = grouped_gemm.schedule_tiles(torch.tensor(counts), sum(counts) + beyond)
    starts = [sum(counts[:expert]) for expert in range(len(counts) + 1)]
    expected = [
        (expert, row)
        for expert, count in enumerate(counts)
        for row in range(starts[expert], starts[expert] + count, tiles.block_m)
    ]
    assert tiles.starts.tolist() == starts
    found = list(zip(tiles.expert_of_tile.tolist(), tiles.row_of_tile.tolist(), strict=True))
    assert found[: len(expected)] == expected
    assert all(expert == -1 for expert, _ in found[len(expected) :])


def test_types_that_the_kernels_do_not_have() -> None:
    _, fused = make_experts(MoEConfig(num_experts=2, intermediate_size=8), 16)
    with pytest.raises(TypeError, match="float64"):
        fused_experts(randn(3, 16).double(), torch.tensor([1, 2]), None, fused.gate_up, fused.down, "swiglu")


def test_the_peer_of_the_bench_computes_what_the_layer_does() -> None:
    config = MoEConfig(num_experts=4, intermediate_size=16)
    x_BSD = randn(1, 24, 32)
    torch.testing.assert_close(
        build_peer("triton", config, 32)(x_BSD), build_peer("custom", config, 32)(x_BSD), **CLOSE
    )
