"""Where DeepSpeed keeps the state of training: which part of which parameter, and in which tensor.

With :mod:`moe_scale.parallel.zero`, the only files that use DeepSpeed's private names; the version check there covers
both. Every ZeRO stage flattens and cuts parameters in its own way. What they have in common is described by
:class:`Held`: a contiguous stretch of one flattened parameter lies in a 1-D *master* tensor that the inner optimizer
(torch's or bitsandbytes' AdamW) steps, and whose moments have the same layout.

=============================  ===========================================================================
stage 3                        a master a sub-group; of each parameter the shard of this rank
stages 1 and 2                 a master a parameter group; parameters end to end, cut where the ranks meet
stage 0, bf16 or fp16          an fp32 copy of each parameter, the same on every rank
stage 0, fp32                  the parameters themselves
=============================  ===========================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from moe_scale.errors import ConfigError, Problem
from moe_scale.parallel import zero
from moe_scale.parallel.collectives import host_group

WRAPPERS = ("DeepSpeedZeroOptimizer_Stage3", "DeepSpeedZeroOptimizer", "BF16_Optimizer", "FP16_UnfusedOptimizer")
"""DeepSpeed's optimizers that this file knows, besides torch's own."""

_COUNTED = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What a dynamic loss scaler counts; everything else in it is settings, which are the run's own."""


@dataclass(frozen=True)
class Held:
    """Elements ``start`` to ``start + length`` of a flattened parameter (an expert-parallel one: of this rank's part).

    Attributes:
        name: of the parameter in the engine's module.
        parameter: the parameter.
        start, length: the stretch, in elements.
        master: what the inner optimizer steps, any shape; None for a frozen parameter.
        values: the stretch itself as a 1-D view: of the master, or of a frozen parameter.
        offset: of the stretch in the flattened master.
        writer: whether this rank writes the stretch into a checkpoint; replicas leave it to one of them.
    """

    name: str
    parameter: Parameter
    start: int
    length: int
    master: Tensor | None
    values: Tensor
    offset: int
    writer: bool


def held_state(engine: Any) -> list[Held]:
    """Everything that this rank holds of the training state, in the order of the module's parameters."""
    return [held for held in _all_held(engine) if held.length > 0]


def squared_weight_norms(engine: Any, label: Callable[[str], Hashable]) -> dict[Any, float]:
    """Squared L2 norms of the weights under each label, every element counted once; all ranks together.

    Args:
        label: of a parameter, by its name in the engine's module.
    """
    labels = list(dict.fromkeys(label(name) for name, _ in engine.module.named_parameters()))
    sums = torch.zeros(len(labels), dtype=torch.float64)
    for held in held_state(engine):
        if held.writer:
            sums[labels.index(label(held.name))] += zero.squared_norm(held.values).cpu()
    torch.distributed.all_reduce(sums, group=host_group())
    return dict(zip(labels, sums.tolist(), strict=True))


def inner_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The optimizer inside DeepSpeed's wrapper, or itself where there is no wrapper."""
    optimizer = engine.optimizer
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer


def refresh_parameters(engine: Any) -> None:
    """Bring what the forward pass reads up to the masters, after these were changed; all ranks together."""
    optimizer, kind = engine.optimizer, _kind_of(engine.optimizer)
    if kind == "DeepSpeedZeroOptimizer_Stage3":
        # The order of the optimizer's own step: small parameters are kept whole on every rank, and are gathered anew.
        optimizer.invalidate_secondary_tensor()  # the copies of hpZ, which would be read instead
        optimizer._partition_all_parameters()
        for sub_group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif kind in ("DeepSpeedZeroOptimizer", "BF16_Optimizer"):
        optimizer.update_lp_params()
    elif kind == "FP16_UnfusedOptimizer":
        for masters, parameters in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
            for master, parameter in zip(masters, parameters, strict=True):
                parameter.data.copy_(master.data)


