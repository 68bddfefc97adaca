"""Step 4, run the experts: feed-forwards with stacked weights.

Shapes: L experts on this rank, D model width, F expert hidden width, R rows sorted by expert; I = 2F for a gated
activation, else F.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_scale.config import MoEConfig
from moe_scale.initialization import Init
from moe_scale.moe.dispatch import DispatchPlan, combine_rows, gather_rows
from moe_scale.moe.kernels.cpu_experts import activate, cpu_experts
from moe_scale.moe.kernels.fused_experts import fused_experts
from moe_scale.moe.kernels.grouped_linear import grouped_linear
from moe_scale.moe.low_rank import Adaptable
from moe_scale.parallel.groups import ParallelGroups
from moe_scale.parallel.zero import mark_expert_parameters


def expert_stds(d_model: int, hidden: int, depth_scale: float) -> tuple[float, float]:
    """Initial standard deviations of an expert's input and output matrices: fan-in, the output scaled by depth."""
    return d_model**-0.5, depth_scale * hidden**-0.5


class Experts(Adaptable):
    """down(activation(up(x))) for each local expert; by default SwiGLU (arXiv 2002.05202) without biases.

    Weights are stacked, one tensor for all experts of the rank: one gather brings them all under ZeRO-3, and no rank
    can skip a gather because none of its tokens went to some expert.

    Attributes:
        gate_up: [L, I, D]; with SwiGLU the first F rows of an expert are the gate.
        down: [L, D, F].
        gate_up_bias, down_bias: [L, I] and [L, D], or None.
    """

    def __init__(self, config: MoEConfig, d_model: int, groups: ParallelGroups, init: Init, depth_scale: float = 1.0):
        super().__init__()
        self.activation, self.dropout = config.activation, config.expert_dropout
        self.kernels = config.kernels
        self.groups = groups
        hidden, local = config.intermediate_size, groups.local_experts(config.num_experts)
        inner = 2 * hidden if config.activation == "swiglu" else hidden
        self.gate_up = nn.Parameter(torch.empty(len(local), inner, d_model))
        self.down = nn.Parameter(torch.empty(len(local), d_model, hidden))
        self.gate_up_bias = nn.Parameter(torch.zeros(len(local), inner)) if config.expert_bias else None
        self.down_bias = nn.Parameter(torch.zeros(len(local), d_model)) if config.expert_bias else None
        std_in, std_out = expert_stds(d_model, hidden, depth_scale)
        for place, expert in enumerate(local):
            (init / expert / "gate_up").normal_(self.gate_up.data[place], std_in)
            (init / expert / "down").normal_(self.down.data[place], std_out)
        mark_expert_parameters(self.parameters(), groups)

    def forward(self, x: Tensor, counts_L: Tensor, plan: DispatchPlan | None = None) -> Tensor:
        """Run the experts, with a plan including the gather before and the combine after them.

        Args:
            x: the tokens x_TD with a plan; without one rows x_RD sorted by local expert, as an exchange leaves them.
            counts_L: int64 rows of each local expert; they come first, and rows after them are no expert's.

        Returns:
            y_TD, each token's weighted sum, with a plan; without one y_RD, the rows' outputs.
        """
        if self.kernels == "triton":
            return fused_experts(x, counts_L, plan, self.gate_up, self.down, self.activation)
        plain = self.gate_up_bias is None and not (self.dropout and self.training) and not self.adapted
        if x.device.type == "cpu" and plain:
            compiled = self.kernels == "auto"
            return cpu_experts(x, counts_L, plan, self.gate_up, self.down, self.activation, compiled=compiled)
        if plan is None:
            return self.run_rows(x, counts_L)
        return combine_rows(self.run_rows(gather_rows(x, plan), counts_L), plan, len(x))

    def run_rows(self, x_RD: Tensor, counts_L: Tensor) -> Tensor:
        """Outputs of rows sorted by local expert, one product after the other. Returns y_RD."""
        hidden_RI = _with_bias(grouped_linear(x_RD, self.gate_up, counts_L), self.gate_up_bias, counts_L)
        hidden_RF = activate(self.add_adapter("gate_up", x_RD, hidden_RI, counts_L), self.activation)
        if self.dropout:
            hidden_RF = F.dropout(hidden_RF, self.dropout, self.training)
        y_RD = _with_bias(grouped_linear(hidden_RF, self.down, counts_L), self.down_bias, counts_L)
        return self.add_adapter("down", hidden_RF, y_RD, counts_L)


def _with_bias(y_RO: Tensor, bias_LO: Tensor | None, counts_L: Tensor) -> Tensor:
    if bias_LO is None:
        return y_RO
    rest = (len(y_RO) - counts_L.sum()).unsqueeze(0)  # rows of no expert, which get a bias of 0
    return y_RO + F.pad(bias_LO, (0, 0, 0, 1)).repeat_interleave(torch.cat([counts_L, rest]), 0, output_size=len(y_RO))


class SharedExpert(Adaptable):
    """One feed-forward that every token passes: the shared expert (arXiv 2401.06066), or Residual MoE's dense half."""

    def __init__(self, d_model: int, hidden: int, activation: str, init: Init, depth_scale: float = 1.0):
        super().__init__()
        self.activation = activation
        inner = 2 * hidden if activation == "swiglu" else hidden
        self.gate_up = nn.Parameter(torch.empty(inner, d_model))
        self.down = nn.Parameter(torch.empty(d_model, hidden))
        std_in, std_out = expert_stds(d_model, hidden, depth_scale)
        (init / "gate_up").normal_(self.gate_up, std_in)
        (init / "down").normal_(self.down, std_out)

    def forward(self, x: Tensor) -> Tensor:
        hidden = activate(self.add_adapter("gate_up", x, F.linear(x, self.gate_up)), self.activation)
        return self.add_adapter("down", hidden, F.linear(hidden, self.down))
