"""What a model's weights, gradients and optimizer take of a rank, whatever the model: which machines hold it.

For recipes whose activations, traffic and time are not modelled. Of each ZeRO stage, with the optimizer on the device
and in host memory: what a rank holds between two steps, at most during a step, and in host memory, as
:mod:`moe_scale.planner.memory` has it, and what that leaves for activations. Held against real ranks by
``tests/distributed/test_states.py``.

Units: bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moe_scale.planner.cluster import PRESETS, Cluster
from moe_scale.planner.gathering import most_gathered
from moe_scale.planner.memory import States, model_states
from moe_scale.planner.model import Sharding, Subject, Variants
from moe_scale.planner.plan import (
    DISK_RATE,
    FRAGMENTATION,
    checkpoint_bytes,
    layout_record,
    parameters_record,
    shortfalls,
)
from moe_scale.train.recipe import Recipe

MOST_NODES = 64
"""Nodes that are tried at most before a kind of device is said not to hold a model."""


@dataclass(frozen=True)
class Held:
    """What a rank holds of ``subject``'s model.

    Attributes:
        subject: the run.
        states: of the rank that holds most.
        gathered: elements of whole parameters beside the shards, at most.
    """

    subject: Subject
    states: States
    gathered: int

    @property
    def gathered_bytes(self) -> int:
        return self.gathered * self.subject.bytes_per_value

    @property
    def between_steps(self) -> int:
        """On the device, between two steps."""
        return sum(self.states.on(host=False, moment="between steps").values())

    @property
    def in_passes(self) -> int:
        """On the device during forward and backward pass at most, without activations."""
        held = sum(self.states.on(host=False, moment="in passes").values())
        return held + self.gathered_bytes + self.states.passing_bucket

    @property
    def at_update(self) -> int:
        """On the device during the update."""
        update = 0 if self.subject.offloads("optimizer") else self.states.update
        return sum(self.states.on(host=False).values()) + update

    @property
    def host_bytes(self) -> int:
        """In host memory, at most."""
        return sum(self.states.on(host=True).values())

    @property
    def room(self) -> float:
        """What is left for activations, and for the buffers that exchange them; negative where nothing is."""
        return self._usable - self.in_passes

    @property
    def _usable(self) -> float:
        """Bytes of a device that tensors can have."""
        cluster = self.subject.cluster
        memory = cluster.device_memory
        if cluster.is_cpu:  # the host's, shared by its ranks
            memory = cluster.host_memory / cluster.devices_per_node - self.host_bytes
        return (memory - cluster.reserved_memory) / (1 + FRAGMENTATION)

    @property
    def problems(self) -> list[str]:
        """Why the machine does not hold the model."""
        cluster, most = self.subject.cluster, max(self.in_passes, self.at_update)
        return shortfalls(cluster, most * (1 + FRAGMENTATION) + cluster.reserved_memory, self.host_bytes)

    def record(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "device": self.states.on(host=False),
            "host": self.states.on(host=True),
            "between_steps": self.between_steps,
            "in_passes": self.in_passes,
            "at_update": self.at_update,
            "host_total": self.host_bytes,
            "gathered_at_most": self.gathered_bytes,
            "left_for_activations": self.room,
        }


@dataclass(frozen=True)
class Outcome:
    """What became of a sharding: what a rank holds, and why it fails, empty where the machine holds the model."""

    sharding: Sharding
    held: Held | None
    why: str

    def record(self) -> dict[str, Any]:
        """As plain values."""
        found = {} if self.held is None else self.held.record()
        return {**vars(self.sharding), **found, "fits": not self.why, "why": self.why}


@dataclass(frozen=True)
class StatesPlan:
    """The model states of a run's model.

    Attributes:
        subject: the run.
        outcomes: of every sharding on the run's own cluster.
        machines: by kind of device and sharding what a rank holds on the fewest devices that hold the model; None where
            :data:`MOST_NODES` do not.
        disk_rate: bytes a second that one rank writes of a checkpoint.
    """

    subject: Subject
    outcomes: Sequence[Outcome]
    machines: dict[str, dict[Sharding, Held | None]]
    disk_rate: float = DISK_RATE

    @property
    def own(self) -> Outcome:
        """That of the run as it is set."""
        return next(outcome for outcome in self.outcomes if outcome.sharding == sharding_of(self.subject))

    @property
    def checkpoint_bytes(self) -> float:
        return checkpoint_bytes(self.subject)

    @property
    def checkpoint_s(self) -> float:
        return self.checkpoint_bytes / self.subject.world_size / self.disk_rate

    def record(self) -> dict[str, Any]:
        """Everything as plain values, for ``plan.json``."""
        subject = self.subject
        return {
            "recipe": subject.recipe,
            "model": subject.kind,
            "layout": layout_record(subject),
            "parameters": parameters_record(subject),
            "memory": {
                "device_limit": subject.cluster.device_memory,
                "host_limit": subject.cluster.host_memory,
                "shardings": [outcome.record() for outcome in self.outcomes],
            },
            "machines": {
                name: [_machine(sharding, held) for sharding, held in found.items()]
                for name, found in self.machines.items()
            },
            "checkpoint": {"bytes": self.checkpoint_bytes, "seconds": self.checkpoint_s},
            "deepspeed": subject.plan.json,
        }


def plan_states(recipe: Recipe, subject: Subject, disk_rate: float = DISK_RATE) -> StatesPlan:
    """Work out what ranks hold of a run's model, on its cluster and on the fewest devices of each kind."""
    variants = Variants(recipe, subject)
    outcomes = [_on(variants, sharding, subject.cluster) for sharding in shardings(subject)]
    machines = {
        name: {outcome.sharding: fewest(variants, outcome.sharding, cluster) for outcome in outcomes}
        for name, cluster in kinds(subject.cluster).items()
    }
    return StatesPlan(subject, outcomes, machines, disk_rate)


