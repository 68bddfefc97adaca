"""Everything that reaches into DeepSpeed, in one place.

ZeRO-3 together with expert parallelism rests on attributes that DeepSpeed's own AutoEP sets on its parameters and
that are no public promise. They are all here, written against one DeepSpeed version; :func:`check_version` refuses
another one loudly, because a change there would show as silently wrong gradients rather than as an error.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import Parameter

from moe_scale.errors import ConfigError, Problem
from moe_scale.parallel.groups import ParallelGroups
from moe_scale.parallel.rendezvous import check_address, telling_of_a_wait

DEEPSPEED_VERSION = "0.19.8"


def check_version() -> None:
    """Raise :class:`ConfigError` unless the installed DeepSpeed is the one that this module was written for."""
    import deepspeed

    found = deepspeed.__version__.split("+")[0]
    if found != DEEPSPEED_VERSION:
        raise ConfigError(
            Problem(
                "deepspeed",
                f"version {found} is installed",
                f"this release is tested with {DEEPSPEED_VERSION} alone: pip install deepspeed=={DEEPSPEED_VERSION}",
            )
        )


def zero_section_schema() -> Any:
    """DeepSpeed's own pydantic model of the ``zero_optimization`` section."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return DeepSpeedZeroConfig


def init_distributed(timeout_minutes: float = 30.0) -> None:
    """Bring up the default process group from RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; once per process.

    Args:
        timeout_minutes: that ranks wait for each other, now and in every collective.

    Raises:
        ConfigError: for an address that is none or taken, and when ranks have not come in time.
    """
    import deepspeed
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    _leave_out_the_compiler()
    # On a CPU, DeepSpeed compiles a shared-memory collective on first use: one to two silent minutes, and a compiler
    # on PATH, for what gloo does as well at these sizes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if deepspeed.comm.is_initialized():
        return
    check_address()
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu" and accelerator.device_count() > 1:
        # Before the first collective: object collectives put their tensors on the current device. A rank that sees
        # one device alone (srun --gpus-per-task=1) has nothing to choose.
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        with telling_of_a_wait():
            deepspeed.init_distributed(
                timeout=datetime.timedelta(minutes=timeout_minutes), auto_mpi_discovery=False, verbose=False
            )
    except (torch.distributed.DistNetworkError, torch.distributed.DistStoreError) as error:
        raise ConfigError(_who_did_not_meet(error, timeout_minutes)) from None


def _who_did_not_meet(error: Exception, timeout_minutes: float) -> Problem:
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if "EADDRINUSE" in str(error):
        what, instead = f"port {port} is taken", "choose another with --master_port"
        return Problem("MASTER_PORT", what, instead, this_host_only=True)
    what = f"not all {os.environ['WORLD_SIZE']} ranks came to {address}:{port} within {timeout_minutes:g} minutes"
    return Problem("MASTER_ADDR", what, "are all hosts up, and does each reach the first?", this_host_only=True)


def _leave_out_the_compiler() -> None:
    """Import DeepSpeed's Muon as plain functions.

    ZeRO's engine imports that module whatever the optimizer is, and its functions are decorated by ``torch.compile``,
    which loads the whole compiler: seconds at the start of every rank, for an optimizer that no run here can choose.
    """
    with mock.patch.object(torch, "compile", lambda function=None, **_: function or (lambda f: f)):
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")


def make_groups(ep_size: int) -> ParallelGroups:
    """The process groups of a run: the expert and expert-data groups for ``ep_size``, created once.

    All ranks must call it together, before the model is built.
    """
    from deepspeed import comm
    from deepspeed.utils import groups

    # The groups of hpZ are a global of DeepSpeed, where an earlier run of this process has left its own.
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    world_size, rank = comm.get_world_size(), comm.get_rank()
    if ep_size == 1:
        return ParallelGroups(world_size, rank)
    name = _group_name(ep_size)
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(ep_size)
    expert = groups._get_expert_parallel_group(name)
    return ParallelGroups(
        world_size, rank, ep_size, comm.get_rank(group=expert), expert, groups._get_expert_data_parallel_group(name)
    )


def mark_expert_parameters(parameters: Iterable[Parameter], groups: ParallelGroups) -> None:
    """Declare parameters to hold this rank's experts only, so that ZeRO-3 shards them over the expert-data group.

    Call it inside the ``__init__`` of the module that creates the parameters: ``zero.Init`` shards them when that
    ``__init__`` returns, and whatever is marked later has by then become a copy of rank 0's experts, with no error.
    """
    if groups.ep_size == 1:
        return  # every rank holds every expert: ordinary parameters, at every ZeRO stage
    name = _group_name(groups.ep_size)
    attributes = {
        "allreduce": False,
        "group_name": name,
        "ds_zero_partition_group_name": name,
        "ds_zero_placement_family": "autoep_expert",
        "ds_zero_partition_process_group": groups.expert_data,
    }
    for parameter in parameters:
        for attribute, value in attributes.items():
            setattr(parameter, attribute, value)


