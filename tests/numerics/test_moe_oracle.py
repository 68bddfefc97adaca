"""The MoE layer against the dense einsum MoE, in fp64: outputs, losses and every gradient.

Shapes: B batch, S sequence, T = B*S tokens, D model width, F expert hidden width, E experts, K experts per token.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moe_scale.config import MoEConfig
from moe_scale.initialization import Init
from moe_scale.moe.dispatch import DispatchPlan, capacity, gather_rows, plan_dispatch
from moe_scale.moe.layer import MoELayer, MoEStats, rows_per_expert
from moe_scale.moe.losses import assignments_per_expert, load_balance_loss, router_z_loss, routing_entropy
from moe_scale.moe.router import softmax_top_k
from moe_scale.parallel.groups import ParallelGroups
from tests.oracle import OracleResult, dense_moe

TOLERANCE = 1e-10


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Case(NamedTuple):
    """A layer in fp64, its input, and which tokens are real."""

    layer: MoELayer
    x_BSD: Tensor
    valid_BS: Tensor | None


def make_case(
    config: MoEConfig, batch: int, seq_len: int, d_model: int, seed: int, padding: str = "none", routing: str = "free"
) -> Case:
    """``padding`` is none, some or all; ``routing`` is free, one (first choices all go to one expert) or half."""
    layer = MoELayer(config, d_model, ParallelGroups(), Init(seed)).double()
    generator = torch.Generator().manual_seed(seed)
    x_BSD = torch.randn(batch, seq_len, d_model, generator=generator, dtype=torch.float64)
    if routing != "free":
        # A constant feature that the router likes or dislikes: experts without any token, or one with all of them.
        # Not so much that probabilities saturate, because equal ones would leave the order of the drops to rounding.
        x_BSD[..., 0] = 1.0
        with torch.no_grad():
            if routing == "one":
                layer.router.weight[seed % config.num_experts, 0] += 12.0
            else:
                layer.router.weight[: config.num_experts // 2, 0] -= 12.0
    valid_BS = None
    if padding != "none":
        share = 0.6 if padding == "some" else 0.0
        valid_BS = torch.rand(batch, seq_len, generator=generator) < share
    return Case(layer, x_BSD.requires_grad_(), valid_BS)


def run_oracle(case: Case, *, training: bool = True) -> OracleResult:
    config, layer = case.layer.config, case.layer
    x_TD = case.x_BSD.reshape(-1, case.x_BSD.shape[-1])
    return dense_moe(
        x_TD, layer.router.weight, layer.experts.gate_up, layer.experts.down,
        top_k=config.top_k, renormalize=config.renormalize,
        valid_T=None if case.valid_BS is None else case.valid_BS.reshape(-1),
        rows_per_expert=rows_per_expert(config, x_TD.shape[0], training=training), drop_policy=config.drop_policy,
    )  # fmt: skip


def gradients(case: Case, output: Tensor, aux_loss: Tensor, z_loss: Tensor) -> dict[str, Tensor]:
    """Of a random projection of the output plus both losses, for the input and every weight."""
    generator = torch.Generator().manual_seed(99)
    direction = torch.randn(output.numel(), generator=generator, dtype=output.dtype).view_as(output)
    wanted = {"x": case.x_BSD, **dict(case.layer.named_parameters())}
    found = torch.autograd.grad((output * direction).sum() + aux_loss + z_loss, list(wanted.values()))
    return dict(zip(wanted, found, strict=True))


def assert_equals_oracle(case: Case) -> OracleResult:
    y_BSD, stats = case.layer(case.x_BSD, case.valid_BS)
    expected = run_oracle(case)
    close = {"rtol": TOLERANCE, "atol": TOLERANCE}
    torch.testing.assert_close(y_BSD, expected.output_TD.view_as(y_BSD), **close)
    torch.testing.assert_close(stats.aux_loss, expected.aux_loss, **close)
    torch.testing.assert_close(stats.z_loss, expected.z_loss, **close)
    assert stats.assignments_E.tolist() == expected.assignments_E.tolist()
    assert stats.dropped == expected.dropped
    theirs = gradients(case, expected.output_TD.view_as(y_BSD), expected.aux_loss, expected.z_loss)
    for name, gradient in gradients(case, y_BSD, stats.aux_loss, stats.z_loss).items():
        torch.testing.assert_close(gradient, theirs[name], **close, msg=lambda text, name=name: f"{name}: {text}")
    return expected


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_experts = draw(st.integers(1, 16), label="E")
    config = MoEConfig(
        num_experts=num_experts,
        top_k=draw(st.one_of(st.integers(1, min(4, num_experts)), st.integers(1, num_experts)), label="K"),
        intermediate_size=draw(st.integers(1, 5), label="F"),
        renormalize=draw(st.booleans(), label="renormalize"),
        dispatch=draw(st.sampled_from(["dropless", "capacity", "capacity"]), label="dispatch"),
        capacity_factor=draw(st.sampled_from([0.05, 0.3, 0.5, 1.0, 1.25, 4.0]), label="capacity_factor"),
        min_capacity=draw(st.integers(1, 3), label="min_capacity"),
        drop_policy=draw(st.sampled_from(["position", "probability"]), label="drop_policy"),
    )
    return make_case(
        config,
        batch=draw(st.integers(1, 3), label="B"),
        seq_len=draw(st.integers(1, 8), label="S"),
        d_model=draw(st.integers(1, 6), label="D"),
        seed=draw(st.integers(0, 2**16), label="seed"),
        padding=draw(st.sampled_from(["none", "none", "some", "some", "all"]), label="padding"),
        routing=draw(st.sampled_from(["free", "free", "one", "half"]), label="routing"),
    )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cases())
def test_layer_equals_oracle(case: Case) -> None:
    assert_equals_oracle(case)


@pytest.mark.parametrize("policy", ["position", "probability"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_layer_equals_oracle_where_many_are_dropped(policy: str, renormalize: bool) -> None:
    config = MoEConfig(
        num_experts=5, top_k=3, intermediate_size=4, renormalize=renormalize,
        dispatch="capacity", capacity_factor=0.4, min_capacity=1, drop_policy=policy,
    )  # fmt: skip
    expected = assert_equals_oracle(make_case(config, 2, 12, 6, seed=3, padding="some"))
    kept_T = expected.kept_TK.sum(dim=1)
    assert expected.dropped > 0
    assert {0, 1, 2} <= set(kept_T.tolist()), (
        "tokens that lost all, some and one of their choices should be among these"
    )


@pytest.mark.parametrize("dispatch", ["dropless", "capacity"])
def test_all_tokens_to_one_expert(dispatch: str) -> None:
    config = MoEConfig(
        num_experts=6, top_k=1, intermediate_size=3, dispatch=dispatch, capacity_factor=1.0, min_capacity=1
    )
    expected = assert_equals_oracle(make_case(config, 1, 12, 4, seed=1, routing="one"))
    assert expected.assignments_E.tolist() == [0, 12, 0, 0, 0, 0]
    assert expected.dropped == (0 if dispatch == "dropless" else 10)


def test_empty_experts_get_zero_gradients() -> None:
    config = MoEConfig(num_experts=6, top_k=2, intermediate_size=3)
    case = make_case(config, 1, 12, 4, seed=1, routing="half")
    expected = assert_equals_oracle(case)
    assert expected.assignments_E[:3].tolist() == [0, 0, 0]
    y_BSD, stats = case.layer(case.x_BSD, None)
    found = gradients(case, y_BSD, stats.aux_loss, stats.z_loss)
    assert found["experts.gate_up"][:3].abs().max() == found["experts.down"][:3].abs().max() == 0


@pytest.mark.parametrize("dispatch", ["dropless", "capacity"])
def test_padding_alone_gives_zero(dispatch: str) -> None:
    case = make_case(MoEConfig(num_experts=4, intermediate_size=3, dispatch=dispatch), 2, 3, 4, seed=0, padding="all")
    assert_equals_oracle(case)
    y_BSD, stats = case.layer(case.x_BSD, case.valid_BS)
    assert not y_BSD.any()
    assert not any(torch.any(value) for value in stats)


def test_padding_changes_nothing_for_real_tokens() -> None:
    """The dropless output, the losses and the measures of real tokens are those of a batch without the padding."""
    case = make_case(MoEConfig(num_experts=4, intermediate_size=3), 2, 9, 4, seed=5, padding="some")
    assert case.valid_BS is not None
    y_BSD, stats = case.layer(case.x_BSD, case.valid_BS)
    alone_SD, alone = case.layer(case.x_BSD[case.valid_BS].unsqueeze(0))
    torch.testing.assert_close(y_BSD[case.valid_BS], alone_SD[0])
    assert not y_BSD[~case.valid_BS].any()
    for name, ours, theirs in zip(MoEStats._fields, stats, alone, strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(0, 2**16), st.integers(1, 4), st.booleans())
def test_dropless_layer_commutes_with_permutations(seed: int, top_k: int, renormalize: bool) -> None:
    """A token's output does not depend on where it stands, nor do the losses."""
    config = MoEConfig(num_experts=5, top_k=top_k, intermediate_size=3, renormalize=renormalize)
    case = make_case(config, 1, 17, 4, seed=seed)
    order = torch.randperm(17, generator=torch.Generator().manual_seed(seed))
    y_BSD, stats = case.layer(case.x_BSD)
    permuted_BSD, permuted_stats = case.layer(case.x_BSD[:, order])
    torch.testing.assert_close(permuted_BSD, y_BSD[:, order], rtol=TOLERANCE, atol=TOLERANCE)
    for ours, theirs in zip(stats, permuted_stats, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_one_choice_keeps_its_probability_as_weight() -> None:
    """For K=1, renormalizing would make the weight 1 and leave the router without a gradient of the output."""
    logits_TE = randn(7, 4)
    routing = softmax_top_k(logits_TE, 1, renormalize=True)
    assert torch.equal(routing.weights_TK, logits_TE.softmax(dim=-1).max(dim=-1, keepdim=True).values)


# --- capacity and drops


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "factor", "minimum", "expected"),
    [
        (64, 1, 8, 1.0, 1, 8),
        (65, 1, 8, 1.0, 1, 9),  # rounded up
        (64, 2, 8, 1.0, 1, 16),  # twice the rows, twice the places
        (64, 2, 8, 1.25, 1, 20),
        (64, 1, 8, 0.5, 1, 4),
        (64, 1, 8, 0.01, 4, 4),  # from the minimum
        (64, 1, 8, 100.0, 4, 64),  # up to T
        (3, 1, 8, 1.0, 4, 3),  # T even below the minimum
        (1, 1, 1, 1.0, 1, 1),
    ],
)
def test_capacity_formula(tokens: int, top_k: int, experts: int, factor: float, minimum: int, expected: int) -> None:
    assert capacity(tokens, top_k, experts, factor, minimum) == expected


