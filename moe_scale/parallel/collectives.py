"""Sums over all ranks, which are the identity where no process group is up."""

from __future__ import annotations

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
