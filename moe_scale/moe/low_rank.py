"""Low-rank adapters (LoRA, arXiv 2106.09685) of feed-forwards whose weights are parameters and no modules of their own.

Shapes: L experts on this rank, r rank of the adapter, R rows sorted by expert, I inputs, O outputs.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_scale.initialization import Init
from moe_scale.moe.kernels.grouped_linear import grouped_linear
from moe_scale.parallel.groups import ParallelGroups
from moe_scale.parallel.zero import mark_expert_parameters

_GROUPED_MULTIPLE = 8
"""The grouped matrix product of a GPU wants rows of 16 bytes."""


class LowRank(nn.Module):
    """scale * B A x beside one matrix, or beside a stack of one an expert: then each expert has factors of its own.

    Args:
        shape: of the weight, [O, I] or [L, O, I].
        rank: r.
        scale: of what is added.
        dropout: of ``x``, in training.
        init: seeds A, which begins at random by expert; B begins at zero.
        groups: of a stack, which is sharded as the experts' weights are; None for one matrix.

    Attributes:
        A: [r, I] or [L, r, I].
        B: [O, r] or [L, O, r].
    """

    def __init__(
        self,
        shape: torch.Size,
        rank: int,
        scale: float,
        dropout: float,
        init: Init,
        groups: ParallelGroups | None = None,
    ):
        super().__init__()
        *stack, outputs, inputs = shape
        self.scale, self.dropout = scale, dropout
        self.A = nn.Parameter(torch.empty(*stack, rank, inputs))
        self.B = nn.Parameter(torch.zeros(*stack, outputs, rank))
        if groups is None:
            (init / "A").normal_(self.A.data, inputs**-0.5)
            return
        for place, expert in enumerate(groups.local_experts(groups.ep_size * stack[0])):
            (init / expert / "A").normal_(self.A.data[place], inputs**-0.5)
        mark_expert_parameters(self.parameters(), groups)

    def forward(self, x: Tensor, counts_L: Tensor | None = None) -> Tensor:
        """What is added to the map's output.

        Args:
            x: its input; of a stack x_RI.
            counts_L: of a stack, int64 rows of each expert.
        """
        x = F.dropout(x, self.dropout, self.training)
        if counts_L is None:
            return self.scale * F.linear(F.linear(x, self.A), self.B)
        factors: tuple[Tensor, Tensor] = (self.A, self.B)
        a_LrI, b_LOr = factors if x.device.type == "cpu" else padded(*factors)
        return self.scale * grouped_linear(grouped_linear(x, a_LrI, counts_L), b_LOr, counts_L)


def padded(a_LrI: Tensor, b_LOr: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of a rank that the grouped product of a GPU takes, with zeros, which leave the product B A as it is."""
    lacking = -a_LrI.shape[1] % _GROUPED_MULTIPLE
    return (F.pad(a_LrI, (0, 0, 0, lacking)), F.pad(b_LOr, (0, lacking))) if lacking else (a_LrI, b_LOr)


class Adaptable(nn.Module):
    """A feed-forward of two maps, ``gate_up`` and ``down``, each of which can have an adapter: ``lora_gate_up``, ..."""

    MAPS: ClassVar[tuple[str, ...]] = ("gate_up", "down")

    groups: ParallelGroups | None = None
    """Of stacked weights."""

    def adapter(self, name: str) -> LowRank | None:
        """That of a map; None without."""
        found: LowRank | None = getattr(self, f"lora_{name}", None)
        return found

    @property
    def adapted(self) -> list[str]:
        """The maps that have an adapter."""
        return [name for name in self.MAPS if self.adapter(name) is not None]

    def add_adapter(self, name: str, x: Tensor, y: Tensor, counts_L: Tensor | None = None) -> Tensor:
        """The output ``y`` that a map makes of ``x``, with what its adapter adds if it has one."""
        adapter = self.adapter(name)
        return y if adapter is None else y + adapter(x, counts_L).to(y.dtype)