def held_by(subject: Subject, rank: int | None = None) -> Held:
    """What ``rank`` holds of a run's model, by default the rank that holds most."""
    return Held(subject, model_states(subject, rank), most_gathered(subject) if subject.plan.stage == 3 else 0)


def sharding_of(subject: Subject) -> Sharding:
    """That of a run as it is set."""
    return Sharding(subject.plan.stage, subject.ep_size, subject.offloads("optimizer"))


def shardings(subject: Subject) -> Iterator[Sharding]:
    """Every ZeRO stage, with and without offload where it has an effect. Below stage 3 each rank has all experts."""
    for stage in range(4):
        for offload in (False, True) if stage else (False,):
            yield Sharding(stage, subject.ep_size if stage == 3 else 1, offload)


def kinds(own: Cluster) -> dict[str, Cluster]:
    """The presets of GPUs, with the run's own machine, as it was described, in its preset's place."""
    found = {name: cluster for name, cluster in PRESETS.items() if not cluster.is_cpu}
    return found if own.is_cpu else found | {own.name: own}


def sizes(cluster: Cluster) -> Iterator[Cluster]:
    """The kind of machine from one device up to a node, and from there up to :data:`MOST_NODES`, doubling."""
    devices, nodes = 1, 1
    while devices < cluster.devices_per_node:
        yield replace(cluster, nodes=1, devices_per_node=devices)
        devices *= 2
    while nodes <= MOST_NODES:
        yield replace(cluster, nodes=nodes)
        nodes *= 2


def fewest(variants: Variants, sharding: Sharding, kind: Cluster) -> Held | None:
    """What a rank holds on the fewest devices that hold the model; None where :data:`MOST_NODES` do not.

    The experts are spread over as many ranks as the sharding says, or as there are.
    """
    for cluster in sizes(kind):
        spread = replace(sharding, ep_size=math.gcd(sharding.ep_size, cluster.world_size))
        outcome = _on(variants, spread, cluster)
        if not outcome.why:
            return outcome.held
    return None


def _on(variants: Variants, sharding: Sharding, cluster: Cluster) -> Outcome:
    subject, why = variants.make(sharding, cluster=cluster)
    if subject is None:
        return Outcome(sharding, None, why)
    held = held_by(subject)
    return Outcome(sharding, held, "; ".join(held.problems))


def _machine(sharding: Sharding, held: Held | None) -> dict[str, Any]:
    if held is None:
        return {**vars(sharding), "devices": None, "nodes": None, "left_for_activations": None}
    cluster = held.subject.cluster
    figures = {"devices": cluster.world_size, "nodes": cluster.nodes, "left_for_activations": held.room}
    return {**vars(sharding_of(held.subject)), **figures}
