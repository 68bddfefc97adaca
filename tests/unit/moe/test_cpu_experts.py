"""The experts' kernel for a CPU: the steps it joins, what it keeps, and how it spreads over threads."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from moe_scale.config import MoEConfig
from moe_scale.initialization import Init
from moe_scale.moe.dispatch import DispatchPlan, combine_rows, gather_rows, plan_dispatch
from moe_scale.moe.experts import Experts
from moe_scale.moe.kernels import cpu_experts as kernel
from moe_scale.moe.low_rank import LowRank
from moe_scale.parallel.groups import ParallelGroups

D_MODEL, NUM_EXPERTS = 16, 6


def make_experts(dtype: torch.dtype, **settings: object) -> Experts:
    config = MoEConfig(num_experts=NUM_EXPERTS, intermediate_size=8, **settings)  # type: ignore[arg-type]
    return Experts(config, D_MODEL, ParallelGroups(), Init(0)).to(dtype)


def make_plan(dtype: torch.dtype, *, tokens: int = 40, spread: int = NUM_EXPERTS) -> tuple[Tensor, DispatchPlan]:
    """Tokens that go to the first ``spread`` experts alone, and some of whose choices go nowhere."""
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(tokens, D_MODEL, generator=generator).to(dtype).requires_grad_()
    ids_TK = torch.rand(tokens, spread, generator=generator).topk(min(2, spread)).indices
    weights_TK = torch.rand(ids_TK.shape, generator=generator).to(torch.promote_types(dtype, torch.float32))
    return x_TD, plan_dispatch(ids_TK, weights_TK.requires_grad_(), NUM_EXPERTS, rows_per_expert=tokens // 3)


def results(experts: Experts, x_TD: Tensor, plan: DispatchPlan, *, joined: bool) -> list[Tensor]:
    """The output and the gradients of its random projection by the input, the weights in the sum and the parameters."""
    if joined:
        y_TD = experts(x_TD, plan.counts_E, plan)
    else:
        y_TD = combine_rows(experts.run_rows(gather_rows(x_TD, plan), plan.counts_E), plan, len(x_TD))
    direction_TD = torch.randn(y_TD.shape, generator=torch.Generator().manual_seed(1))
    wanted = [x_TD, plan.weight_N, *experts.parameters()]
    return [y_TD, *torch.autograd.grad((y_TD * direction_TD).sum(), wanted, retain_graph=True)]


def test_inference_mode(threads: int) -> None:
    experts = make_experts(torch.float32)
    x_TD, plan = make_plan(torch.float32)
    expected_TD = experts(x_TD, plan.counts_E, plan)
    with torch.inference_mode():
        assert torch.equal(experts(x_TD, plan.counts_E, plan), expected_TD)


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu"])
@pytest.mark.parametrize("spread", [NUM_EXPERTS, 3, 1])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
def test_one_function_is_gather_experts_and_combine(
    dtype: torch.dtype, close: float, spread: int, activation: str, threads: int
) -> None:
    experts = make_experts(dtype, activation=activation)
    x_TD, plan = make_plan(dtype, spread=spread)
    assert plan.dropped > 0
    found = results(experts, x_TD, plan, joined=True)
    expected = results(experts, x_TD, plan, joined=False)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=close, atol=close)
    again = results(experts, x_TD, plan, joined=True)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True)), "the same bits at every run"


@pytest.mark.parametrize("options", [{"expert_bias": True}, {"expert_dropout": 0.3}])
def test_options_that_it_lacks_take_the_steps_one_by_one(options: dict[str, object]) -> None:
    experts = make_experts(torch.float64, **options)
    x_TD, plan = make_plan(torch.float64)
    torch.manual_seed(0)
    found = results(experts, x_TD, plan, joined=True)
    torch.manual_seed(0)
    for ours, theirs in zip(found, results(experts, x_TD, plan, joined=False), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("options", [{}, {"expert_bias": True}, {"activation": "gelu"}, {"adapted": True}], ids=str)
def test_rows_of_no_expert_reach_nothing(options: dict[str, object]) -> None:
    """A plan that the host has not cut, as a GPU gets it: its last rows are of no expert, and hold NaN here."""
    adapted = options.pop("adapted", False)
    experts = make_experts(torch.float64, **options)
    if adapted:
        for name, weight in (("gate_up", experts.gate_up), ("down", experts.down)):
            adapter = LowRank(weight.shape, 2, 0.5, 0.0, Init(1) / name, ParallelGroups()).double()
            torch.nn.init.normal_(adapter.B)
            experts.add_module(f"lora_{name}", adapter)
    if experts.gate_up_bias is not None:
        torch.nn.init.normal_(experts.gate_up_bias)
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(40, D_MODEL, generator=generator, dtype=torch.float64, requires_grad=True)
    ids_TK = torch.rand(40, NUM_EXPERTS, generator=generator).topk(2).indices
    weights_TK = torch.rand(40, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    valid_T = torch.rand(40, generator=generator) < 0.8
    found = []
    torch.use_deterministic_algorithms(True)  # which fills what is not written with NaN
    try:
        for trim in (True, False):
            plan = plan_dispatch(ids_TK, weights_TK, NUM_EXPERTS, rows_per_expert=9, valid_T=valid_T, trim=trim)
            assert (len(plan.token_N) == int(plan.counts_E.sum())) == trim
            y_TD = combine_rows(experts.run_rows(gather_rows(x_TD, plan), plan.counts_E), plan, 40)
            wanted = [x_TD, weights_TK, *experts.parameters()]
            found.append([y_TD, *torch.autograd.grad(y_TD.square().sum(), wanted)])
    finally:
        torch.use_deterministic_algorithms(False)
    for whole, cut in zip(*found, strict=True):
        torch.testing.assert_close(whole, cut, rtol=1e-13, atol=1e-13)


def test_frozen_weights_get_no_gradient() -> None:
    experts = make_experts(torch.float32).requires_grad_(False)
    x_TD, plan = make_plan(torch.float32)
    experts(x_TD, plan.counts_E, plan).sum().backward()
    assert x_TD.grad is not None
    assert experts.gate_up.grad is experts.down.grad is None


def test_the_graph_holds_the_input_the_parameters_and_one_hidden_layer() -> None:
    """Activations are kept once; and of parameters nothing but themselves, whose memory ZeRO-3 takes back."""
    experts = make_experts(torch.float32)
    x_TD, plan = make_plan(torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        experts(x_TD, plan.counts_E, plan)
    for whole in (x_TD, experts.gate_up, experts.down):
        assert sum(tensor is whole for tensor in kept) == 1
    assert not any(tensor._base is weight for tensor in kept for weight in (experts.gate_up, experts.down))
    other = [tensor for tensor in kept if tensor.is_floating_point() and tensor.dim() == 2 and tensor is not x_TD]
    assert [tuple(tensor.shape) for tensor in other] == [(int(plan.counts_E.sum()), 16)]


def test_16_bit_types_are_multiplied_in_what_the_cpu_can(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel.product_dtype.cache_clear()
    for fast, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(kernel, "has_fast_bf16_cpu", lambda fast=fast: fast)
        assert kernel.product_dtype(torch.bfloat16) == expected
        assert kernel.product_dtype(torch.float16) == torch.float32
        assert kernel.product_dtype(torch.float64) == torch.float64
        x_TD, plan = make_plan(torch.bfloat16)
        experts = make_experts(torch.bfloat16)
        for ours, theirs in zip(
            results(experts, x_TD, plan, joined=True), results(experts, x_TD, plan, joined=False), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=4e-2, atol=4e-2)
        kernel.product_dtype.cache_clear()


# --- threads


def test_every_expert_is_run_once_and_its_failure_is_seen(threads: int) -> None:
    seen: list[tuple[int, slice]] = []
    kernel.for_each_expert(lambda expert, rows: seen.append((expert, rows)), [2, 0, 3, 3, 1])
    assert sorted(seen) == [(0, slice(0, 2)), (1, slice(2, 2)), (2, slice(2, 5)), (3, slice(5, 8)), (4, slice(8, 9))]

    def fail(expert: int, rows: slice) -> None:
        raise RuntimeError(f"expert {expert}")

    with pytest.raises(RuntimeError, match="expert"):
        kernel.for_each_expert(fail, [2, 2, 2, 2])


def test_experts_run_on_single_threads_and_leave_the_process_its_number(threads: int) -> None:
    counts: list[int] = []
    kernel.for_each_expert(lambda expert, rows: counts.append(torch.get_num_threads()), [2, 2, 2, 2, 2, 2])
    assert counts == [1] * 6
    assert torch.get_num_threads() == threads
    counts.clear()
    kernel.for_each_expert(lambda expert, rows: counts.append(torch.get_num_threads()), [12, 0, 0])
    assert counts == [threads] * 3, "the rows of one expert are worked on by all"


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # which is the point
def test_a_forked_process_has_threads_of_its_own() -> None:
    torch.set_num_threads(2)
    kernel.for_each_expert(lambda expert, rows: None, [1, 1, 1])
    assert kernel._pool.cache_info().currsize
    child = os.fork()
    if child == 0:
        os._exit(kernel._pool.cache_info().currsize)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