def optimizer_state(engine: Any, master: Tensor) -> dict[str, Any]:
    """What the inner optimizer keeps for a master; made as before a first step where there is nothing yet."""
    inner = inner_optimizer(engine)
    if not inner.state[master]:
        # Of the group, only what is the same in all of them is read. The masters are not always in theirs: stage 3 puts
        # one at a time there, for its step.
        group = inner.param_groups[0]
        if hasattr(inner, "init_state"):  # bitsandbytes
            listed, group["params"] = group["params"], [master]
            inner.init_state(group, master, 0, 0)
            group["params"] = listed
        else:
            on_device = group.get("fused") or group.get("capturable")
            inner.state[master] = {
                "step": torch.zeros((), device=master.device if on_device else "cpu"),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }
    return inner.state[master]


def gradients_are_finite(engine: Any) -> bool:
    """Whether this rank's share of the step's gradients has neither NaN nor infinity. After the last backward pass."""
    gradients = [gradient for gradient in _local_gradients(engine) if gradient is not None and gradient.numel()]
    if not gradients:
        return True
    norms = torch._foreach_norm(gradients)
    return bool(torch.stack([norm.float() for norm in norms]).isfinite().all())


def _local_gradients(engine: Any) -> list[Tensor | None]:
    optimizer, kind = engine.optimizer, _kind_of(engine.optimizer)
    if hasattr(optimizer, "_wait_for_offload_copies"):
        optimizer._wait_for_offload_copies()  # on their way to the host, which is about to look at them
    if kind in ("DeepSpeedZeroOptimizer_Stage3", "DeepSpeedZeroOptimizer"):
        found = [gradient for group in optimizer.averaged_gradients.values() for gradient in group or []]
        on_host = "fp32_partitioned_groups_flat" if kind.endswith("3") else "single_partition_of_fp32_groups"
        return found or [master.grad for master in getattr(optimizer, on_host)]
    if kind == "BF16_Optimizer":
        return list(optimizer.fp32_groups_gradients_flat)
    return [parameter.grad for parameter in engine.module.parameters()]


def step_without_update(engine: Any) -> None:
    """``engine.step()`` that leaves parameters, moments and learning rate as they are, and forgets the gradients.

    It counts as one of ``engine.skipped_steps``.

    What a wrapper has to clean up after a backward pass differs by ZeRO stage; letting it run its own step over an
    optimizer that does nothing covers all of them.
    """
    inner: Any = inner_optimizer(engine)
    schedule, skipped = engine.lr_scheduler, engine.skipped_steps
    scale = loss_scaler_state(engine)
    step = inner.step
    inner.step, engine.lr_scheduler = lambda *_, **__: None, None
    try:
        engine.step()
    finally:
        inner.step, engine.lr_scheduler = step, schedule
        engine.skipped_steps = skipped + 1  # in fp16, DeepSpeed has counted it already
        set_loss_scaler_state(engine, scale)  # what was wrong is no matter of the scale


def loss_scaler_state(engine: Any) -> dict[str, float] | None:
    """The numbers that dynamic loss scaling goes by; None in other precisions than fp16."""
    scaler = _loss_scaler(engine)
    return None if scaler is None else {k: v for k, v in vars(scaler).items() if k in _COUNTED}


def set_loss_scaler_state(engine: Any, state: dict[str, float] | None) -> None:
    """Put back what :func:`loss_scaler_state` gave; nothing happens unless both runs scale their loss."""
    scaler = _loss_scaler(engine)
    if scaler is not None and state is not None:
        vars(scaler).update({k: v for k, v in state.items() if k in vars(scaler) and k in _COUNTED})


def set_step_counts(engine: Any, *, steps: int, schedule_steps: int, skipped: int) -> None:
    """Set the engine's counters and the learning-rate schedule as after so many steps."""
    engine.global_steps, engine.skipped_steps = steps, skipped
    engine.global_samples = steps * engine.train_batch_size()
    engine.micro_steps = steps * engine.gradient_accumulation_steps()
    schedule = engine.lr_scheduler
    schedule.last_epoch = schedule_steps
    factors = [factor(schedule_steps) for factor in schedule.lr_lambdas]
    schedule._last_lr = [base * factor for base, factor in zip(schedule.base_lrs, factors, strict=True)]
    for group, lr in zip(schedule.optimizer.param_groups, schedule._last_lr, strict=True):
        group["lr"] = lr


