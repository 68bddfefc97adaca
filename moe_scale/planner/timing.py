"""The time of a step: each part by what bounds it, and communication as far as nothing hides it.

A part takes the longer of its FLOPs at an achievable rate and its bytes at an achievable bandwidth. Without calibration
those rates are shares of the data sheet's, which are assumptions and are printed as such. A calibration, made by
``moe-scale bench --calibrate`` on the machine in question, replaces them by measured ones.

Units: seconds, FLOP/s, bytes a second.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from moe_scale.errors import ConfigError, Problem
from moe_scale.models.layers import dense_hidden, is_sparse
from moe_scale.planner.activations import Shapes, attention, dense_block, sparse_block
from moe_scale.planner.cluster import Cluster
from moe_scale.planner.model import Subject
from moe_scale.planner.traffic import Flow, group_size, on_links

ASSUMED = {
    "attention projections": 0.60,
    "attention scores": 0.40,
    "experts": 0.40,
    "dense ffn": 0.60,
    "head": 0.60,
    "router": 0.10,
}
"""Shares of the peak that matrix products are taken to reach: assumptions, not measurements."""
ASSUMED_MEMORY, ASSUMED_LINK, ASSUMED_HIDDEN = 0.80, 0.75, 0.80
"""Shares of the memory's and the links' bandwidth that are reached, and of compute time that hides communication."""
CALIBRATED = ("attention", "sparse", "dense", "head", "micro", "update", "link_bandwidth", "link_latency")


@dataclass(frozen=True)
class Rates:
    """What the machine achieves.

    Attributes:
        share: of the peak, by part.
        memory: share of the memory's bandwidth.
        link: share of a link's bandwidth.
        hidden: share of the compute time behind which communication hides where it overlaps.
        measured: by block (attention, sparse, dense, head) FLOP/s of whole blocks, norms and all; ``micro`` and
            ``update``: seconds an element of what ZeRO does for a micro-batch and for a step, the optimizer included;
            and where several ranks were measured, ``link_bandwidth`` and ``link_latency``, and then ``micro`` and
            ``update`` have ZeRO's communication in them. Empty without a calibration.
        measured_for: device, precision, ZeRO stage, offload, micro-batch, sequence and ranks of the calibration.
        source: where the rates come from.
    """

    share: Mapping[str, float] = field(default_factory=lambda: dict(ASSUMED))
    memory: float = ASSUMED_MEMORY
    link: float = ASSUMED_LINK
    hidden: float = ASSUMED_HIDDEN
    measured: Mapping[str, float] = field(default_factory=dict)
    measured_for: Mapping[str, Any] = field(default_factory=dict)
    source: str = "assumed"


@dataclass(frozen=True)
class Part:
    """A part of a step of one rank.

    Attributes:
        seconds: it adds to the step.
        bound: compute, memory, intra or inter (links), host, or measured.
        busy: seconds of communication, hidden ones included; equal to ``seconds`` for other parts.
    """

    name: str
    seconds: float
    bound: str
    busy: float


def read_rates(path: str) -> Rates:
    """The rates of a calibration's file.

    Raises:
        ConfigError: if the file holds none.
    """
    try:
        found: Any = json.loads(Path(path).read_text())
        rates = {name: float(found["rates"][name]) for name in CALIBRATED if name in found["rates"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = getattr(error, "strerror", None) or f"it is no calibration ({type(error).__name__})"
        problem = Problem("--calibration", f"{path}: {why}", "moe-scale bench --calibrate makes one")
        raise ConfigError(problem) from None
    missing = [name for name in ("attention", "head", "micro", "update") if not rates.get(name, 0) > 0]
    if missing or any(not value > 0 for value in rates.values()):
        what = f"{path} lacks a positive {', '.join(missing) or 'rate'}"
        raise ConfigError(Problem("--calibration", what, "moe-scale bench --calibrate makes one"))
    measured_for, source = found.get("layout"), f"measured: {found.get('device', 'unknown device')}, {path}"
    return Rates(measured=rates, measured_for=measured_for if isinstance(measured_for, dict) else {}, source=source)


def layout_of(subject: Subject) -> dict[str, Any]:
    """What measured rates hold for."""
    return {
        "device": "CPU" if subject.cluster.is_cpu else subject.cluster.device_name,
        "precision": subject.plan.precision,
        "zero_stage": subject.plan.stage,
        "offload_optimizer": subject.offloads("optimizer"),
        "micro_batch": subject.plan.micro_batch,
        "seq_len": subject.config.data.seq_len,
        "ranks": subject.world_size,
    }


def calibration_problems(subject: Subject, rates: Rates) -> list[Problem]:
    """In what a calibration differs from the run that is planned; its ranks count where what they send was measured."""
    if not rates.measured:
        return []
    planned = layout_of(subject)
    if "link_bandwidth" not in rates.measured:
        del planned["ranks"]
    return [
        Problem(
            "--calibration", f"measured with {name} {rates.measured_for.get(name)}, planned {value}", "calibrate anew"
        )
        for name, value in planned.items()
        if rates.measured_for.get(name) != value
    ]


def step_parts(subject: Subject, shapes: Shapes, flows: list[Flow], rates: Rates) -> list[Part]:
    """The parts of one optimizer step."""
    compute = _measured_blocks(subject, shapes, rates) if rates.measured else _assumed_parts(subject, shapes, rates)
    update = _update(subject, rates)
    behind = rates.hidden * sum(part.seconds for part in compute)
    return [*compute, *_communication(subject, shapes, flows, behind, rates), *update]


def flops(subject: Subject, s: Shapes) -> dict[str, float]:
    """FLOPs of a micro-batch of one rank, forward and backward pass, by part; recomputation included."""
    model, moe, tokens = s.model, s.moe, s.tokens
    passes = 4 if model.activation_checkpointing else 3
    sparse = sum(is_sparse(moe, layer) for layer in range(model.num_layers))
    inner = model.num_heads * model.head_width
    gates = {"none": 0, "headwise": model.num_heads, "elementwise": inner}[model.attention_gate]
    projections = model.d_model * (2 * inner + 2 * model.num_kv_heads * model.head_width + gates)
    visible = s.seq_len if s.masked else (s.seq_len + 1) / 2
    matrices = 3 if moe.activation == "swiglu" else 2
    dense_half = moe.intermediate_size if moe.residual else moe.shared_intermediate_size
    scores = {"hash": 0, "noisy": 2}.get(moe.router, 1)
    found = {
        "attention projections": 2 * tokens * projections * model.num_layers,
        "attention scores": 4 * tokens * inner * visible * model.num_layers,
        "experts": 2 * s.arrived * matrices * model.d_model * moe.intermediate_size * sparse,
        "router": 2 * tokens * model.d_model * moe.num_experts * scores * sparse,
        "dense ffn": 2 * tokens * model.d_model
        * (3 * dense_hidden(moe) * (model.num_layers - sparse) + matrices * dense_half * sparse),
    }  # fmt: skip
    found = {name: passes * count for name, count in found.items() if count}
    # The loss computes its gradients in its forward pass, and is not recomputed.
    return found | {"head": 3 * 2 * tokens * model.vocab_size * model.d_model}


def _assumed_parts(subject: Subject, s: Shapes, rates: Rates) -> list[Part]:
    cluster, model, micro = subject.cluster, s.model, subject.plan.grad_accum
    peak, bandwidth = cluster.peak(subject.plan.precision), cluster.memory_bandwidth * rates.memory
    weights = _weight_bytes(subject)
    parts = []
    for name, count in flops(subject, s).items():
        by_compute = count / (peak * rates.share[name])
        by_memory = 3 * weights.get(name, 0.0) / bandwidth  # read in both passes, and the gradient written
        seconds = micro * max(by_compute, by_memory)
        parts.append(Part(name, seconds, "compute" if by_compute >= by_memory else "memory", seconds))
    # Norms, rotations, activations, sums: what is kept is written once, read again, and so is its gradient.
    kept = sum(
        sum((attention(s) | (sparse_block(s) if is_sparse(s.moe, n) else dense_block(s))).values())
        for n in range(model.num_layers)
    )
    seconds = micro * kept * (6 if model.activation_checkpointing else 4) / bandwidth
    return [*parts, Part("elementwise", seconds, "memory", seconds)]


def _weight_bytes(subject: Subject) -> dict[str, float]:
    names = {"attention": "attention projections", "experts": "experts", "ffn": "dense ffn", "router": "router",
             "embedding": "head"}  # fmt: skip
    found: dict[str, float] = {}
    for p in subject.parameters:
        if p.part in names:
            found[names[p.part]] = found.get(names[p.part], 0.0) + p.numel * subject.bytes_per_value
    return found


def _measured_blocks(subject: Subject, s: Shapes, rates: Rates) -> list[Part]:
    """Whole blocks at the rates that they were measured at, everything in them included."""
    count, micro, moe = flops(subject, s), subject.plan.grad_accum, s.moe
    sparse = sum(is_sparse(moe, layer) for layer in range(s.model.num_layers))
    blocks = {"attention": count["attention projections"] + count["attention scores"], "head": count["head"]}
    if sparse:
        # The dense half of a sparse layer was measured with it.
        blocks["sparse"] = count["experts"] + count.get("router", 0.0)
        if moe.residual or moe.shared_intermediate_size:
            blocks["sparse"] += count["dense ffn"]
    else:
        blocks["dense"] = count["dense ffn"]
    if 0 < sparse < s.model.num_layers:
        raise ConfigError(Problem("--calibration", "with moe.every > 1", "calibrated plans have one kind of layers"))
    lacking = [name for name in blocks if name not in rates.measured]
    if lacking:
        what = f"it has no rate of {', '.join(lacking)} blocks"
        raise ConfigError(Problem("--calibration", what, "calibrate with the settings that are planned"))
    return [
        Part(name, micro * c / rates.measured[name], "measured", micro * c / rates.measured[name])
        for name, c in blocks.items()
    ]


def stepped_elements(subject: Subject) -> int:
    """Elements that one rank's optimizer steps."""
    return sum(subject.shard(p) if subject.plan.stage else p.numel for p in subject.parameters)


