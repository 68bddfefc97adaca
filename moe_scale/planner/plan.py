"""A plan: parameters, FLOPs, memory, traffic, time and cost of a run on a cluster, as one record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moe_scale.models.counts import forward_flops_per_token, training_flops_per_token
from moe_scale.planner.activations import Activations, Shapes, activations, shapes_of
from moe_scale.planner.cluster import Cluster
from moe_scale.planner.gathering import Gathering, follow
from moe_scale.planner.memory import States, model_states
from moe_scale.planner.model import Subject
from moe_scale.planner.timing import Part, Rates, step_parts
from moe_scale.planner.traffic import Flow, on_links, step_traffic

FRAGMENTATION = 0.06
"""Share of the tensors' bytes that an allocator loses to rounding and holes: an assumption."""
HOST_SHARE = 0.9
"""Share of a host's memory that model states may have; data loading and the system have the rest: an assumption."""
DISK_RATE = 1e9
"""Bytes a second that a rank writes of a checkpoint: an assumption."""


@dataclass(frozen=True)
class Wishes:
    """What is asked of a plan beside the run itself.

    Attributes:
        tokens: budget; None takes the run's ``max_steps``.
        price: of one device-hour, in any currency.
        masked: whether sequences hold several documents.
        imbalance: rows of the fullest rank over their mean, at least 1.
        disk_rate: bytes a second that one rank writes of a checkpoint.
    """

    tokens: float | None = None
    price: float | None = None
    masked: bool = True
    imbalance: float = 1.0
    disk_rate: float = DISK_RATE


@dataclass(frozen=True)
class Plan:
    """The costs of ``subject``; sizes in bytes, times in seconds, of the rank that has most."""

    subject: Subject
    wishes: Wishes
    rates: Rates
    states: States
    activations: Activations
    gathering: Gathering | None
    flows: list[Flow]
    parts: list[Part]

    @property
    def device_memory(self) -> dict[str, float]:
        """Peak bytes of a device by what they are for."""
        subject, kept = self.subject, sum(self.activations.saved.values())
        updating: dict[str, float] = dict(self.states.on(host=False, moment="at update"))
        updating["update"] = 0 if subject.offloads("optimizer") else self.states.update
        passing: dict[str, float] = dict(self.states.on(host=False, moment="in passes"))
        passing["activations kept"] = kept
        passing["activations passing"] = max(self.activations.peak - kept, 0.0)
        passing["gathered parameters"] = self.gathering.peak_numel * subject.bytes_per_value if self.gathering else 0
        passing["gradient buffers"] = self.states.passing_bucket
        found = max(passing, updating, key=lambda sizes: sum(sizes.values()))  # the two never meet
        found["all-to-all buffers"] = self.all_to_all_buffers
        found = {name: size for name, size in found.items() if size}
        found["fragmentation (assumed)"] = FRAGMENTATION * sum(found.values())
        found["reserved (assumed)"] = subject.cluster.reserved_memory
        return found

    @property
    def all_to_all_buffers(self) -> float:
        """Send and receive buffers of one exchange; what of them is kept counts as activations."""
        s = self.shapes
        return (s.rows + s.arrived) * s.model.d_model * s.size if s.ep_size > 1 else 0.0

    @property
    def shapes(self) -> Shapes:
        return shapes_for(self.subject, self.wishes)

    @property
    def device_bytes(self) -> float:
        return sum(self.device_memory.values())

    @property
    def host_bytes(self) -> float:
        """Host memory of one rank's model states; data loading and the checkpoint's copy come on top."""
        return sum(self.states.on(host=True).values())

    @property
    def fits(self) -> bool:
        return not self.problems

    @property
    def problems(self) -> list[str]:
        """Why the run does not fit its cluster."""
        return shortfalls(self.subject.cluster, self.device_bytes, self.host_bytes)

    @property
    def step_s(self) -> float:
        return sum(part.seconds for part in self.parts)

    @property
    def bound(self) -> str:
        """What takes most of the step: compute, memory, intra, inter, host, or measured."""
        sums: dict[str, float] = {}
        for part in self.parts:
            sums[part.bound] = sums.get(part.bound, 0.0) + part.seconds
        return max(sums, key=lambda name: sums[name])

    @property
    def tokens_per_s(self) -> float:
        return self.subject.tokens_per_step / self.step_s

    @property
    def flops_per_token(self) -> float:
        config = self.subject.config
        return training_flops_per_token(config.model, config.moe, config.data.seq_len)

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation; None where the device's peak is a placeholder."""
        if self.subject.cluster.placeholder:
            return None
        peak = self.subject.cluster.peak(self.subject.plan.precision)
        return self.flops_per_token * self.tokens_per_s / self.subject.world_size / peak

    @property
    def tokens(self) -> float:
        return self.wishes.tokens or float(self.subject.config.max_steps * self.subject.tokens_per_step)

    @property
    def seconds(self) -> float:
        """Of training on all tokens, without evaluation, saving and restarts."""
        return self.tokens / self.tokens_per_s

    @property
    def device_hours(self) -> float:
        return self.seconds / 3600 * self.subject.world_size

    @property
    def checkpoint_bytes(self) -> float:
        return checkpoint_bytes(self.subject)

    @property
    def checkpoint_s(self) -> float:
        return self.checkpoint_bytes / self.subject.world_size / self.wishes.disk_rate

    def record(self) -> dict[str, Any]:
        """Everything as plain values, for ``plan.json``."""
        subject, config = self.subject, self.subject.config
        forward = forward_flops_per_token(config.model, config.moe, config.data.seq_len)
        return {
            "recipe": subject.recipe,
            "layout": layout_record(subject)
            | {
                "seq_len": config.data.seq_len,
                "activation_checkpointing": config.model.activation_checkpointing,
                "tokens_per_step": subject.tokens_per_step,
            },
            "parameters": parameters_record(subject),
            "flops_per_token": {"forward": forward, "training": self.flops_per_token},
            "memory": {
                "device": self.device_memory,
                "device_total": self.device_bytes,
                "device_limit": subject.cluster.device_memory,
                "host": self.states.on(host=True),
                "model_states_at_update": self.states.at_update,
                "activations": self.activations.saved,
                "activations_peak": self.activations.peak,
                "activations_peak_at": self.activations.peak_at,
                "logits_and_loss": self.activations.head,
                "fits": self.fits,
                "problems": self.problems,
            },
            "traffic": [
                {
                    "collective": flow.collective,
                    "group": flow.group,
                    "purpose": flow.purpose,
                    "payload": flow.payload,
                    "intra": on_links(subject, flow).intra,
                    "inter": on_links(subject, flow).inter,
                    "calls": flow.calls,
                }
                for flow in self.flows
            ],
            "time": {
                "parts": {part.name: {"seconds": part.seconds, "bound": part.bound} for part in self.parts},
                "step_s": self.step_s,
                "bound": self.bound,
                "tokens_per_s": self.tokens_per_s,
                "mfu": self.mfu,
                "rates": self.rates.source,
            },
            "budget": {
                "tokens": self.tokens,
                "days": self.seconds / 86400,
                "device_hours": self.device_hours,
                "cost": None if self.wishes.price is None else self.wishes.price * self.device_hours,
            },
            "checkpoint": {"bytes": self.checkpoint_bytes, "seconds": self.checkpoint_s},
            "deepspeed": subject.plan.json,
        }


