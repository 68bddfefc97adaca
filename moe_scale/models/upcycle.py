"""Experts made of a dense feed-forward (sparse upcycling, arXiv 2212.05055), so that at first nothing changes.

Copies: every expert is the dense feed-forward. The weights of a token's experts sum to 1, so their sum is its output.

Granular experts (arXiv 2410.07524): the feed-forward's hidden units are cut into G shards, and E experts are E/G copies
of each. The experts of one copy have equal rows in the router ("virtual groups" there), so a token is sent to whole
copies; each expert has a Gth of its copy's weight, so outputs are multiplied by G.

Shapes: D model width, F hidden width of the dense feed-forward, f = F/G of an expert, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moe_scale.config import MoEConfig
from moe_scale.errors import Problem
from moe_scale.initialization import Init


def upcycle_problems(
    num_experts: int, top_k: int, granularity: int, every: int, hidden: int, num_layers: int
) -> list[Problem]:
    """Why a dense model cannot be upcycled like this.

    Args:
        hidden: F.
    """
    found = []
    if top_k == 1:
        what = "1: a single expert is weighted by its probability, and the first loss would not be the dense model's"
        allowed = "choose 2 or more; --granularity 2 --top_k 2 costs as many FLOPs a token as the dense model"
        found.append(Problem("--top_k", what, allowed))
    for option, value in (("--num_experts", num_experts), ("--top_k", top_k)):
        if value % granularity:
            what = f"{value} is no multiple of --granularity = {granularity}"
            found.append(Problem(option, what, "a token is sent to whole copies of the feed-forward"))
    if top_k > num_experts:
        found.append(Problem("--top_k", f"{top_k} > --num_experts = {num_experts}", f"choose up to {num_experts}"))
    if hidden % granularity:
        what = f"{granularity} does not divide the feed-forward's hidden width of {hidden}"
        found.append(Problem("--granularity", what, "choose a divisor of it"))
    if every > num_layers:
        what = f"{every} > {num_layers} layers: none would be sparse"
        found.append(Problem("--every", what, f"choose 1 to {num_layers}"))
    if every > 1 and top_k != granularity:
        what = f"{every} with --top_k = {top_k} and --granularity = {granularity}"
        allowed = (
            "dense layers are as wide as the experts that a token uses: choose --top_k equal to --granularity, or 1"
        )
        found.append(Problem("--every", what, allowed))
    return found


def upcycled_settings(
    dense: MoEConfig, num_experts: int, top_k: int, granularity: int, every: int, hidden: int
) -> MoEConfig:
    """The sparse layers' settings; what concerns training is as the dense run had it."""
    return replace(
        dense,
        enabled=True,
        num_experts=num_experts,
        top_k=top_k,
        intermediate_size=hidden // granularity,
        every=every,
        activation="swiglu",
        expert_bias=False,
        shared_intermediate_size=0,
        residual=False,
        router="softmax",
        renormalize=True,
    )


def experts_gate_up(dense_ID: Tensor, num_experts: int, granularity: int) -> Tensor:
    """[E, 2f, D] of the dense gate and up projection [2F, D]."""
    gate_FD, up_FD = dense_ID.chunk(2)
    # Of the factor G one root is here and one in `down`, whose scale then is usual for an expert's width. The gate
    # enters an activation and keeps its own.
    up_FD = up_FD * granularity**0.5
    shards = [torch.cat(pair) for pair in zip(gate_FD.chunk(granularity), up_FD.chunk(granularity), strict=True)]
    return torch.stack(shards).repeat(num_experts // granularity, 1, 1)


def experts_down(dense_DF: Tensor, num_experts: int, granularity: int) -> Tensor:
    """[E, D, f] of the dense down projection [D, F]."""
    shards = torch.stack((dense_DF * granularity**0.5).chunk(granularity, dim=1))
    return shards.repeat(num_experts // granularity, 1, 1)


def router_rows(d_model: int, num_experts: int, granularity: int, init: Init, scale: float = 1.0) -> Tensor:
    """Router weights [E, D] that are drawn once for each copy of the feed-forward; the experts of a copy share them."""
    rows = torch.zeros(num_experts // granularity, d_model)
    init.normal_(rows, std=scale * d_model**-0.5)
    return rows.repeat_interleave(granularity, dim=0)
