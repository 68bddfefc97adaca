"""Process groups of a run, passed explicitly to whatever communicates.

With W ranks and ``ep_size`` P (P divides W), ranks form W/P *expert* groups of P neighbours: each group holds one
whole copy of the experts, E/P of them a rank. Ranks at the same place of their groups hold the same experts and
form an *expert-data* group of W/P ranks, over which expert gradients are averaged and, with ZeRO, sharded. All
other parameters are sharded over all W ranks. W=4, P=2::

                    experts 0..E/2-1   experts E/2..E-1
    expert group 0        rank 0             rank 1
    expert group 1        rank 2             rank 3
                     expert-data 0      expert-data 1
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ParallelGroups:
    """Sizes, this rank's places and the group handles (``None`` where a group has one member or none is up)."""

    world_size: int = 1
    rank: int = 0
    ep_size: int = 1
    ep_rank: int = 0
    expert: Any = None
    expert_data: Any = None

    def local_experts(self, num_experts: int) -> range:
        """The experts, of ``num_experts``, that this rank holds."""
        count = num_experts // self.ep_size
        return range(self.ep_rank * count, (self.ep_rank + 1) * count)
