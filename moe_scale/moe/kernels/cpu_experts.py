"""The experts on a CPU, with the gather before and the combine after them, by torch's products or a compiled kernel.

Shapes: T tokens, K experts per token, L experts, N rows sorted by expert, R rows of one expert, D model width, F expert
hidden width; I = 2F for a gated activation, else F.

An expert's few rows pass through all of its products while they, and its weights, are in a core's cache: each weight is
read once in the forward and once in the backward pass, and nothing but what stood before the activation is kept. Cores
share out the experts, not the products: 64 rows are too little to divide, and waiting for each other after every
product is what costs most, above all on a machine that does other work too.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_scale.moe.dispatch import DispatchPlan
from moe_scale.moe.kernels import cpu_bf16
from moe_scale.parallel.device import has_fast_bf16_cpu


def cpu_experts(
    x: Tensor, counts_L: Tensor, plan: DispatchPlan | None, gate_up_LID: Tensor, down_LDF: Tensor, activation: str,
    *, compiled: bool = True,
) -> Tensor:  # fmt: skip
    """The output of :class:`moe_scale.moe.experts.Experts` without biases and dropout.

    Args:
        x: the tokens x_TD with a plan; without one rows x_ND sorted by expert, as an exchange leaves them.
        counts_L: int64 rows of each expert.
        plan: which tokens go where.
        compiled: whether the kernel of ``cpu_bf16.cpp`` may do it, where it can.

    Returns:
        y_TD, each token's weighted sum, with a plan; without one y_ND, the rows' outputs.
    """
    weight_N, token_N, place_TK = (None, None, None) if plan is None else (plan.weight_N, plan.token_N, plan.place_TK)
    counts = counts_L.tolist()
    if token_N is not None and len(token_N) != sum(counts):
        raise ValueError(f"the plan has {len(token_N)} rows, and its experts {sum(counts)}: trim it")
    compiled = compiled and not _uneven(counts) and cpu_bf16.takes(x, weight_N, gate_up_LID, down_LDF)
    rows_ND = x if token_N is None else _RowsOfTokens.apply(x, token_N, place_TK)
    return _CPUExperts.apply(
        rows_ND, x, weight_N, gate_up_LID, down_LDF, token_N, place_TK, counts, activation, compiled
    )


class _RowsOfTokens(torch.autograd.Function):
    """Stands for the rows x_TD[token_N], which the experts gather for themselves: it has their shape, and no memory.

    So each token's sum of its rows' gradients is a step of its own, which comes when the hidden layer is let go of.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_N: Tensor, place_TK: Tensor | None) -> Tensor:
        ctx.save_for_backward(token_N, place_TK)
        ctx.num_tokens = len(x_TD)
        return x_TD.new_zeros(()).expand(_rows_to_sum(len(token_N), place_TK), x_TD.shape[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        token_N, place_TK = ctx.saved_tensors
        return _sum_of_tokens(grads[0], token_N, place_TK, ctx.num_tokens), None, None


class _CPUExperts(torch.autograd.Function):
    """y[t] = sum over its rows n of down_e(weight[n] * activation(up_e(x[t]))), e the expert of n.

    The gradient by x is that of the rows, the first argument, whose values are not read. The weight stands before the
    last map, where its gradient needs no output of an expert to be kept. The parameters themselves are what is saved,
    never a view: ZeRO-3 takes a gathered parameter's memory back by emptying it.
    """

    @staticmethod
    def forward(
        ctx: Any, rows_ND: Tensor, x_TD: Tensor, weight_N: Tensor | None, gate_up_LID: Tensor, down_LDF: Tensor,
        token_N: Tensor | None, place_TK: Tensor | None, counts: list[int], activation: str, compiled: bool,
    ) -> Tensor:  # fmt: skip
        x_TD, wide = x_TD.contiguous(), product_dtype(x_TD.dtype)
        hidden_NI = x_TD.new_empty(sum(counts), gate_up_LID.shape[1])
        y_ND = _new_rows(x_TD, len(hidden_NI), place_TK)

        def run(expert: int, rows: slice) -> None:
            hidden_RI = hidden_NI[rows]
            _product(_take(x_TD, token_N, rows, wide), gate_up_LID[expert].to(wide).t(), hidden_RI)
            active_RF = activate(hidden_RI.to(wide), activation)
            if weight_N is not None:
                active_RF.mul_(weight_N[rows].unsqueeze(1))
            _product(active_RF, down_LDF[expert].to(wide).t(), y_ND[rows])

        if compiled:
            token_N, weight_N = (None if of_rows is None else of_rows.contiguous() for of_rows in (token_N, weight_N))
            cpu_bf16.forward(
                x_TD, token_N, weight_N, gate_up_LID, down_LDF, counts, activation, hidden_NI, y_ND[: len(hidden_NI)]
            )
        else:
            for_each_expert(run, counts)
        ctx.save_for_backward(x_TD, weight_N, gate_up_LID, down_LDF, token_N, place_TK, hidden_NI)
        ctx.counts, ctx.activation, ctx.compiled = counts, activation, compiled
        return _sum_of_tokens(y_ND, token_N, place_TK, len(x_TD))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x_TD, weight_N, gate_up_LID, down_LDF, token_N, place_TK, hidden_NI = ctx.saved_tensors
        wide, grad_TD = product_dtype(x_TD.dtype), grads[0].contiguous()
        want_rows, _, want_weight, want_gate_up, want_down = ctx.needs_input_grad[:5]
        grad_x_ND = _new_rows(x_TD, len(hidden_NI), place_TK) if want_rows else None
        grad_weight_N = torch.empty_like(weight_N) if want_weight else None
        grad_gate_up_LID = torch.empty_like(gate_up_LID) if want_gate_up else None
        grad_down_LDF = torch.empty_like(down_LDF) if want_down else None

        def run(expert: int, rows: slice) -> None:
            grad_RD = _take(grad_TD, token_N, rows, wide)
            grad_RF = torch.mm(grad_RD, down_LDF[expert].to(wide))
            weight_R1 = 1.0 if weight_N is None else weight_N[rows].unsqueeze(1).to(wide)
            active_RF, grad_RI = activate_backward(grad_RF * weight_R1, hidden_NI[rows].to(wide), ctx.activation)
            if grad_weight_N is not None:
                grad_weight_N[rows] = grad_RF.mul_(active_RF).sum(dim=1, dtype=grad_weight_N.dtype)
            if grad_down_LDF is not None:
                _product(grad_RD.t(), active_RF.mul_(weight_R1), grad_down_LDF[expert])
            if grad_gate_up_LID is not None:
                _product(grad_RI.t(), _take(x_TD, token_N, rows, wide), grad_gate_up_LID[expert])
            if grad_x_ND is not None:
                _product(grad_RI, gate_up_LID[expert].to(wide), grad_x_ND[rows])

        if ctx.compiled:
            cpu_bf16.backward(
                grad_TD, x_TD, token_N, weight_N, gate_up_LID, down_LDF, ctx.counts, ctx.activation, hidden_NI,
                None if grad_x_ND is None else grad_x_ND[: len(hidden_NI)],
                grad_weight_N, grad_gate_up_LID, grad_down_LDF,
            )  # fmt: skip
        else:
            for_each_expert(run, ctx.counts)
        return grad_x_ND, None, grad_weight_N, grad_gate_up_LID, grad_down_LDF, None, None, None, None, None


def activate(hidden_RI: Tensor, activation: str) -> Tensor:
    """The nonlinearity between an expert's two maps. Returns [R, F]."""
    if activation == "swiglu":
        gate_RF, up_RF = hidden_RI.chunk(2, dim=-1)
        return F.silu(gate_RF) * up_RF
    return F.gelu(hidden_RI) if activation == "gelu" else F.relu(hidden_RI)


def activate_backward(grad_RF: Tensor, hidden_RI: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """:func:`activate` of ``hidden_RI`` again [R, F], and its gradient [R, I]."""
    if activation == "swiglu":
        gate_RF, up_RF = hidden_RI.chunk(2, dim=-1)
        silu_RF, grad_RI = F.silu(gate_RF), torch.empty_like(hidden_RI)
        grad_gate_RF, grad_up_RF = grad_RI.chunk(2, dim=-1)
        torch.mul(grad_RF, silu_RF, out=grad_up_RF)
        torch.ops.aten.silu_backward(grad_RF.mul_(up_RF), gate_RF, grad_input=grad_gate_RF)
        return silu_RF.mul_(up_RF), grad_RI
    if activation == "gelu":
        return F.gelu(hidden_RI), torch.ops.aten.gelu_backward(grad_RF, hidden_RI)
    return F.relu(hidden_RI), grad_RF * (hidden_RI > 0)


@functools.cache
def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type to multiply in: fp32 for a 16-bit type that this CPU has no instructions for, and would crawl in."""
    if dtype == torch.float16 or (dtype == torch.bfloat16 and not has_fast_bf16_cpu()):
        return torch.float32
    return dtype


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b, rounded to the type of ``out``."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(torch.mm(a, b))


def _take(x_TD: Tensor, token_N: Tensor | None, rows: slice, dtype: torch.dtype) -> Tensor:
    return (x_TD[rows] if token_N is None else x_TD.index_select(0, token_N[rows])).to(dtype)


def _rows_to_sum(num_rows: int, place_TK: Tensor | None) -> int:
    """The N rows that tokens sum, and one of zeros after them where a choice goes nowhere."""
    return num_rows + (place_TK is not None and place_TK.numel() > num_rows)


def _new_rows(x_TD: Tensor, num_rows: int, place_TK: Tensor | None) -> Tensor:
    """Space for those rows, of which the zeros are there."""
    rows_ND = x_TD.new_empty(_rows_to_sum(num_rows, place_TK), x_TD.shape[1])
    rows_ND[num_rows:] = 0
    return rows_ND


def _sum_of_tokens(rows_ND: Tensor, token_N: Tensor | None, place_TK: Tensor | None, num_tokens: int) -> Tensor:
    """Each token's sum of its rows, added up in fp32 or wider. Returns y_TD; without a plan the rows themselves."""
    if token_N is None:
        return rows_ND
    if place_TK is None:
        wide = torch.promote_types(rows_ND.dtype, torch.float32)
        total_TD = rows_ND.new_zeros(num_tokens, rows_ND.shape[1], dtype=wide)
        return total_TD.index_add_(0, token_N, rows_ND.to(wide)).to(rows_ND.dtype)
    if not len(place_TK):
        return rows_ND[:0]
    # A gather and a sum in one, without the gathered rows in memory: ten times faster than the two after each other.
    return F.embedding_bag(place_TK, rows_ND, mode="sum")


# --- many cores


def _uneven(counts: list[int]) -> bool:
    """Whether one expert has more than a thread's share of the rows."""
    return max(counts) * torch.get_num_threads() > sum(counts)


def for_each_expert(run: Callable[[int, slice], None], counts: list[int]) -> None:
    """Call ``run(expert, rows)`` for each expert; at once on all threads of this process that torch would use.

    Where one expert has more than a thread's share of the rows they are run one by one instead, all threads working on
    each product. Which of the two it is follows from the counts, so that the same input gives the same bits.
    """
    threads = torch.get_num_threads()
    ends = list(accumulate(counts))
    experts = [(expert, slice(end - count, end)) for expert, (end, count) in enumerate(zip(ends, counts, strict=True))]
    if threads == 1 or _uneven(counts):
        for expert, rows in experts:
            run(expert, rows)
        return
    largest_first = sorted(experts, key=lambda item: counts[item[0]], reverse=True)
    queue = iter(largest_first)

    inference = torch.is_inference_mode_enabled()

    def work() -> None:
        # A new thread would record gradients; and in inference mode it has to be told of that as well.
        with torch.inference_mode() if inference else torch.no_grad():
            for expert, rows in queue:
                run(expert, rows)

    pool = _pool(threads)
    for done in [pool.submit(work) for _ in range(threads)]:
        done.result()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads in each of which torch uses that thread alone."""
    started = threading.Barrier(threads + 1)

    def start() -> None:
        torch.get_num_threads()  # the first question makes a thread take the process's number; after it, its own counts
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(threads, "experts", initializer=start)
    for _ in range(threads):  # each starts a thread, as those before wait for the last
        pool.submit(int)
    started.wait()
    torch.set_num_threads(threads)  # for threads that others start later
    return pool


os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has none of the threads
