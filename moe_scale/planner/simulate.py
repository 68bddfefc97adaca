"""Many ranks in one process: who is in which group and holds how much, how uneven the load is, and what that costs.

Pure functions on arrays with one entry a rank; nothing is communicated. Groups are those of
:func:`moe_scale.parallel.zero.make_groups`, shards those of ZeRO, rows those of the exchange.

Shapes: W ranks, P ranks of an expert group, E experts, L = E/P local experts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_scale.errors import ConfigError, Problem
from moe_scale.models.layers import is_sparse
from moe_scale.moe.layer import rows_per_expert
from moe_scale.planner.memory import flat_numel, groups
from moe_scale.planner.model import Subject
from moe_scale.planner.plan import Plan
from moe_scale.planner.timing import Rates, link_seconds
from moe_scale.planner.traffic import expected_rows

MOST_RANKS = 16_384
DRAWN = 20_000_000
"""Counts that are drawn for a simulation, at most: of more layers than that allows, some stand for all."""

Array = np.ndarray[Any, np.dtype[Any]]


def group_members(world_size: int, ep_size: int) -> tuple[Array, Array]:
    """Ranks of every expert group [W/P, P], and of every expert-data group [P, W/P]."""
    expert = np.arange(world_size).reshape(-1, ep_size)
    return expert, expert.T


def params_per_rank(subject: Subject) -> Array:
    """Parameters whose update each rank computes, padding left out: int64 [W].

    Over the ranks of a ZeRO stage above 0 they add up to those of the model.
    """
    world, ep_size, stage = subject.world_size, subject.ep_size, subject.plan.stage
    ranks = np.arange(world)
    total = np.zeros(world, dtype=np.int64)
    if stage == 0:
        return total + sum(p.numel for p in subject.parameters)
    if stage < 3:
        for group in groups(subject):
            part = flat_numel(subject, group) // world
            total += np.clip(sum(p.numel for p in group) - ranks * part, 0, part)
        return total
    # Many parameters have one size: each size is shared out once.
    sizes: dict[tuple[int, bool], int] = {}
    for p in subject.parameters:
        sizes[p.numel, p.expert_parallel] = sizes.get((p.numel, p.expert_parallel), 0) + 1
    for (numel, expert_parallel), count in sizes.items():
        among, place = (world // ep_size, ranks // ep_size) if expert_parallel else (world, ranks)
        shard = -(-numel // among)
        total += count * np.clip(numel - place * shard, 0, shard)
    return total


def zipf_shares(num_experts: int, exponent: float, layers: int, seed: int) -> Array:
    """Shares of the experts [layers, E]: the n-th most wanted gets 1/n^s of the first. 0 is even.

    Which expert is how wanted is drawn anew for each layer.
    """
    wanted = (1.0 / np.arange(1, num_experts + 1)) ** exponent
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(wanted / wanted.sum()) for _ in range(layers)])


def measured_shares(path: Path, num_experts: int, layers: int) -> Array:
    """Shares of the experts [layers, E] in the last logged step of a run's ``metrics.jsonl``.

    Raises:
        ConfigError: if the file has none, or those of another model.
    """
    try:
        records = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "not a file of JSON lines"
        raise ConfigError(Problem("--routing", f"{path}: {why}", "name the metrics.jsonl of a run")) from None
    name = "router/tokens_per_expert"
    found = [record[name] for record in records if isinstance(record, dict) and name in record]
    if not found:
        raise ConfigError(Problem("--routing", f"{path} has no {name}", "name one of a sparse run"))
    try:
        counts = np.asarray(found[-1], dtype=np.float64)
    except (ValueError, TypeError):
        counts = np.empty(0)
    if counts.ndim != 2 or not counts.size or not np.isfinite(counts).all() or (counts < 0).any():
        what = f"{path}: its last {name} is no table of counts, one row a layer"
        raise ConfigError(Problem("--routing", what, "name the metrics.jsonl of a run"))
    if counts.shape[1] != num_experts:
        what = f"{path} is of {counts.shape[1]} experts, the plan of {num_experts}"
        raise ConfigError(Problem("--routing", what, "plan with the run's moe.num_experts"))
    if not counts.sum(axis=1).all():
        raise ConfigError(Problem("--routing", f"{path}: a layer has no tokens", "name the metrics.jsonl of a run"))
    shares = counts / counts.sum(axis=1, keepdims=True)
    return shares[np.arange(layers) % len(shares)]


def capped_shares(shares_E: Array, top_k: int) -> Array:
    """The shares with none above 1/K, as no token chooses an expert twice; the others get what is cut off."""
    shares = np.asarray(shares_E, dtype=np.float64)
    full = np.zeros(len(shares), dtype=bool)
    while (over := (shares > 1 / top_k) & ~full).any():
        full |= over
        left, open_E = 1 - full.sum() / top_k, shares * ~full
        if not open_E.sum():
            open_E = (~full).astype(np.float64)
        shares = np.where(full, 1 / top_k, left * open_E / open_E.sum() if open_E.sum() else 0.0)
    return shares


def draw_counts(shares_E: Array, tokens: int, top_k: int, world_size: int, rng: np.random.Generator) -> Array:
    """Rows that each rank has for each expert [W, E]: K choices a token by the capped shares, none above T rows.

    What chance gives an expert beyond a rank's T tokens is drawn again among the experts with room.
    """
    shares_E = capped_shares(shares_E, top_k)
    counts_WE = rng.multinomial(tokens * top_k, shares_E, size=world_size)
    while (over_W := np.maximum(counts_WE - tokens, 0).sum(axis=1)).any():
        counts_WE = np.minimum(counts_WE, tokens)
        chosen = over_W > 0
        room_E = tokens - counts_WE[chosen]
        weights = room_E * shares_E
        weights = np.where(weights.sum(axis=1, keepdims=True) > 0, weights, room_E)
        counts_WE[chosen] += rng.multinomial(over_W[chosen], weights / weights.sum(axis=1, keepdims=True))
    return counts_WE


def routed_counts(subject: Subject, shares_E: Array, rng: np.random.Generator) -> Array:
    """Rows that each rank sends to each expert [W, E]: drawn ones up to the capacity; with expert choice even ones."""
    moe, world = subject.config.moe, subject.world_size
    most = rows_per_expert(moe, subject.tokens, training=True)
    if moe.router == "expert_choice":
        return np.full((world, moe.num_experts), most or 0)
    counts_WE = draw_counts(shares_E, subject.tokens, moe.top_k, world, rng)
    return counts_WE if most is None else np.minimum(counts_WE, most)


@dataclass(frozen=True)
class AllToAllPlan:
    """Who sends how many rows to whom in one exchange.

    Attributes:
        sent_WP: rows of each rank to each place of its expert group.
        received_WP: rows that each rank gets from each place.
    """

    sent_WP: Array
    received_WP: Array

    @property
    def arrived(self) -> Array:
        """Rows that each rank's experts compute."""
        return self.received_WP.sum(axis=1)


