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


def mean_of_all(total: Tensor, count: Tensor) -> Tensor:
    """A mean over the rows of all ranks, from this rank's sum and number of rows; all ranks must call it together.

    What comes back is this rank's share of it, times the number of ranks: the mean over ranks, of values and of
    gradients as data parallelism takes it, is that of the rows joined, however unevenly they are spread.

    Args:
        total: the sum over this rank's rows, with a gradient.
        count: of this rank's rows.
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    return total * ranks / sum_over_ranks(count.detach().float()).clamp(min=1)


def all_gather_rows(x: Tensor) -> Tensor:
    """The rows of all ranks in their order, [W * B, ...] of [B, ...]; all ranks must call it together.

    Carries gradients: that of a row is the sum of what all ranks make of it. Every rank gives as many rows.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    found: Tensor = _AllGatherRows.apply(x)
    return found


class _AllGatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        # A sum of which each rank takes its part; gloo has no reduce-scatter of every type.
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


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