def make_plan(subject: Subject, wishes: Wishes | None = None, rates: Rates | None = None) -> Plan:
    """Work out all costs of a run."""
    wishes, rates = wishes or Wishes(), rates or Rates()
    gathering = follow(subject) if subject.plan.stage == 3 else None
    flows = step_traffic(subject, gathering)
    shapes = shapes_for(subject, wishes)
    parts = step_parts(subject, shapes, flows, rates)
    return Plan(subject, wishes, rates, model_states(subject), activations(shapes), gathering, flows, parts)


def shapes_for(subject: Subject, wishes: Wishes) -> Shapes:
    """The shapes of a micro-batch on the rank that gets most rows."""
    even = shapes_of(subject, masked=wishes.masked)
    # Without expert parallelism every rank computes its own rows.
    imbalance = wishes.imbalance if subject.ep_size > 1 else 1.0
    return shapes_of(subject, masked=wishes.masked, arrived=even.arrived * imbalance)


def layout_record(subject: Subject) -> dict[str, Any]:
    """How a run is spread over which machine, as plain values."""
    return {
        "cluster": subject.cluster.name,
        "nodes": subject.cluster.nodes,
        "devices_per_node": subject.cluster.devices_per_node,
        "ranks": subject.world_size,
        "zero_stage": subject.plan.stage,
        "ep_size": subject.ep_size,
        "precision": subject.plan.precision,
        "micro_batch": subject.plan.micro_batch,
        "grad_accum": subject.plan.grad_accum,
        "offload_optimizer": subject.offloads("optimizer"),
        "offload_param": subject.offloads("param"),
        "optimizer": subject.config.optim.name,
    }


def parameters_record(subject: Subject) -> dict[str, Any]:
    """Parameters of the whole model, and those that a token uses, as plain values."""
    total, active = subject.global_params(), subject.global_params(active=True)
    return {
        "total": sum(total.values()),
        "active": sum(active.values()),
        "by_part": total,
        "active_by_part": active,
    }


def checkpoint_bytes(subject: Subject) -> float:
    """Of the weights in fp32 and both moments, as they are written by all ranks together."""
    numel = sum(subject.global_params().values())
    return numel * (4 + (8 if subject.config.optim.name == "adamw" else 2 * (1 + 4 / 256)))


def shortfalls(cluster: Cluster, device_bytes: float, host_bytes: float) -> list[str]:
    """What a rank needs that its machine lacks.

    Args:
        device_bytes: of a rank on its device, with what is lost and reserved.
        host_bytes: of a rank in host memory.
    """
    found = []
    if cluster.is_cpu:  # device and host are one memory, shared by the host's ranks
        needed = cluster.devices_per_node * (device_bytes + host_bytes)
        if needed > cluster.host_memory:
            found.append(f"needs {gib(needed)} of a host's {gib(cluster.host_memory)}")
        return found
    if device_bytes > cluster.device_memory:
        found.append(f"needs {gib(device_bytes)} of a device's {gib(cluster.device_memory)}")
    if (host := host_bytes * cluster.devices_per_node) > HOST_SHARE * cluster.host_memory:
        found.append(f"needs {gib(host)} of a host's {gib(cluster.host_memory)}")
    return found


def gib(size: float) -> str:
    """Bytes in GiB, or MiB where that is too coarse."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
