"""Step 2, plan the dispatch: the order in which token copies go to the experts, and which are dropped.

Shapes: T tokens, K experts per token, E experts, N = T*K routed rows, C rows of capacity an expert.
Row n = t*K + k is choice k of token t. The plan is a permutation of the rows, sorted by expert; nothing is moved
here, so that an exchange between ranks or a fused kernel can use the same plan.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

DropPolicy = Literal["position", "probability"]


class DispatchPlan(NamedTuple):
    """Where each routed row goes."""

    order_N: Tensor
    """int64 rows sorted by expert, token order within an expert; rows that go nowhere come last."""
    counts_E: Tensor
    """int64 rows that each expert receives."""
    num_rows: int
    """How many of ``order_N`` go to an expert (N unless something is dropped or padded)."""
    dropped: Tensor
    """int64 scalar: rows of real tokens that found no place."""


def capacity(num_tokens: int, top_k: int, num_experts: int, factor: float, minimum: int) -> int:
    """Rows that one expert takes at most: ceil(T * K / E * factor), from ``minimum`` up to T."""
    # A token chooses an expert at most once, so more than T rows cannot come.
    share = Fraction(num_tokens * top_k, num_experts) * Fraction(str(factor))
    return min(max(math.ceil(share), minimum), num_tokens)


def plan_dispatch(
    ids_TK: Tensor,
    priority_TK: Tensor,
    num_experts: int,
    *,
    rows_per_expert: int | None = None,
    drop_policy: DropPolicy = "position",
    valid_T: Tensor | None = None,
) -> DispatchPlan:
    """Sort the routed rows by expert.

    Args:
        ids_TK: int64 experts of each token.
        priority_TK: the choices' probabilities, read by ``drop_policy="probability"`` alone.
        num_experts: E.
        rows_per_expert: C; None drops nothing.
        drop_policy: who stays when an expert is given more than C rows. ``position``: first choices in token order,
            then second choices, and so on (GShard, arXiv 2006.16668, algorithm 1); ``probability``: the most probable.
        valid_T: False for padding, which is sent nowhere and takes no capacity.
    """
    nowhere = num_experts
    ids_N = ids_TK.flatten()
    if valid_T is not None:
        ids_N = torch.where(valid_T.repeat_interleave(ids_TK.shape[1]), ids_N, nowhere)
    dropped = ids_N.new_zeros(())
    if rows_per_expert is not None:
        place_N = _place_within_expert(ids_N.view(ids_TK.shape), priority_TK, num_experts, drop_policy)
        over_N = (place_N >= rows_per_expert) & (ids_N != nowhere)
        dropped = over_N.sum()
        ids_N = torch.where(over_N, nowhere, ids_N)
    order_N = ids_N.argsort(stable=True)
    counts_E = torch.bincount(ids_N, minlength=num_experts + 1)[:num_experts]
    # Reading a count back would make the host wait for the device, so it is done only when it can differ from N.
    can_differ = rows_per_expert is not None or valid_T is not None
    num_rows = int(counts_E.sum()) if can_differ else ids_N.numel()
    return DispatchPlan(order_N, counts_E, num_rows, dropped)


def gather_rows(x_TD: Tensor, plan: DispatchPlan, top_k: int) -> Tensor:
    """The tokens' copies in the plan's order: [num_rows, D]."""
    return x_TD.index_select(0, plan.order_N[: plan.num_rows] // top_k)


def combine_rows(y_ND: Tensor, plan: DispatchPlan, weights_TK: Tensor) -> Tensor:
    """Step 5, combine: each token's sum of its experts' outputs times its weights, added up in fp32 or wider.

    Args:
        y_ND: the experts' outputs in the plan's order, [num_rows, D]. A row that went nowhere adds nothing.
        weights_TK: fp32 routing weights.
    """
    num_tokens, top_k = weights_TK.shape
    place_N = torch.empty_like(plan.order_N)
    place_N[plan.order_N] = torch.arange(plan.order_N.numel(), device=place_N.device)
    missing = plan.order_N.numel() - plan.num_rows
    rows_ND = F.pad(y_ND, (0, 0, 0, missing)) if missing else y_ND
    chosen_TKD = rows_ND.index_select(0, place_N).view(num_tokens, top_k, -1)
    # Not an einsum: this is a hot path, and a sum over a K of one to eight is elementwise work.
    return (chosen_TKD * weights_TK.unsqueeze(-1)).sum(dim=1).to(y_ND.dtype)


def _place_within_expert(ids_TK: Tensor, priority_TK: Tensor, num_experts: int, policy: DropPolicy) -> Tensor:
    """For each row n = t*K + k, how many rows of the same expert go before it."""
    num_tokens, top_k = ids_TK.shape
    if policy == "position":
        priority_N = torch.arange(num_tokens * top_k, device=ids_TK.device).view(top_k, num_tokens).t().flatten()
        by_priority_N = priority_N.argsort()
    else:
        by_priority_N = priority_TK.flatten().argsort(descending=True, stable=True)
    ids_N = ids_TK.flatten()[by_priority_N]
    by_expert_N = ids_N.argsort(stable=True)
    counts = torch.bincount(ids_N, minlength=num_experts + 1)
    start_of_expert = counts.cumsum(0) - counts
    place_sorted_N = torch.arange(ids_N.numel(), device=ids_N.device) - start_of_expert[ids_N[by_expert_N]]
    place_N = torch.empty_like(place_sorted_N)
    place_N[by_priority_N[by_expert_N]] = place_sorted_N
    return place_N
