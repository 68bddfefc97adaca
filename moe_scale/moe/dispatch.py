"""Step 2, plan the dispatch: the order in which token copies go to the experts, and which are dropped.

Shapes: T tokens, K experts per token, E experts, C tokens per expert, N rows that go to an expert.
The plan names, for each row sorted by expert, the token that it copies; nothing is moved here, so that an exchange
between ranks or a fused kernel can use the same plan.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

DropPolicy = Literal["position", "probability"]


class DispatchPlan(NamedTuple):
    """Which token goes to which expert, as rows sorted by expert."""

    token_N: Tensor
    """int64 token that each row copies."""
    counts_E: Tensor
    """int64 rows that each expert receives. They sum to N, or to less: the rows after them are no expert's, may hold
    anything, and nothing of them may reach a token."""
    weight_N: Tensor
    """Factor of each row's output in its token's sum; carries the router's gradient."""
    place_TK: Tensor | None
    """int64 row of each token's choices, N for a choice that goes nowhere; None where experts choose tokens."""
    dropped: Tensor
    """int64 scalar: (token, choice) pairs of real tokens that found no place."""


def count_ids(ids_N: Tensor, bins: int) -> Tensor:
    """How often each of 0 .. bins - 1 occurs. int64, and unlike ``torch.bincount`` without a wait for the device."""
    return ids_N.new_zeros(bins).scatter_add_(0, ids_N, torch.ones_like(ids_N))


def capacity(num_tokens: int, top_k: int, num_experts: int, factor: float, minimum: int) -> int:
    """Rows that one expert takes at most: ceil(T * K / E * factor), from ``minimum`` up to T."""
    # A token chooses an expert at most once, so more than T rows cannot come.
    share = Fraction(num_tokens * top_k, num_experts) * Fraction(str(factor))
    return min(max(math.ceil(share), minimum), num_tokens)