def test_capacity_of_a_whole_number_is_that_number() -> None:
    assert capacity(1000, 1, 10, 1.1, 1) == 110
    assert capacity(100, 2, 4, 1.1, 1) == 55


def test_capacity_factor_follows_the_mode() -> None:
    config = MoEConfig(
        num_experts=4, top_k=1, dispatch="capacity", capacity_factor=1.0, eval_capacity_factor=2.0, min_capacity=1
    )
    assert rows_per_expert(config, 16, training=True) == 4
    assert rows_per_expert(config, 16, training=False) == 8
    assert rows_per_expert(dataclasses.replace(config, dispatch="dropless"), 16, training=True) is None

    case = make_case(dataclasses.replace(config, intermediate_size=3), 1, 16, 4, seed=1, routing="one")
    assert case.layer(case.x_BSD)[1].dropped == 12
    case.layer.eval()
    assert case.layer(case.x_BSD)[1].dropped == 8


# Five tokens with two choices each among three experts; row n = 2 * token + choice.
#              token         0          1          2          3          4
IDS_TK = torch.tensor([[0, 1], [0, 2], [1, 0], [0, 1], [2, 0]])
WEIGHTS_TK = torch.tensor([[0.6, 0.4], [0.7, 0.3], [0.9, 0.1], [0.8, 0.2], [0.55, 0.45]])


