"""Step 4, run the experts: SwiGLU feed-forwards with stacked weights.

Shapes: L experts on this rank, D model width, F expert hidden width, R rows sorted by expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_scale.initialization import Init
from moe_scale.moe.kernels.grouped_linear import grouped_linear
from moe_scale.parallel.groups import ParallelGroups
from moe_scale.parallel.zero import mark_expert_parameters


def expert_stds(d_model: int, hidden: int, depth_scale: float) -> tuple[float, float]:
    """Initial standard deviations of an expert's input and output matrices: fan-in, the output scaled by depth."""
    return d_model**-0.5, depth_scale * hidden**-0.5


class Experts(nn.Module):
    """down(silu(gate(x)) * up(x)) for each local expert (arXiv 2002.05202, SwiGLU without biases).

    Weights are stacked, one tensor for all experts of the rank: one gather brings them all under ZeRO-3, and no rank
    can skip a gather because none of its tokens went to some expert.

    Attributes:
        gate_up: [L, 2F, D]; the first F rows of an expert are the gate.
        down: [L, D, F].
    """

    def __init__(
        self, d_model: int, hidden: int, num_experts: int, groups: ParallelGroups, init: Init, depth_scale: float = 1.0
    ):
        super().__init__()
        local = groups.local_experts(num_experts)
        self.gate_up = nn.Parameter(torch.empty(len(local), 2 * hidden, d_model))
        self.down = nn.Parameter(torch.empty(len(local), d_model, hidden))
        std_in, std_out = expert_stds(d_model, hidden, depth_scale)
        for place, expert in enumerate(local):
            (init / expert / "gate_up").normal_(self.gate_up.data[place], std_in)
            (init / expert / "down").normal_(self.down.data[place], std_out)
        mark_expert_parameters(self.parameters(), groups)

    def forward(self, x_RD: Tensor, counts_L: Tensor) -> Tensor:
        """Outputs of rows sorted by local expert. Returns y_RD."""
        gate_RF, up_RF = grouped_linear(x_RD, self.gate_up, counts_L).chunk(2, dim=-1)
        return grouped_linear(F.silu(gate_RF) * up_RF, self.down, counts_L)