def _loss_scaler(engine: Any) -> Any:
    """What counts for a dynamic loss scale; None for a fixed one, and in other precisions."""
    if not engine.fp16_enabled() or not engine.dynamic_loss_scale():
        return None
    optimizer = engine.optimizer
    return optimizer.loss_scale_config if _kind_of(optimizer) == "FP16_UnfusedOptimizer" else optimizer.loss_scaler


def _kind_of(optimizer: Any) -> str:
    """The name of DeepSpeed's wrapper, ``torch`` for none. One that is not known here must not pass for another."""
    if isinstance(optimizer, torch.optim.Optimizer):
        return "torch"
    kind = type(optimizer).__name__
    if kind not in WRAPPERS:
        raise ConfigError(
            Problem(
                "deepspeed_config", f"it makes DeepSpeed use {kind}, whose state cannot be saved", f"use {WRAPPERS}"
            )
        )
    return kind


def _all_held(engine: Any) -> Iterator[Held]:
    optimizer, parameters = engine.optimizer, list(engine.module.named_parameters())
    kind = _kind_of(optimizer)
    if kind == "DeepSpeedZeroOptimizer_Stage3":
        for name, parameter in parameters:
            yield _held_at_stage_3(optimizer, name, parameter)
        return
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    masters = _masters_by_parameter(optimizer)
    for index, (name, parameter) in enumerate(parameters):
        is_turn = index % world_size == rank  # replicas share the writing
        if not parameter.requires_grad:
            yield Held(name, parameter, 0, parameter.numel(), None, parameter.detach().view(-1), 0, is_turn)
        elif kind in ("DeepSpeedZeroOptimizer", "BF16_Optimizer"):
            yield from _held_at_stage_1_or_2(optimizer, name, parameter)
        else:
            master = masters.get(parameter, parameter)
            yield Held(name, parameter, 0, parameter.numel(), master, master.detach().view(-1), 0, is_turn)


def _held_at_stage_3(optimizer: Any, name: str, parameter: Parameter) -> Held:
    shard: Any = parameter.ds_tensor  # type: ignore[attr-defined]
    full: int = parameter.ds_numel  # type: ignore[attr-defined]
    start = torch.distributed.get_rank(group=parameter.ds_process_group) * shard.ds_numel  # type: ignore[attr-defined]
    length = min(shard.ds_numel, full - start)  # the last shards are padded
    if not parameter.requires_grad:
        return Held(name, parameter, start, length, None, shard.view(-1)[: max(length, 0)], 0, True)
    sub_group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
    master = optimizer.fp32_partitioned_groups_flat[sub_group]
    values = master.detach()[offset : offset + max(length, 0)]
    return Held(name, parameter, start, length, master, values, offset, True)


def _held_at_stage_1_or_2(optimizer: Any, name: str, parameter: Parameter) -> Iterator[Held]:
    mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return  # all of it is on other ranks
    flat = getattr(optimizer, "single_partition_of_fp32_groups", None) or optimizer.fp32_groups_flat_partition
    start, length = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
    offset = mapping.hp_fragment_address.start
    master = flat[mapping.param_group_index]
    yield Held(name, parameter, start, length, master, master.detach()[offset : offset + length], offset, True)


def _masters_by_parameter(optimizer: Any) -> dict[Parameter, Tensor]:
    """The fp32 copies that stage 0 keeps in bf16 and fp16; nothing elsewhere."""
    if _kind_of(optimizer) != "FP16_UnfusedOptimizer":
        return {}
    pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    return {
        parameter: master
        for parameters, masters in pairs
        for parameter, master in zip(parameters, masters, strict=True)
    }
