"""Bytes of a rank's model states: weights, master weights, moments and gradients, as DeepSpeed 0.19.8 holds them.

Each rule was read in DeepSpeed's optimizers and is held against the tensors of real ranks by
``tests/distributed/test_planner.py``:

=======================  ==========================================================================================
stage 3                  flat buffers of the shards in the training precision, in fp32 and of the gradients; parameters
                         up to ``stage3_param_persistence_threshold`` also whole; one bucket of gradients
stages 1 and 2           all weights in a flat buffer a parameter group, padded to twice the ranks; one rank's part of
                         it in fp32; of the gradients those of the parameters that this part touches, or where
                         micro-batches are added up in fp32 the part's. Before that, stage 1 keeps all gradients
                         through the micro-batches of a step, and so it does without ``overlap_comm``
stage 1 in bf16 that     the same, and all gradients in fp32 (``BF16_Optimizer``)
accumulates in fp32
stage 0                  everything, with a copy of the weights in fp32 when they are not
=======================  ==========================================================================================

Units: bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from moe_scale.planner.gathering import is_persistent, setting
from moe_scale.planner.model import BYTES, Parameter, Subject

BLOCK_8BIT, LEAST_8BIT = 256, 4096
"""bitsandbytes: values that share a scale, and the least elements of a tensor whose moments are 8-bit."""

Moment = Literal["between steps", "in passes", "at update"]
"""When a rank's bytes are counted: between two steps, at most during forward and backward pass, before the update."""

GRADIENTS: dict[Moment, str] = {
    "between steps": "gradients",
    "in passes": "gradients_in_passes",
    "at update": "gradients_at_update",
}


@dataclass
class States:
    """What a rank holds of the model from step to step, and shortly before and during the update.

    Attributes:
        weights: in the training precision: shards, or all.
        whole: parameters that stage 3 keeps gathered.
        master: fp32 weights that the optimizer steps.
        moments: the optimizer's state.
        gradients: held through a whole step.
        gradients_in_passes: the same during forward and backward pass, at most.
        gradients_at_update: the same between the last backward pass and the update.
        host_gradients: fp32 gradients and staging buffers that an offloaded optimizer keeps.
        staging: a buffer for gradients on their way to the host, on the device.
        bucket: of gradients on their way, held throughout.
        passing_bucket: the same, held during forward and backward pass only.
        update: temporaries of the optimizer's step, at most.
        on_host: which of these names are in host memory.
    """

    weights: int = 0
    whole: int = 0
    master: int = 0
    moments: int = 0
    gradients: int = 0
    gradients_in_passes: int = 0
    gradients_at_update: int = 0
    host_gradients: int = 0
    staging: int = 0
    bucket: int = 0
    passing_bucket: int = 0
    update: int = 0
    on_host: set[str] = field(default_factory=set)

    @property
    def at_update(self) -> int:
        """All that is held shortly before the update, on device and host."""
        return self._always + self.gradients_at_update

    @property
    def between_steps(self) -> int:
        """All that is held between two steps, on device and host."""
        return self._always + self.gradients

    @property
    def _always(self) -> int:
        shards = self.weights + self.whole + self.master + self.moments
        return shards + self.host_gradients + self.staging + self.bucket

    def on(self, host: bool, moment: Moment = "at update") -> dict[str, int]:
        """Bytes by name in host memory, or in the device's."""
        always = ("weights", "whole", "master", "moments")
        names = (*always, GRADIENTS[moment], "host_gradients", "staging", "bucket")
        return {name: getattr(self, name) for name in names if (name in self.on_host) == host and getattr(self, name)}


def model_states(subject: Subject, rank: int | None = None) -> States:
    """The model states of ``rank``, by default of the rank that holds most."""
    stage = subject.plan.stage
    if stage == 3:
        return _stage_3(subject)
    if stage == 0:
        return _stage_0(subject)
    return _stages_1_and_2(subject, rank)


