"""Bytes that a rank hands to collectives in one step, by collective, group and purpose, and what crosses which link.

The payload is the larger of a call's two buffers: what an all-gather gives, what a reduce-scatter takes, the tensor of
an all-reduce, the rows that an all-to-all takes. Single numbers that ranks agree on (gradient norms, flags) are left
out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from moe_scale.models.layers import is_sparse
from moe_scale.moe.layer import rows_per_expert
from moe_scale.planner.gathering import Gathering, follow, is_persistent, setting
from moe_scale.planner.memory import communication_bytes, flat_numel, groups, uses_bf16_optimizer
from moe_scale.planner.model import Parameter, Subject


@dataclass(frozen=True)
class Flow:
    """One kind of collective over one step of one rank.

    Attributes:
        collective: all_gather, reduce_scatter, all_reduce or all_to_all.
        group: world, expert or expert-data.
        purpose: what is moved.
        payload: bytes.
        calls: how often it is called, about: of two groups that take turns both get all calls.
    """

    collective: str
    group: str
    purpose: str
    payload: float
    calls: int


def step_traffic(subject: Subject, gathering: Gathering | None = None) -> list[Flow]:
    """Everything that a rank sends in one optimizer step, with an even load of the experts."""
    if subject.world_size == 1:
        return []
    flows = _stage_3(subject, gathering or follow(subject)) if subject.plan.stage == 3 else _stages_0_to_2(subject)
    return [*flows, *_loads(subject), *_all_to_all(subject)]


def group_size(subject: Subject, group: str) -> int:
    """Ranks of a group."""
    return {"world": subject.world_size, "expert": subject.ep_size}.get(group, subject.world_size // subject.ep_size)


def _group_of(parameter: Parameter) -> str:
    return "expert-data" if parameter.expert_parallel else "world"


def _stage_3(subject: Subject, gathering: Gathering) -> list[Flow]:
    micro, size = subject.plan.grad_accum, subject.bytes_per_value
    persistent = [p for p in subject.parameters if is_persistent(subject, p)]
    flows = [
        flow
        for way, gathered, calls in (
            ("forward", gathering.forward, gathering.forward_calls),
            ("backward", gathering.backward, gathering.backward_calls),
        )
        for flow in _by_group(subject, "all_gather", f"parameters, {way}", gathered, micro * size, calls=micro * calls)
    ]
    flows += _by_group(
        subject, "all_gather", "small parameters, after the update", persistent, size, calls=len(persistent)
    )
    reduced = micro * communication_bytes(subject)
    return flows + _by_group(
        subject, "reduce_scatter", "gradients", subject.parameters, reduced, calls=micro * _buckets(subject)
    )


def _by_group(
    subject: Subject, collective: str, purpose: str, parameters: Iterable[Parameter], size: int, *, calls: int
) -> list[Flow]:
    sums: dict[str, int] = {}
    for p in parameters:
        group = _group_of(p)
        sums[group] = sums.get(group, 0) + subject.shard(p) * subject.shard_ranks(p) * size
    return [
        Flow(collective, group, purpose, payload, calls)
        for group, payload in sums.items()
        if group_size(subject, group) > 1
    ]


def _buckets(subject: Subject) -> int:
    """How often stage 3 empties its bucket of gradients: when it is full, and between parameters of two groups."""
    limit, filled, group, count = setting(subject, "reduce_bucket_size"), 0, "", 0
    for p in reversed(subject.parameters):
        if filled and (filled + p.numel > limit or _group_of(p) != group):
            count, filled = count + 1, 0
        filled, group = filled + p.numel, _group_of(p)
    return count + 1


def _stages_0_to_2(subject: Subject) -> list[Flow]:
    plan, numel = subject.plan, sum(p.numel for p in subject.parameters)
    reductions = plan.grad_accum if plan.stage == 2 else 1
    reduced = numel * communication_bytes(subject) * reductions
    if uses_bf16_optimizer(subject):
        reduced = sum(flat_numel(subject, group) for group in groups(subject)) * communication_bytes(subject)
    flows = [Flow("all_reduce", "world", "gradients", reduced, reductions)]
    if plan.stage > 0:
        flat = sum(flat_numel(subject, group) for group in groups(subject)) * subject.bytes_per_value
        flows.append(Flow("all_gather", "world", "parameters, after the update", flat, len(groups(subject))))
    return flows


def _loads(subject: Subject) -> list[Flow]:
    """The experts' loads, where all ranks' count: for a balancing loss of global scope, and for selection biases."""
    moe, model = subject.config.moe, subject.config.model
    sparse = sum(is_sparse(moe, layer) for layer in range(model.num_layers))
    flows = []
    if sparse and moe.aux_loss_scope == "global" and moe.router not in ("hash", "expert_choice"):
        calls = sparse * subject.plan.grad_accum * (2 if model.activation_checkpointing else 1)
        flows.append(Flow("all_reduce", "world", "experts' loads, forward", calls * 8 * moe.num_experts, calls))
    if sparse and moe.router == "sigmoid":
        flows.append(Flow("all_reduce", "world", "experts' loads, after the update", 4 * sparse * moe.num_experts, 1))
    return flows


def _all_to_all(subject: Subject) -> list[Flow]:
    moe, model = subject.config.moe, subject.config.model
    if not moe.enabled or subject.ep_size == 1:
        return []
    sparse = sum(is_sparse(moe, layer) for layer in range(model.num_layers))
    forwards = 2 if model.activation_checkpointing else 1
    micro = subject.plan.grad_accum
    rows = expected_rows(subject) * model.d_model * subject.bytes_per_value
    trips = sparse * micro
    return [
        Flow("all_to_all", "expert", "counts", trips * forwards * 8 * moe.num_experts, trips * forwards),
        Flow("all_to_all", "expert", "tokens, forward", trips * forwards * 2 * rows, trips * forwards * 2),
        Flow("all_to_all", "expert", "tokens, backward", trips * 2 * rows, trips * 2),
    ]


def expected_rows(subject: Subject) -> float:
    """Rows that a rank sends in one sparse layer: T*K, or what the capacity lets through of an even load."""
    moe = subject.config.moe
    rows = subject.tokens * moe.top_k
    most = rows_per_expert(moe, subject.tokens, training=True)
    if moe.router == "expert_choice":
        return float((most or 0) * moe.num_experts)
    return float(rows if most is None else min(rows, most * moe.num_experts))


def all_to_all_payload(subject: Subject, counts_RE: Sequence[Sequence[float]], rank: int) -> int:
    """Bytes that ``rank`` hands to the all-to-alls of one sparse layer and micro-batch, from its expert group's counts.

    Args:
        counts_RE: rows that each rank of the expert group, in the group's order, has for each of the E experts, dropped
            ones left out.
        rank: place in the group.
    """
    local = subject.config.moe.num_experts // subject.ep_size
    mine = slice(rank * local, (rank + 1) * local)
    sent = int(sum(counts_RE[rank]))
    received = int(sum(sum(row[mine]) for row in counts_RE))
    forwards = 2 if subject.config.model.activation_checkpointing else 1
    width = subject.config.model.d_model * subject.bytes_per_value
    # Forward: the rows, and the outputs of those that came. Backward: the same two trips the other way round.
    return forwards * 8 * subject.config.moe.num_experts + (forwards + 1) * (sent + received) * width


@dataclass(frozen=True)
class Link:
    """Bytes of a flow that one rank sends inside its node and to other nodes, each of the rank that sends most."""

    intra: float
    inter: float


@lru_cache
def neighbours(world_size: int, devices_per_node: int, ep_size: int, group: str) -> tuple[int, int]:
    """Fewest and most members that a group has on a node it reaches, over all groups of that kind.

    They differ where groups straddle nodes, as 6 neighbouring ranks do on nodes of 8.
    """
    number = {
        "world": lambda rank: 0,
        "expert": lambda rank: rank // ep_size,
        "expert-data": lambda rank: rank % ep_size,
    }[group]
    here = Counter((number(rank), rank // devices_per_node) for rank in range(world_size)).values()
    return min(here), max(here)


def on_links(subject: Subject, flow: Flow) -> Link:
    """What of a flow's payload one rank sends over which link.

    All-gather and reduce-scatter run in rings: every link of a ring of R ranks carries (R-1)/R of the payload, the one
    into a node as well. There are as many rings as the group has members on a node, each over an adapter of its own
    with its part of the payload; the node with the fewest members has the fewest adapters. An all-reduce is both. An
    all-to-all sends to each rank what is for it.
    """
    cluster, ranks = subject.cluster, group_size(subject, flow.group)
    fewest, most = neighbours(cluster.world_size, cluster.devices_per_node, subject.ep_size, flow.group)
    if flow.collective == "all_to_all":
        return Link(flow.payload * (most - 1) / ranks, flow.payload * (ranks - fewest) / ranks)
    carried = (2 if flow.collective == "all_reduce" else 1) * flow.payload * (ranks - 1) / ranks
    return Link(carried if most > 1 else 0.0, carried / fewest if fewest < ranks else 0.0)