def is_expert_parallel(parameter: Parameter) -> bool:
    """Whether :func:`mark_expert_parameters` (or AutoEP) marked the parameter."""
    return not getattr(parameter, "allreduce", True)


def expert_group_name(parameter: Parameter) -> str:
    """DeepSpeed's name of the groups that share an expert-parallel parameter; empty for any other parameter."""
    return str(getattr(parameter, "group_name", "")) if is_expert_parallel(parameter) else ""


def set_expert_group(moe_layer: Any, groups: ParallelGroups) -> None:
    """Give a ``deepspeed.moe`` ``MOELayer`` its expert-parallel group, as ``deepspeed.moe.layer.MoE`` would."""
    if groups.ep_size > 1:
        moe_layer._set_ep_group(groups.expert)


def has_tutel() -> bool:
    """Whether Tutel is importable, whose kernels ``deepspeed.moe`` can use."""
    from deepspeed.moe import sharded_moe

    return bool(sharded_moe.TUTEL_INSTALLED)


@contextlib.contextmanager
def sharded_construction(ds_json: Mapping[str, Any], *, enabled: bool) -> Iterator[None]:
    """Build modules inside this context with their parameters sharded as soon as each ``__init__`` returns."""
    if not enabled:
        yield
        return
    import deepspeed

    with deepspeed.zero.Init(config_dict_or_path=dict(ds_json)):
        yield


def full_shape(parameter: Parameter) -> torch.Size:
    """The parameter's shape before ZeRO-3 sharded it (for an expert-parallel one: this rank's experts)."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


@torch.no_grad()
def set_values(parameter: Parameter, values: torch.Tensor) -> None:
    """Give a parameter its values, whether it is sharded or whole. Of a parameter of an engine, training reads others.

    Args:
        values: of all of it (of an expert-parallel one: of this rank's experts), in its shape or flattened.
    """
    shard: Any = getattr(parameter, "ds_tensor", None)
    if shard is None:
        if not parameter.is_meta:
            parameter.copy_(values.view_as(parameter))
        return
    start = torch.distributed.get_rank(group=parameter.ds_process_group) * shard.ds_numel  # type: ignore[attr-defined]
    mine = values.reshape(-1)[start : start + shard.ds_numel]  # the last shards are padded
    shard.view(-1)[: len(mine)].copy_(mine)


def full_values(parameter: Parameter) -> torch.Tensor:
    """A copy of a parameter's values on the host, gathered where it is sharded; the ranks that share it together."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_tensor")):
        return parameter.detach().to("cpu", copy=True)


def all_values(parameter: Parameter) -> torch.Tensor:
    """As :func:`full_values`, but of an expert-parallel parameter those of all experts; all ranks together."""
    values = full_values(parameter)
    if not is_expert_parallel(parameter):
        return values
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import groups

    group = groups._get_expert_parallel_group(expert_group_name(parameter))
    mine = values.to(get_accelerator().current_device_name())
    parts = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(parts, mine, group=group)
    return torch.cat(parts).cpu()


def squared_grad_norms(
    engine: Any, parts: Mapping[str, list[Parameter]], stage: int, groups: ParallelGroups
) -> dict[str, float]:
    """Squared L2 norm of the global gradient of each part of the model, every expert counted once.

    Call it between ``backward`` and ``step`` of the last micro-batch of a step, on all ranks. Gradients are those
    that the optimizer is about to see: averaged over the data-parallel ranks, before clipping, loss scale undone.
    """
    from deepspeed import comm
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import safe_get_full_grad, safe_get_local_grad

    scale = loss_scale(engine)
    device = get_accelerator().current_device_name()
    sums = torch.zeros(len(parts), dtype=torch.float64, device=device)
    for index, parameters in enumerate(parts.values()):
        for parameter in parameters:
            if stage == 3:  # this rank's shard; what pads the last one is zero
                gradient, copies = safe_get_local_grad(parameter), 1
            else:
                gradient = safe_get_full_grad(parameter)
                copies = groups.world_size // (groups.ep_size if is_expert_parallel(parameter) else 1)
            if gradient is not None:
                sums[index] += squared_norm(gradient) / copies
    comm.all_reduce(sums)
    sums /= scale**2
    return dict(zip(parts, sums.tolist(), strict=True))


def squared_norm(values: Tensor) -> Tensor:
    """The squared L2 norm, added up in fp64 piece by piece: a wider copy of all experts would not fit beside them."""
    pieces = values.detach().reshape(-1).split(2**22)
    return torch.stack([piece.double().square().sum() for piece in pieces]).sum()


def last_step_was_skipped(engine: Any) -> bool:
    """Whether the last optimizer step was left out because of an fp16 overflow."""
    return bool(getattr(engine.optimizer, "overflow", False))


def loss_scale(engine: Any) -> float:
    """The factor that fp16 training multiplies the loss with; 1 in other precisions."""
    return float(getattr(engine.optimizer, "loss_scale", 1.0) or 1.0)


def _group_name(ep_size: int) -> str:
    return f"ep_size_{ep_size}"