def _update(subject: Subject, rates: Rates) -> list[Part]:
    """Reducing, checking, clipping and applying the gradients that this rank steps."""
    elements = stepped_elements(subject)
    if rates.measured:
        micro = sum(p.numel for p in subject.parameters) * rates.measured["micro"] * subject.plan.grad_accum
        update = elements * rates.measured["update"]
        return [Part("gradients", micro, "measured", micro), Part("optimizer", update, "measured", update)]
    moved = 4 * (1 + 2 + 7) + subject.bytes_per_value  # norm; clip; step: four read, three written; the weights
    if subject.offloads("optimizer"):
        cluster = subject.cluster
        over = elements * (4 + subject.bytes_per_value) / cluster.host_bandwidth
        # A host's memory, shared by its ranks, at 0.3 TB/s: an assumption.
        seconds = over + elements * moved * cluster.devices_per_node / 3e11
        return [Part("optimizer on the host", seconds, "host", seconds)]
    seconds = elements * moved / (subject.cluster.memory_bandwidth * rates.memory)
    return [Part("optimizer", seconds, "memory", seconds)]


def flow_seconds(subject: Subject, flow: Flow, rates: Rates) -> tuple[float, str]:
    """Time of a flow alone (alpha-beta model), and the link that bounds it."""
    cluster: Cluster = subject.cluster
    link, ranks = on_links(subject, flow), group_size(subject, flow.group)
    seconds = link_seconds(
        cluster, rates, link.intra, link.inter, ranks=ranks, calls=flow.calls, crosses=link.inter > 0
    )
    crosses = link.inter / cluster.inter_bandwidth > link.intra / cluster.intra_bandwidth
    return float(seconds), "inter" if crosses and "link_bandwidth" not in rates.measured else "intra"


