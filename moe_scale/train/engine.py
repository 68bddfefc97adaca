"""The one place that starts DeepSpeed's engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moe_scale.config import RunConfig
from moe_scale.moe.backends.autoep import ds_section
from moe_scale.parallel import zero
from moe_scale.parallel.device import Device, current
from moe_scale.parallel.ds_json import DeepSpeedPlan
from moe_scale.train.optim import build_optimizer, build_schedule


def build_engine(build_model: Callable[[], nn.Module], config: RunConfig, plan: DeepSpeedPlan, device: Device) -> Any:
    """Build the model, sharded from the start under ZeRO-3, and wrap it into a DeepSpeed engine.

    Args:
        build_model: makes the model on every rank.
        config: the run's settings.
        plan: the checked DeepSpeed configuration.
        device: this rank's device.

    Returns:
        the engine; ``engine.module`` is the model.
    """
    import deepspeed

    torch.backends.cuda.matmul.allow_tf32 = True  # also read by ROCm; without effect elsewhere
    torch.backends.cudnn.allow_tf32 = True
    ds_json = dict(plan.json)
    if config.moe.enabled and config.moe.backend == "autoep":
        ds_json["expert_parallel"] = ds_section(config.moe, on_cpu=device.is_cpu)

    # On the device at every stage, as zero.Init does: a generator draws other numbers on another kind of device.
    with torch.device(current()), zero.sharded_construction(ds_json, enabled=plan.stage == 3 and config.zero_init):
        model = build_model()
    # Callables, because AutoEP swaps modules first and the optimizer must hold what is then there.
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=lambda _: build_optimizer(model, config.optim, fused=not device.is_cpu and not plan.offload),
        lr_scheduler=lambda optimizer: build_schedule(optimizer, config),
        config=ds_json,
        dist_init_required=False,
    )
    return engine