def kept_rows(plan: DispatchPlan) -> list[int]:
    """The pairs t * K + k that go to an expert, in the order of the plan's rows; the others must go nowhere."""
    assert plan.place_TK is not None
    num_rows = len(plan.token_N)
    rows = [-1] * num_rows
    for pair, place in enumerate(plan.place_TK.flatten().tolist()):
        assert 0 <= place <= num_rows, "a pair goes to a row or to none"
        if place < num_rows:
            rows[place] = pair
    assert [pair // 2 for pair in rows] == plan.token_N.tolist()
    return rows


def test_plan_without_drops_by_hand() -> None:
    plan = plan_dispatch(IDS_TK, WEIGHTS_TK, 3)
    # Expert 0: rows 0, 2, 5, 6, 9 (tokens 0, 1, 2, 3, 4); expert 1: rows 1, 4, 7 (0, 2, 3); expert 2: rows 3, 8 (1, 4).
    assert plan.counts_E.tolist() == [5, 3, 2]
    assert plan.token_N.tolist() == [0, 1, 2, 3, 4, 0, 2, 3, 1, 4]
    assert plan.place_TK is not None
    assert plan.place_TK.tolist() == [[0, 5], [1, 8], [6, 2], [3, 7], [9, 4]]
    torch.testing.assert_close(plan.weight_N, WEIGHTS_TK.flatten()[[0, 2, 5, 6, 9, 1, 4, 7, 3, 8]])
    assert int(plan.dropped) == 0
    tokens = gather_rows(torch.arange(5.0).unsqueeze(1), plan)
    assert tokens.flatten().tolist() == [0, 1, 2, 3, 4, 0, 2, 3, 1, 4]


def test_drops_by_position_by_hand() -> None:
    plan = plan_dispatch(IDS_TK, WEIGHTS_TK, 3, rows_per_expert=2, drop_policy="position")
    # First choices: expert 0 is asked by tokens 0, 1, 3 and keeps 0, 1; expert 1 by 2; expert 2 by 4.
    # Second choices: expert 1 is asked by 0, 3 and has one place, for 0; expert 2 by 1; expert 0 by 2, 4 and is full.
    # Lost: rows 6 (token 3, first), 7 (token 3, second), 5 (token 2, second), 9 (token 4, second).
    assert kept_rows(plan) == [0, 2, 1, 4, 3, 8]
    assert plan.counts_E.tolist() == [2, 2, 2]
    assert int(plan.dropped) == 4


def test_drops_by_probability_by_hand() -> None:
    plan = plan_dispatch(IDS_TK, WEIGHTS_TK, 3, rows_per_expert=2, drop_policy="probability")
    # Expert 0 is asked with 0.6, 0.7, 0.1, 0.8, 0.45 by tokens 0 to 4 and keeps 1 and 3: rows 2 and 6.
    # Expert 1 is asked with 0.4, 0.9, 0.2 by tokens 0, 2, 3 and keeps 0 and 2: rows 1 and 4. Expert 2 keeps both.
    assert kept_rows(plan) == [2, 6, 1, 4, 3, 8]
    assert plan.counts_E.tolist() == [2, 2, 2]
    assert int(plan.dropped) == 4


def test_padding_takes_no_place_by_hand() -> None:
    valid_T = torch.tensor([False, True, True, True, True])
    plan = plan_dispatch(IDS_TK, WEIGHTS_TK, 3, rows_per_expert=2, drop_policy="position", valid_T=valid_T)
    # Without token 0, token 3 gets its first choice and, expert 1 having a place left, its second too.
    assert kept_rows(plan) == [2, 6, 4, 7, 3, 8]
    assert int(plan.dropped) == 2, "rows 5 and 9; the padding's rows are not called dropped"


# --- losses and measures


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 2**16), st.integers(1, 40), st.integers(2, 16), st.data())
def test_aux_loss_is_that_of_transformers_divided_by_k(
    seed: int, tokens: int, num_experts: int, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, num_experts))
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(tokens, num_experts, generator=generator).requires_grad_()
    valid_T = torch.rand(tokens, generator=generator) < 0.7
    valid_T[0] = True  # theirs divides by zero without a real token
    for mask in (None, valid_T):
        routing = softmax_top_k(logits_TE, top_k, renormalize=True)
        ours = load_balance_loss(routing.probs_TE, assignments_per_expert(routing.ids_TK, num_experts, mask), mask)
        # Theirs takes [B, S]; one sequence is enough, as both flatten it.
        attention_mask = None if mask is None else mask.long().unsqueeze(0)
        theirs = load_balancing_loss_func((logits_TE,), num_experts, top_k, attention_mask) / top_k
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            torch.autograd.grad(ours, logits_TE), torch.autograd.grad(theirs, logits_TE), rtol=1e-4, atol=1e-6
        )