def plan_all_to_all(counts_WE: Array, ep_size: int) -> AllToAllPlan:
    """The plans of all ranks, as :func:`moe_scale.moe.exchange.plan_exchange` makes each of them."""
    world, num_experts = counts_WE.shape
    sent_WP = counts_WE.reshape(world, ep_size, num_experts // ep_size).sum(axis=2)
    received_WP = sent_WP.reshape(-1, ep_size, ep_size).transpose(0, 2, 1).reshape(world, ep_size)
    return AllToAllPlan(sent_WP, received_WP)


def all_to_all_seconds(plan: AllToAllPlan, subject: Subject, rates: Rates) -> Array:
    """Time of one trip of the rows for each expert group [W/P]: that of its slowest rank (alpha-beta model).

    A rank sends and receives at once, and what goes inside the node and to other nodes goes at once too.
    """
    cluster, ep_size = subject.cluster, subject.ep_size
    if ep_size == 1:
        return np.zeros(len(plan.sent_WP))
    world = len(plan.sent_WP)
    ranks = np.arange(world)
    members = (ranks // ep_size * ep_size)[:, None] + np.arange(ep_size)
    here_WP = members // cluster.devices_per_node == (ranks // cluster.devices_per_node)[:, None]
    others_WP = members != ranks[:, None]
    row_bytes = subject.config.model.d_model * subject.bytes_per_value

    def busiest(chosen_WP: Array) -> Array:
        sent = (plan.sent_WP * chosen_WP).sum(axis=1)
        received = (plan.received_WP * chosen_WP).sum(axis=1)
        return np.maximum(sent, received) * row_bytes

    intra, inter = busiest(here_WP & others_WP), busiest(~here_WP)
    seconds = link_seconds(cluster, rates, intra, inter, ranks=ep_size, calls=1, crosses=bool((~here_WP).any()))
    return np.asarray(seconds).reshape(-1, ep_size).max(axis=1)


@dataclass(frozen=True)
class Simulation:
    """What a simulation found; times are of one step.

    Attributes:
        params_W: see :func:`params_per_rank`.
        layers_drawn: sparse layers whose routing was drawn.
        expert_load: largest over mean load of an expert, by drawn layer.
        rank_load: largest over mean rows of a rank, by drawn layer.
        slowdowns_W: factor on each rank's compute.
        even_s, uneven_s, straggling_s: step with an even load, with the drawn one, and with the slow ranks too.
        all_to_all_s: of the drawn load.
    """

    subject: Subject
    params_W: Array
    layers_drawn: int
    expert_load: Array
    rank_load: Array
    slowdowns_W: Array
    even_s: float
    uneven_s: float
    straggling_s: float
    all_to_all_s: float

    def record(self) -> dict[str, Any]:
        """Everything as plain values, every group with all its members."""
        subject = self.subject
        expert, expert_data = group_members(subject.world_size, subject.ep_size)
        return {
            "ranks": subject.world_size,
            "params_per_rank": self.params_W.tolist(),
            "params_in_all": int(self.params_W.sum()),
            "expert_groups": expert.tolist(),
            "expert_data_groups": expert_data.tolist(),
            "layers_drawn": self.layers_drawn,
            "expert_load_max": self.expert_load.tolist(),
            "rank_load_max": self.rank_load.tolist(),
            "slowdown_max": float(self.slowdowns_W.max()),
            "step_s": {"even": self.even_s, "drawn load": self.uneven_s, "drawn load, slow ranks": self.straggling_s},
            "all_to_all_s": self.all_to_all_s,
        }


def simulate(plan: Plan, shares_ME: Array | None, *, spread: float, seed: int) -> Simulation:
    """Draw routings and slow ranks, and follow a step through them.

    The layers' experts wait for their exchange, and at ZeRO-3 for the next parameters, which need every rank: a layer
    takes as long as its slowest rank.

    Args:
        shares_ME: of the experts, by sparse layer; None for a dense model.
        spread: the logarithm of a rank's slowdown is the size of a normal number of this standard deviation, so that no
            rank is faster than the plan's.
    """
    subject = plan.subject
    world = subject.world_size
    rng = np.random.default_rng(seed)
    slowdowns = np.exp(np.abs(rng.normal(0.0, spread, world))) if spread else np.ones(world)
    compute = {part.name: part.seconds for part in plan.parts if ":" not in part.name}
    experts_s = compute.get("experts", compute.get("sparse", 0.0))
    all_to_all = sum(part.seconds for part in plan.parts if part.name.startswith("all_to_all: tokens"))
    elsewhere = plan.step_s - experts_s - all_to_all
    others_s = sum(compute.values()) - experts_s
    expert_load, rank_load, experts_max, both_max, trips = [], [], [], [], []
    model, moe = subject.config.model, subject.config.moe
    sparse = sum(is_sparse(moe, layer) for layer in range(model.num_layers))
    if shares_ME is not None and sparse:
        drawn = max(1, min(sparse, DRAWN // (world * moe.num_experts)))
        rows = expected_rows(subject)
        for shares_E in shares_ME[np.linspace(0, len(shares_ME) - 1, drawn).astype(int)]:
            counts_WE = routed_counts(subject, shares_E, rng)
            exchange = plan_all_to_all(counts_WE, subject.ep_size)
            arrived = exchange.arrived
            load = counts_WE.sum(axis=0)
            expert_load.append(load.max() / load.mean())
            rank_load.append(arrived.max() / arrived.mean())
            experts_max.append(arrived.max() / rows)
            both_max.append((arrived * slowdowns).max() / rows)
            trips.append(all_to_all_seconds(exchange, subject, plan.rates).max())
        passes = 3 if not model.activation_checkpointing else 4
        trips_a_step = sparse * subject.plan.grad_accum * (passes + (1 if passes == 3 else 2))
        drawn_all_to_all = float(np.mean(trips)) * trips_a_step if subject.ep_size > 1 else 0.0
    else:
        drawn, drawn_all_to_all, experts_max, both_max = 0, 0.0, [1.0], [float(slowdowns.max())]
    uneven = elsewhere + experts_s * float(np.mean(experts_max)) + drawn_all_to_all
    slowest = float(slowdowns.max())
    straggling = elsewhere + others_s * (slowest - 1) + experts_s * float(np.mean(both_max)) + drawn_all_to_all
    return Simulation(
        subject, params_per_rank(subject), drawn, np.asarray(expert_load), np.asarray(rank_load), slowdowns,
        plan.step_s, uneven, straggling, drawn_all_to_all,
    )  # fmt: skip


def simulate_plan(plan: Plan, *, zipf: float, routing: str, spread: float, seed: int) -> Simulation:
    """The simulation of a plan under Zipf's routing, or where ``routing`` names a ``metrics.jsonl``, a measured one."""
    moe, model = plan.subject.config.moe, plan.subject.config.model
    layers = sum(is_sparse(moe, layer) for layer in range(model.num_layers))
    shares = None
    if layers:
        shares = (
            measured_shares(Path(routing), moe.num_experts, layers)
            if routing
            else zipf_shares(moe.num_experts, zipf, layers, seed)
        )
    return simulate(plan, shares, spread=spread, seed=seed)
