"""Step 3, exchange: rows travel to the ranks that hold their experts, and back.

Shapes: P ranks of the expert group, L = E/P experts on each, N rows of this rank sorted by expert, R rows received.
Experts are numbered rank by rank, so rows sorted by expert are sorted by destination too, and one all-to-all with
uneven splits moves them. What arrives is sorted by source, then by expert; the experts want it sorted by expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from moe_scale.parallel.groups import ParallelGroups

T = TypeVar("T")


class ExchangePlan(NamedTuple):
    """Who sends how many rows to whom."""

    sent_P: list[int]
    """Rows that go to each rank."""
    received_P: list[int]
    """Rows that come from each rank."""
    by_expert_R: Tensor
    """int64 permutation of the received rows that sorts them by local expert."""
    counts_L: Tensor
    """int64 rows of each local expert, from all ranks together."""


def plan_exchange(counts_E: Tensor, groups: ParallelGroups) -> ExchangePlan:
    """Tell each other the counts. All ranks of the expert group must call it together.

    Args:
        counts_E: int64 rows that this rank has for each of the E experts.
    """
    theirs_PL = torch.empty_like(counts_E).view(groups.ep_size, -1)
    dist.all_to_all_single(theirs_PL.view(-1), counts_E.contiguous(), group=groups.expert)
    num_local = theirs_PL.shape[1]
    sent_P = counts_E.view(groups.ep_size, num_local).sum(dim=1)
    # One read-back for both lists: the splits of an all-to-all are host numbers.
    sent, received = torch.stack([sent_P, theirs_PL.sum(dim=1)]).tolist()
    expert_of_row_R = torch.arange(num_local, device=counts_E.device).repeat(groups.ep_size)
    expert_of_row_R = expert_of_row_R.repeat_interleave(theirs_PL.flatten(), output_size=sum(received))
    return ExchangePlan(sent, received, expert_of_row_R.argsort(stable=True), theirs_PL.sum(dim=0))


def to_experts(
    rows_ND: Tensor, plan: ExchangePlan, groups: ParallelGroups, meanwhile: Callable[[], T]
) -> tuple[Tensor, T]:
    """Send rows sorted by expert, and do something else while they travel.

    Args:
        meanwhile: work that needs none of the rows; its gradient is likewise computed while theirs travel back.

    Returns:
        the rows for this rank's experts, sorted by expert [R, D], and the result of ``meanwhile``.
    """
    trip = _Trip()
    on_its_way = _Start.apply(rows_ND, plan.received_P, plan.sent_P, groups.expert, trip)
    result = meanwhile()
    arrived_RD = _Finish.apply(on_its_way, plan.received_P, plan.sent_P, groups.expert, trip)
    return arrived_RD.index_select(0, plan.by_expert_R), result


def from_experts(rows_RD: Tensor, plan: ExchangePlan, groups: ParallelGroups) -> Tensor:
    """The way back of :func:`to_experts`: [R, D] to [N, D] in this rank's original order."""
    by_source_RD = torch.empty_like(plan.by_expert_R)
    by_source_RD[plan.by_expert_R] = torch.arange(rows_RD.shape[0], device=rows_RD.device)
    return _AllToAll.apply(rows_RD.index_select(0, by_source_RD), plan.sent_P, plan.received_P, groups.expert)


class _Trip:
    """Carries a running all-to-all from the half that launches it to the half that waits for it."""

    work: Any = None
    gradient: Any = None


def _launch(rows: Tensor, out_splits: list[int], in_splits: list[int], group: Any, trip: _Trip) -> Tensor:
    out = rows.new_empty(sum(out_splits), *rows.shape[1:])
    trip.work = dist.all_to_all_single(out, rows.contiguous(), out_splits, in_splits, group=group, async_op=True)
    return out


class _Start(torch.autograd.Function):
    """First half of an all-to-all: launches it. Its backward waits for the gradient's trip back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, out_splits: list[int], in_splits: list[int], group: Any, trip: _Trip) -> Tensor:
        ctx.trip = trip
        return _launch(rows, out_splits, in_splits, group, trip)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        trip = ctx.trip
        trip.work.wait()
        # Not grads[0]: autograd insists on gradients in the shape of what came in, so the real one travels beside it.
        gradient, trip.gradient, trip.work = trip.gradient, None, None
        return gradient, None, None, None, None


class _Finish(torch.autograd.Function):
    """Second half of an all-to-all: waits for it. Its backward launches the gradient's trip back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, out_splits: list[int], in_splits: list[int], group: Any, trip: _Trip) -> Tensor:
        ctx.route, ctx.trip = (in_splits, out_splits, group), trip
        work, trip.work = trip.work, None  # the handle holds the rows as long as it lives
        work.wait()
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        out_splits, in_splits, group = ctx.route
        ctx.trip.gradient = _launch(grads[0], out_splits, in_splits, group, ctx.trip)
        return grads[0], None, None, None, None


class _AllToAll(torch.autograd.Function):
    """All-to-all of rows with uneven splits; its gradient is the same with the splits swapped."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, out_splits: list[int], in_splits: list[int], group: Any) -> Tensor:
        ctx.splits, ctx.group = (in_splits, out_splits), group
        out = rows.new_empty(sum(out_splits), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), out_splits, in_splits, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        out_splits, in_splits = ctx.splits
        return _AllToAll.apply(grads[0], out_splits, in_splits, ctx.group), None, None, None