def test_even_load_has_an_aux_loss_of_one() -> None:
    logits_TE = 5 * torch.eye(4, dtype=torch.float64).repeat(3, 1)  # each expert is the favourite of three tokens
    routing = softmax_top_k(logits_TE, 1, renormalize=False)
    loss = load_balance_loss(routing.probs_TE, assignments_per_expert(routing.ids_TK, 4))
    assert float(loss) == pytest.approx(1.0)
    all_to_one = torch.tensor([[50.0, 0, 0, 0]] * 3, dtype=torch.float64).softmax(dim=-1)
    assert float(load_balance_loss(all_to_one, torch.tensor([3, 0, 0, 0]))) == pytest.approx(4.0)


def test_z_loss_is_its_equation() -> None:
    logits_TE = randn(9, 5)
    by_token = [math.log(sum(math.exp(value) for value in row)) ** 2 for row in logits_TE.tolist()]
    assert float(router_z_loss(logits_TE)) == pytest.approx(sum(by_token) / 9, abs=1e-12)
    valid_T = torch.arange(9) % 3 == 0
    assert float(router_z_loss(logits_TE, valid_T)) == pytest.approx(sum(by_token[::3]) / 3, abs=1e-12)
    assert float(router_z_loss(logits_TE + 100)) > 100**2, "large logits must not overflow"


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 2**16), st.integers(1, 16), st.sampled_from([0.0, 0.1, 1.0, 30.0, 1e4]))
def test_entropy_is_between_zero_and_one(seed: int, num_experts: int, spread: float) -> None:
    logits_TE = spread * torch.randn(6, num_experts, generator=torch.Generator().manual_seed(seed))
    entropy = float(routing_entropy(logits_TE.softmax(dim=-1)))
    assert 0 <= entropy <= 1 + 1e-6


def test_entropy_of_certain_and_undecided_tokens() -> None:
    certain, undecided = torch.eye(8), torch.full((8, 8), 1 / 8)
    assert float(routing_entropy(certain)) == 0
    assert float(routing_entropy(undecided)) == pytest.approx(1)
    both = torch.cat([certain, undecided])
    assert float(routing_entropy(both)) == pytest.approx(0.5)
    assert float(routing_entropy(both, torch.arange(16) >= 8)) == pytest.approx(1), "padding counts nowhere"
    assert float(routing_entropy(torch.ones(3, 1))) == 0, "one expert leaves no choice"