def grad_accum_bytes(subject: Subject) -> int:
    """Bytes of one number in which gradients are added up."""
    dtype = subject.plan.json.get("data_types", {}).get("grad_accum_dtype")
    return BYTES[dtype] if dtype else subject.bytes_per_value


def communication_bytes(subject: Subject) -> int:
    """Bytes of one number of a gradient while ranks reduce it."""
    dtype = subject.plan.json.get("communication_data_type")
    return BYTES[dtype] if dtype else subject.bytes_per_value


def moment_bytes(subject: Subject, numel: int) -> int:
    """The optimizer's state of one flat tensor."""
    if subject.config.optim.name == "adamw" or numel < LEAST_8BIT:
        return 8 * numel
    return 2 * (numel + 4 * math.ceil(numel / BLOCK_8BIT))


def groups(subject: Subject) -> list[list[Parameter]]:
    """Parameters by optimizer group."""
    found: dict[int, list[Parameter]] = {}
    for parameter in subject.parameters:
        found.setdefault(parameter.group, []).append(parameter)
    return [found[number] for number in sorted(found)]


def sub_groups(subject: Subject) -> list[list[Parameter]]:
    """Stage 3 steps parameters in sub-groups, each closed when it has ``sub_group_size`` elements."""
    limit, found = setting(subject, "sub_group_size"), []
    for group in groups(subject):
        if sum(map(subject.shard, group)) <= limit:
            found.append(group)
            continue
        current: list[Parameter] = []
        for parameter in group:
            current.append(parameter)
            if sum(map(subject.shard, current)) >= limit:
                found.append(current)
                current = []
        found += [current] if current else []
    return found


def _stage_3(subject: Subject) -> States:
    size = subject.bytes_per_value
    flat = [sum(map(subject.shard, group)) for group in sub_groups(subject)]
    shards = sum(flat)
    bucket = 0
    if subject.zero.get("contiguous_gradients", True):
        bucket = setting(subject, "reduce_bucket_size") * communication_bytes(subject)
    gradients = shards * grad_accum_bytes(subject)
    states = States(
        weights=shards * size,
        whole=sum(
            subject.shard(p) * subject.shard_ranks(p) * size
            for p in subject.parameters
            if is_persistent(subject, p) and subject.shard_ranks(p) > 1  # alone, the shard is the whole
        ),
        master=shards * 4,
        moments=sum(moment_bytes(subject, numel) for numel in flat),
        gradients=gradients,
        gradients_in_passes=gradients,
        gradients_at_update=gradients,
        bucket=bucket,
        update=4 * max(flat),
    )
    if subject.offloads("optimizer"):
        states.host_gradients = 4 * shards
        states.on_host |= {"master", "moments", *GRADIENTS.values(), "host_gradients"}
    if subject.offloads("param"):
        states.on_host.add("weights")
    return states


def _stage_0(subject: Subject) -> States:
    size, numel = subject.bytes_per_value, sum(p.numel for p in subject.parameters)
    return States(
        weights=numel * size,
        master=0 if size == 4 else 4 * numel,
        moments=sum(moment_bytes(subject, p.numel) for p in subject.parameters),
        gradients_in_passes=numel * size,
        gradients_at_update=numel * size,
        update=numel * size if size == 4 else 4 * numel,  # the flattened all-reduce; or fp32 gradients
    )


def flat_numel(subject: Subject, group: Sequence[Parameter]) -> int:
    """Elements of a parameter group's flat buffer at stages 1 and 2: padded so that ranks get equal even parts."""
    alignment = 2 * subject.shard_ranks(group[0])
    return math.ceil(sum(p.numel for p in group) / alignment) * alignment


def uses_bf16_optimizer(subject: Subject) -> bool:
    """Whether DeepSpeed takes its ``BF16_Optimizer`` at stage 1."""
    plan = subject.plan
    return (
        plan.stage == 1
        and plan.precision == "bf16"
        and grad_accum_bytes(subject) == 4
        and not subject.offloads("optimizer")
    )