def plan_dispatch(
    ids_TK: Tensor,
    weights_TK: Tensor,
    num_experts: int,
    *,
    priority_TK: Tensor | None = None,
    rows_per_expert: int | None = None,
    drop_policy: DropPolicy = "position",
    valid_T: Tensor | None = None,
    rescale_kept: bool = False,
    trim: bool = True,
) -> DispatchPlan:
    """Sort the routed rows by expert.

    Args:
        ids_TK: int64 experts of each token.
        weights_TK: their weights in the tokens' sums.
        num_experts: E.
        priority_TK: the choices' probabilities, read by ``drop_policy="probability"`` alone; None takes the weights.
        rows_per_expert: C; None drops nothing.
        drop_policy: who stays when an expert is given more than C rows. ``position``: first choices in token order,
            then second choices, and so on (GShard, arXiv 2006.16668, algorithm 1); ``probability``: the most probable.
        valid_T: False for padding, which is sent nowhere and takes no capacity.
        rescale_kept: each token's weights are rescaled to sum to 1 over the choices that are kept.
        trim: leave no row that is no expert's. Where choices can go nowhere that means to read how many stay, for which
            the host waits for the device.
    """
    nowhere = num_experts
    ids_N = ids_TK.flatten()
    if valid_T is not None:
        ids_N = torch.where(valid_T.repeat_interleave(ids_TK.shape[1]), ids_N, nowhere)
    dropped = ids_N.new_zeros(())
    if rows_per_expert is not None:
        place_N = _place_within_expert(
            ids_N.view(ids_TK.shape), weights_TK if priority_TK is None else priority_TK, num_experts, drop_policy
        )
        over_N = (place_N >= rows_per_expert) & (ids_N != nowhere)
        dropped = over_N.sum()
        ids_N = torch.where(over_N, nowhere, ids_N)
    if rescale_kept:
        weights_TK = weights_TK * (ids_N != nowhere).view_as(ids_TK)
        weights_TK = weights_TK / weights_TK.sum(dim=1, keepdim=True).clamp(min=torch.finfo(weights_TK.dtype).eps)
    order = by_expert = ids_N.argsort(stable=True)
    counts_E = count_ids(ids_N, num_experts + 1)[:num_experts]
    rows_N = torch.arange(order.numel(), device=order.device)
    if rows_per_expert is not None or valid_T is not None:  # some choices may go nowhere: they were sorted to the end
        num_rows = counts_E.sum()
        if trim:
            order = order[: int(num_rows)]
        rows_N = torch.where(rows_N < num_rows, rows_N, order.numel())
    place = torch.empty_like(rows_N)
    place[by_expert] = rows_N
    top_k = ids_TK.shape[1]
    return DispatchPlan(order // top_k, counts_E, weights_TK.flatten()[order], place.view_as(ids_TK), dropped)


def plan_expert_choice(
    tokens_EC: Tensor, weights_EC: Tensor, top_k: int, num_tokens: int, valid_T: Tensor | None = None
) -> DispatchPlan:
    """The plan of a decision by the experts. A real token that none took counts as ``top_k`` dropped pairs.

    Args:
        tokens_EC: int64 tokens that each expert takes.
        weights_EC: their weights.
        top_k: experts that a token has on average.
        num_tokens: T.
        valid_T: False for padding.
    """
    token_N = tokens_EC.flatten()
    missed_T = token_N.new_ones(num_tokens, dtype=torch.bool).index_fill(0, token_N, False)
    if valid_T is not None:
        missed_T = missed_T & valid_T
    counts_E = token_N.new_full((len(tokens_EC),), tokens_EC.shape[1])
    return DispatchPlan(token_N, counts_E, weights_EC.flatten(), None, top_k * missed_T.sum())


def gather_rows(x_TD: Tensor, plan: DispatchPlan) -> Tensor:
    """The tokens' copies in the plan's order: x_ND."""
    if plan.place_TK is None:
        return x_TD.index_select(0, plan.token_N)
    return _GatherRows.apply(x_TD, plan.token_N, plan.place_TK)


class _GatherRows(torch.autograd.Function):
    """``x_TD[token_N]``, whose gradient is a gather as well: each token sums its rows in one order and in fp32.

    The usual gradient of a gather adds rows up by atomics on a GPU: in no fixed order, and in the precision of x.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_N: Tensor, place_TK: Tensor) -> Tensor:
        ctx.save_for_backward(place_TK)
        return x_TD.index_select(0, token_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (place_TK,) = ctx.saved_tensors
        return _sum_places(grads[0], place_TK), None, None


def _sum_places(rows_ND: Tensor, place_TK: Tensor, weight_N: Tensor | None = None) -> Tensor:
    """Each token's (weighted) sum of the rows at its places, added up in fp32 or wider: y_TD, in the type of the rows.

    The place N holds nothing. One choice of all tokens at a time, in a fixed order: what is wide has T rows, not N.
    """
    total_TD = _wide(rows_ND.new_zeros(len(place_TK), rows_ND.shape[1]))
    for place_T, row_T in _choices(place_TK, len(rows_ND)):
        chosen_TD = _wide(rows_ND.index_select(0, row_T))
        if weight_N is not None:
            chosen_TD = chosen_TD * weight_N.index_select(0, row_T).unsqueeze(1)
        # Not a product with 0, which would carry a number that is none from the last row to tokens that have no row.
        total_TD += chosen_TD.masked_fill((place_T == len(rows_ND)).unsqueeze(1), 0)
    return total_TD.to(rows_ND.dtype)


def _choices(place_TK: Tensor, num_rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Of the first choices, the second, and so on: each token's place, and a row that can be read for each."""
    for place_T in place_TK.unbind(1) if num_rows else ():
        yield place_T, place_T.clamp(max=num_rows - 1)


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def combine_rows(y_ND: Tensor, plan: DispatchPlan, num_tokens: int) -> Tensor:
    """Step 5, combine: each token's weighted sum of its experts' outputs, added up in fp32 or wider. Returns y_TD.

    A token whose rows all went nowhere gets 0.
    """
    if plan.place_TK is not None:
        return _CombineRows.apply(y_ND, plan.weight_N, plan.token_N, plan.place_TK)
    weighted_ND = y_ND * plan.weight_N.unsqueeze(1)
    total_TD = weighted_ND.new_zeros(num_tokens, y_ND.shape[1]).index_add(0, plan.token_N, weighted_ND)
    return total_TD.to(y_ND.dtype)


class _CombineRows(torch.autograd.Function):
    """Each token's weighted sum of its rows.

    Left to autograd, N wide rows would be made several times over, and their gradient added up by atomics. Here the
    gradient is a gather.
    """

    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, weight_N: Tensor, token_N: Tensor, place_TK: Tensor) -> Tensor:
        ctx.save_for_backward(y_ND, weight_N, token_N, place_TK)
        return _sum_places(y_ND, place_TK, weight_N)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        y_ND, weight_N, token_N, place_TK = ctx.saved_tensors
        (grad_TD,), grad_y, grad_weight = grads, None, None
        if ctx.needs_input_grad[0]:
            grad_y = grad_TD.index_select(0, token_N)
            torch.mul(grad_y, weight_N.unsqueeze(1), out=grad_y)
        if ctx.needs_input_grad[1]:
            of_places = _wide(weight_N.new_zeros(len(y_ND) + 1))  # choices that go nowhere write to the last one
            for place_T, row_T in _choices(place_TK, len(y_ND)):
                of_places[place_T] = (_wide(y_ND.index_select(0, row_T)) * grad_TD).sum(dim=1)
            grad_weight = of_places[:-1].to(weight_N.dtype)
        return grad_y, grad_weight, None, None


def _place_within_expert(ids_TK: Tensor, priority_TK: Tensor, num_experts: int, policy: DropPolicy) -> Tensor:
    """For each row n = t*K + k, how many rows of the same expert go before it."""
    num_tokens, top_k = ids_TK.shape
    if policy == "position":
        by_priority_N = torch.arange(num_tokens * top_k, device=ids_TK.device).view(num_tokens, top_k).t().flatten()
    else:
        by_priority_N = priority_TK.flatten().argsort(descending=True, stable=True)
    ids_N = ids_TK.flatten()[by_priority_N]
    by_expert_N = ids_N.argsort(stable=True)
    counts = count_ids(ids_N, num_experts + 1)
    start_of_expert = counts.cumsum(0) - counts
    place_sorted_N = torch.arange(ids_N.numel(), device=ids_N.device) - start_of_expert[ids_N[by_expert_N]]
    place_N = torch.empty_like(place_sorted_N)
    place_N[by_priority_N[by_expert_N]] = place_sorted_N
    return place_N
