"""How fast the groups of a run move bytes: an all-reduce and an all-to-all, timed before the first step.

Rates are bus bandwidths: bytes that a rank sends, as a ring would, per second. They are what a link carries, and do not
fall with the number of ranks where the links are equally fast (the convention of nccl-tests, PERFORMANCE.md)::

    all-reduce   2 (n - 1) / n * bytes / seconds
    all-to-all     (n - 1) / n * bytes / seconds
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

# Bound here: who counts the bytes of a run replaces the names of torch.distributed, and a measurement is no part of it.
from torch.distributed import all_reduce, all_to_all_single

from moe_scale.parallel.device import accelerator, current
from moe_scale.parallel.groups import ParallelGroups

MESSAGE_BYTES = {"cpu": 2**22}
ACCELERATOR_MESSAGE_BYTES = 2**26
ROUNDS = 3


@dataclass(frozen=True)
class GroupRate:
    """Bus bandwidth of one kind of group.

    Attributes:
        name: ``world``, ``expert`` or ``expert-data``.
        size: ranks of such a group.
        count: how many there are; they are measured at the same time, as they are used.
        all_reduce: bytes per second of the slowest rank.
        all_to_all: the same.
    """

    name: str
    size: int
    count: int
    all_reduce: float
    all_to_all: float


def measure(groups: ParallelGroups) -> list[GroupRate]:
    """Time the groups that have more than one rank. All ranks call it together; every rank gets the same figures."""
    world = groups.world_size
    kinds: list[tuple[str, Any, int]] = [
        ("world", None, world),
        ("expert", groups.expert, groups.ep_size),
        ("expert-data", groups.expert_data, world // groups.ep_size),
    ]
    return [
        _rate(name, group, size, world // size)
        for name, group, size in kinds
        if size > 1 and (name == "world" or group is not None)
    ]


def _rate(name: str, group: Any, size: int, count: int) -> GroupRate:
    device = current()
    num_bytes = MESSAGE_BYTES.get(device.type, ACCELERATOR_MESSAGE_BYTES)
    sent = torch.zeros(num_bytes // 4 // size * size, device=device)  # zeros: whatever is added, they stay finite
    received = torch.empty_like(sent)
    seconds = torch.tensor(
        [
            _time(lambda: all_reduce(sent, group=group)),
            _time(lambda: all_to_all_single(received, sent, group=group)),
        ],
        device=device,
    )
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    moved = sent.numel() * sent.element_size() * (size - 1) / size
    all_reduce_s, all_to_all_s = seconds.tolist()
    return GroupRate(name, size, count, 2 * moved / all_reduce_s, moved / all_to_all_s)


def _time(collective: Callable[[], Any]) -> float:
    """Median seconds of a collective, after a first one that sets up its connections."""
    collective()
    seconds = []
    for _ in range(ROUNDS):
        dist.barrier()
        accelerator().synchronize()
        started = time.perf_counter()
        collective()
        accelerator().synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
