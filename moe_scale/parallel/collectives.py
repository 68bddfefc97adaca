"""Sums over all ranks, which are the identity where no process group is up; and a way to talk without the devices."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum over ranks as a new tensor; all ranks must call it together."""
    total = values.clone()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
    return total


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean over ranks as a new tensor; all ranks must call it together."""
    return sum_over_ranks(values) / (dist.get_world_size() if dist.is_initialized() else 1)


def any_over_ranks(flag: bool) -> bool:
    """Whether the flag is set on any rank; all ranks must call it together."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return flag
    found = torch.tensor(int(flag))
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=host_group())
    return bool(found)


def host_group() -> Any:
    """A group of all ranks that talks over the hosts' network: what is said there works where NCCL does not.

    None, which is the default group, where that one does so. Made once; all ranks must call it together the first time.
    """
    return None if dist.get_backend() == "gloo" else _gloo_beside(dist.group.WORLD)


@functools.lru_cache(maxsize=1)
def _gloo_beside(_: Any) -> Any:
    return dist.new_group(backend="gloo")
