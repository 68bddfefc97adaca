"""Step 5: each token's sum of its rows, and what it holds in memory meanwhile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_scale.moe.dispatch import DispatchPlan, combine_rows, gather_rows, plan_dispatch


def make(tokens: int, top_k: int, experts: int, rows_per_expert: int | None, width: int) -> tuple[Tensor, DispatchPlan]:
    """fp64 outputs of the experts, and a plan whose weights are leaves of the graph."""
    generator = torch.Generator().manual_seed(0)
    ids_TK = torch.rand(tokens, experts, generator=generator).topk(top_k).indices
    weights_TK = torch.rand(tokens, top_k, generator=generator, dtype=torch.float64)
    plan = plan_dispatch(ids_TK, weights_TK, experts, rows_per_expert=rows_per_expert)
    y_ND = torch.randn(len(plan.token_N), width, generator=generator, dtype=torch.float64)
    return y_ND, plan._replace(weight_N=plan.weight_N.detach().requires_grad_())


@pytest.mark.parametrize("rows_per_expert", [None, 3, 0], ids=["dropless", "some dropped", "all dropped"])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_sums_and_gradients_are_those_of_index_add(top_k: int, rows_per_expert: int | None) -> None:
    y_ND, plan = make(9, top_k, 5, rows_per_expert, width=4)
    y_ND.requires_grad_()
    direction_TD = torch.randn(9, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found_TD = combine_rows(y_ND, plan, 9)
    expected_TD = found_TD.new_zeros(9, 4).index_add(0, plan.token_N, y_ND * plan.weight_N[:, None])
    torch.testing.assert_close(found_TD, expected_TD, rtol=0, atol=1e-14)
    found, expected = (
        torch.autograd.grad((y * direction_TD).sum(), (y_ND, plan.weight_N)) for y in (found_TD, expected_TD)
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)


def test_in_bf16_sums_and_weights_gradients_are_rounded_once() -> None:
    y_ND, plan = make(50, 8, 16, None, width=32)
    y_ND = y_ND.bfloat16().requires_grad_()
    plan = plan._replace(weight_N=plan.weight_N.detach().float().requires_grad_())
    direction_TD = torch.randn(50, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    found_TD = combine_rows(y_ND, plan, 50)
    exact_ND, exact_N = y_ND.detach().double().requires_grad_(), plan.weight_N.detach().double().requires_grad_()
    exact_TD = combine_rows(exact_ND, plan._replace(weight_N=exact_N), 50)
    found = torch.autograd.grad(found_TD, (y_ND, plan.weight_N), direction_TD)
    exact = torch.autograd.grad(exact_TD, (exact_ND, exact_N), direction_TD.double())
    half_a_step = 2.0**-8  # of bf16's 8 bits; sums in fp32 add next to nothing
    torch.testing.assert_close(found_TD.double(), exact_TD, rtol=half_a_step, atol=1e-5)
    torch.testing.assert_close(found[0].double(), exact[0], rtol=half_a_step, atol=1e-5)
    torch.testing.assert_close(found[1].double(), exact[1], rtol=1e-5, atol=1e-4)


def test_a_row_that_is_no_number_stays_with_its_token() -> None:
    """Of a batch of texts the others are to be right all the same."""
    y_ND, plan = make(9, 2, 5, 3, width=4)
    y_ND[-1] = float("nan")  # the row that stands in for those of choices that go nowhere
    y_TD = combine_rows(y_ND, plan, 9)
    assert plan.place_TK is not None
    assert (plan.place_TK == len(y_ND)).any()
    assert y_TD.isnan().any(dim=1).nonzero().flatten().tolist() == [int(plan.token_N[-1])]
    x_TD = torch.zeros(9, 4, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(gather_rows(x_TD, plan), x_TD, y_ND)
    assert gradient.isnan().any(dim=1).nonzero().flatten().tolist() == [int(plan.token_N[-1])]


def test_sums_are_made_without_the_rows_in_fp32() -> None:
    """8 choices a token: the rows in fp32 would be twice, and gathered anew four times, what the experts gave."""
    y_ND, plan = make(256, 8, 16, None, width=64)
    y_ND = y_ND.bfloat16()
    plan = plan._replace(weight_N=plan.weight_N.detach().float())
    with torch.profiler.profile(profile_memory=True) as profile:
        combine_rows(y_ND, plan, 256)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest <= y_ND.numel() * y_ND.element_size() / 4, "all tokens' sums in fp32"