def link_seconds(
    cluster: Cluster, rates: Rates, intra: Any, inter: Any, *, ranks: int, calls: int, crosses: bool
) -> Any:
    """Time of bytes that a rank sends inside its node and to others, at once; of numbers or arrays of them.

    Args:
        intra, inter: bytes.
        ranks: of the group.
        calls: how often it is called.
        crosses: whether the group spans nodes.
    """
    if "link_bandwidth" in rates.measured:
        seconds = (intra + inter) / rates.measured["link_bandwidth"]
        return seconds + calls * rates.measured.get("link_latency", 0.0)
    # Rings and trees pipeline; the latency that counts grows with the logarithm of the ranks.
    latency = (cluster.inter_latency if crosses else cluster.intra_latency) * max(1, (ranks - 1).bit_length())
    slower = np.maximum(intra / (cluster.intra_bandwidth * rates.link), inter / (cluster.inter_bandwidth * rates.link))
    return slower + calls * latency


def _communication(subject: Subject, s: Shapes, flows: list[Flow], behind: float, rates: Rates) -> list[Part]:
    overlaps = bool(subject.zero.get("overlap_comm", subject.plan.stage == 3)) and not subject.cluster.is_cpu
    parts = []
    if "link_bandwidth" in rates.measured:  # ZeRO's own communication was measured with its work
        flows = [flow for flow in flows if flow.collective == "all_to_all"]
    for flow in flows:
        # An exchange is over when the fullest rank has its rows.
        uneven = s.arrived / s.rows if flow.purpose.startswith("tokens") else 1.0
        busy, link = flow_seconds(subject, replace(flow, payload=flow.payload * uneven), rates)
        can_hide = overlaps and flow.collective != "all_to_all" and "after the update" not in flow.purpose
        hidden = min(busy, behind) if can_hide else 0.0
        behind -= hidden
        parts.append(Part(f"{flow.collective}: {flow.purpose} ({flow.group})", busy - hidden, link, busy))
    return parts
