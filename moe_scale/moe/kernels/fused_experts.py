"""The experts with the gather before and the combine after them as one Function: nothing is permuted in memory.

Shapes: T tokens, K experts per token, L experts, N rows sorted by expert, D model width, F expert hidden width; I = 2F
for a gated activation, else F.

Of the forward pass it keeps the input, the parameters, what stood before the activation, and the indices: neither the
gathered rows nor the experts' outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_scale.moe.dispatch import DispatchPlan

TYPES = (torch.bfloat16, torch.float16, torch.float32)


def fused_experts(
    x: Tensor, counts_L: Tensor, plan: DispatchPlan | None, gate_up_LID: Tensor, down_LDF: Tensor, activation: str
) -> Tensor:
    """The output of :class:`moe_scale.moe.experts.Experts` without biases and dropout.

    Args:
        x: the tokens x_TD with a plan; without one rows x_RD sorted by expert, as an exchange leaves them.
        counts_L: int64 rows of each expert.
        plan: which tokens go where, with ``place_TK``.

    Returns:
        y_TD, each token's weighted sum, with a plan; without one y_RD, the rows' outputs.
    """
    if x.dtype not in TYPES or not x.dtype == gate_up_LID.dtype == down_LDF.dtype:
        raise TypeError(f"the Triton kernels take one of {TYPES}, not {x.dtype} and {gate_up_LID.dtype}")
    if plan is None:  # each row is a token of its own, of weight 1
        row_R = torch.arange(len(x), device=x.device)
        weight_R = torch.ones(len(x), device=x.device)
        return FusedExperts.apply(x, weight_R, gate_up_LID, down_LDF, row_R, counts_L, None, activation)
    assert plan.place_TK is not None, "the settings refuse expert_choice with the Triton kernels"
    return FusedExperts.apply(
        x, plan.weight_N, gate_up_LID, down_LDF, plan.token_N, counts_L, plan.place_TK, activation
    )


class FusedExperts(torch.autograd.Function):
    """y[t] = sum over its rows n of weight[n] * down_e(activation(up_e(x[t]))), e the expert of n.

    The parameters themselves are what is saved, never a view: ZeRO-3 takes a gathered parameter's memory back by
    emptying the parameter.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_N: Tensor, gate_up_LID: Tensor, down_LDF: Tensor,
        token_N: Tensor, counts_L: Tensor, place_TK: Tensor | None, activation: str,
    ) -> Tensor:  # fmt: skip
        from moe_scale.moe.kernels import grouped_gemm

        x_TD, weight_N = x_TD.contiguous(), weight_N.contiguous()
        tiles = grouped_gemm.schedule_tiles(counts_L, len(token_N))
        hidden_NI, active_NF = grouped_gemm.up_project(x_TD, token_N, gate_up_LID, tiles, activation)
        y_ND = grouped_gemm.down_project(active_NF, down_LDF, weight_N, tiles)
        ctx.save_for_backward(x_TD, weight_N, gate_up_LID, down_LDF, token_N, place_TK, hidden_NI, *tiles.arguments)
        ctx.activation, ctx.block_m = activation, tiles.block_m
        return y_ND if place_TK is None else grouped_gemm.sum_places(y_ND, place_TK)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        from moe_scale.moe.kernels import grouped_gemm

        x_TD, weight_N, gate_up_LID, down_LDF, token_N, place_TK, hidden_NI, *of_tiles = ctx.saved_tensors
        starts, expert_of_tile, row_of_tile = of_tiles
        tiles = grouped_gemm.TileSchedule(starts, expert_of_tile, row_of_tile, ctx.block_m)
        want_x, want_weight, want_gate_up, want_down = ctx.needs_input_grad[:4]
        grad_TD = grads[0].contiguous()
        grad_hidden_NI, weighted_NF, grad_weight_N = grouped_gemm.down_project_backward(
            grad_TD, token_N, down_LDF, weight_N, hidden_NI, tiles, ctx.activation
        )
        grad_down = grad_gate_up = grad_x = None
        if want_down:
            grad_down = grouped_gemm.weight_grad(grad_TD, weighted_NF, token_N, tiles, gather_a=True)
        if want_gate_up:
            grad_gate_up = grouped_gemm.weight_grad(grad_hidden_NI, x_TD, token_N, tiles, gather_b=True)
        if want_x:
            grad_x = grouped_gemm.up_project_backward(grad_hidden_NI, gate_up_LID, tiles)
            if place_TK is not None:
                grad_x = grouped_gemm.sum_places(grad_x, place_TK)
        grad_weight = grad_weight_N.to(weight_N.dtype) if want_weight else None
        return grad_x, grad_weight, grad_gate_up, grad_down, None, None, None, None