def _stages_1_and_2(subject: Subject, rank: int | None) -> States:
    size = subject.bytes_per_value
    states = States()
    for group in groups(subject):
        flat = flat_numel(subject, group)
        part = flat // subject.shard_ranks(group[0])
        states.weights += flat * size
        states.master += part * 4
        states.moments += moment_bytes(subject, part)
        states.update += 4 * part
    if uses_bf16_optimizer(subject):
        numel = sum(p.numel for p in subject.parameters)
        states.gradients = sum(flat_numel(subject, group) for group in groups(subject)) * 4
        states.gradients_at_update = states.gradients_in_passes = states.gradients + numel * size
        return states
    if subject.offloads("optimizer"):
        # The fp32 gradient, the part in 16 bits, and two buffers of the largest parameter, one of them on the device.
        states.staging = max(p.numel for p in subject.parameters) * size
        states.host_gradients = states.master + states.master // 4 * size + states.staging
        states.on_host |= {"master", "moments", "host_gradients"}
    _add_gradients(subject, states, range(subject.world_size) if rank is None else [rank])
    return states


def _add_gradients(subject: Subject, states: States, ranks: Iterable[int]) -> None:
    """Gradients of ``DeepSpeedZeroOptimizer`` at stages 1 and 2, of that of the ranks which holds most.

    Those that are added up in fp32 while weights have 16 bits are in a flat buffer of the rank's part, on the device
    even where the optimizer is not; others are those of the parameters that the part touches. Stage 1 reduces in the
    last micro-batch only, so that all gradients wait for it, and without ``overlap_comm`` for its backward pass's end.
    """
    size, accum, micro_batches = subject.bytes_per_value, grad_accum_bytes(subject), subject.plan.grad_accum
    overlaps, in_fp32 = bool(subject.zero.get("overlap_comm")), accum != size
    stage_1, offload = subject.plan.stage == 1, subject.offloads("optimizer")
    bucket, buckets = setting(subject, "reduce_bucket_size"), 2 if overlaps else 1
    own = accum if stage_1 and in_fp32 else size  # bytes of a gradient on its way
    if subject.zero.get("contiguous_gradients", True) or offload:
        states.passing_bucket = buckets * bucket * own
    numel = sum(p.numel for p in subject.parameters)
    oversized = sum(p.numel for p in subject.parameters if p.numel > bucket)  # reduced where they are
    touched = max(sum(p.numel for p in _touched(subject, rank)) for rank in ranks) * size
    added_up = micro_batches > 1 and not stage_1 and not in_fp32
    if in_fp32:
        states.gradients_at_update = states.master
    elif not offload:
        states.gradients_at_update = touched
    states.gradients_in_passes = states.gradients_at_update
    if added_up and offload:
        states.host_gradients += touched
    elif added_up:
        states.gradients_in_passes += touched  # those so far, and those of this micro-batch
    if stage_1:
        states.gradients_in_passes += (numel if micro_batches > 1 or not overlaps else oversized) * own
    if stage_1 and in_fp32:  # until the next forward pass the gradients refer to the buckets that they went through
        used = min(buckets, math.ceil((numel - oversized) / bucket)) * bucket
        mine = min(sum(p.numel for p in _touched(subject, rank) if p.numel > bucket) for rank in ranks)
        states.gradients_at_update += (used + oversized - mine) * accum


def _touched(subject: Subject, rank: int) -> Iterator[Parameter]:
    """The parameters that a rank's parts of the flat buffers touch."""
    for group in groups(subject):
        part = flat_numel(subject, group) // subject.shard_ranks(group[0])
        first, last, start = rank * part, (rank + 1) * part, 0
        for parameter in group:
            if start < last and start + parameter.numel > first:
                yield parameter
            start += parameter.numel
