"""Grouped matrix products over tokens or rows sorted by expert, by the kernels of ``grouped_gemm_triton.py``.

Shapes: T tokens, K experts per token, L experts, N rows sorted by expert, D model width, F expert hidden width; I = 2F
for a gated activation (the first F rows of an expert are the gate), else F.

How many rows an expert has is known on the device alone, so every launch covers the most tiles there can be, and
:func:`schedule_tiles` writes down, on the device, which tile is whose. The host waits for nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from moe_scale.moe.kernels import grouped_gemm_triton as kernels


class TileSchedule(NamedTuple):
    """Which tiles of rows there are: a tile is of one expert, and of ``block_m`` rows or what is left of it."""

    starts: Tensor
    """int32 [L + 1], the first row of each expert, and the end of the last."""
    expert_of_tile: Tensor
    """int32, -1 for a tile that does not exist."""
    row_of_tile: Tensor
    """int32, the first row of the tile."""
    block_m: int

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.starts, self.expert_of_tile, self.row_of_tile


def schedule_tiles(counts_L: Tensor, num_rows: int) -> TileSchedule:
    """The tiles of rows sorted by expert.

    Args:
        counts_L: int64 rows of each expert.
        num_rows: at least their sum; what is beyond it belongs to no expert, and is neither read nor written.
    """
    num_experts = len(counts_L)
    block_m = _block_m(num_rows, num_experts)
    most_tiles = (num_rows + num_experts * (block_m - 1)) // block_m
    tiles = TileSchedule(
        starts=counts_L.new_empty(num_experts + 1, dtype=torch.int32),
        expert_of_tile=counts_L.new_empty(most_tiles, dtype=torch.int32),
        row_of_tile=counts_L.new_empty(most_tiles, dtype=torch.int32),
        block_m=block_m,
    )
    kernels.schedule_kernel[(num_experts + 1,)](
        counts_L, tiles.starts, tiles.expert_of_tile, tiles.row_of_tile, num_experts, most_tiles,
        BLOCK_M=block_m, BLOCK_L=triton.next_power_of_2(num_experts), BLOCK_TILES=128,
    )  # fmt: skip
    return tiles


def up_project(
    x_TD: Tensor, token_N: Tensor, gate_up_LID: Tensor, tiles: TileSchedule, activation: str
) -> tuple[Tensor, Tensor]:
    """The experts' first map of the tokens that the rows name. Returns hidden_NI, and its activation active_NF."""
    inner, d_model = gate_up_LID.shape[1:]
    hidden_width = inner // 2 if activation == "swiglu" else inner
    hidden_NI = x_TD.new_empty(len(token_N), inner)
    active_NF = x_TD.new_empty(len(token_N), hidden_width)
    kernels.up_kernel[_over(tiles, inner)](
        x_TD, token_N, gate_up_LID, hidden_NI, active_NF, *tiles.arguments,
        D=d_model, F=hidden_width, ACTIVATION=activation, BLOCK_M=tiles.block_m,
    )  # fmt: skip
    return hidden_NI, active_NF


def down_project(active_NF: Tensor, down_LDF: Tensor, weight_N: Tensor, tiles: TileSchedule) -> Tensor:
    """The experts' second map, times the rows' weights: y_ND."""
    d_model, hidden_width = down_LDF.shape[1:]
    y_ND = active_NF.new_empty(len(active_NF), d_model)
    kernels.rows_kernel[_over(tiles, d_model)](
        active_NF, down_LDF, weight_N, y_ND, *tiles.arguments,
        DEPTH=hidden_width, WIDTH=d_model, STRIDE_N=hidden_width, STRIDE_K=1, WEIGHTED=True, BLOCK_M=tiles.block_m,
    )  # fmt: skip
    return y_ND


def down_project_backward(
    grad_TD: Tensor, token_N: Tensor, down_LDF: Tensor, weight_N: Tensor, hidden_NI: Tensor, tiles: TileSchedule,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The way back through the sum, the second map and the activation.

    Args:
        grad_TD: gradient of the tokens' sums.

    Returns:
        the gradient of hidden_NI; the activation times the weight, [N, F], of which the second map's gradient is made;
        the fp32 gradient of weight_N.
    """
    d_model, hidden_width = down_LDF.shape[1:]
    grad_hidden_NI = torch.empty_like(hidden_NI)
    weighted_NF = hidden_NI.new_empty(len(hidden_NI), hidden_width)
    block_n = 16 if kernels.INTERPRETED else 128  # not tuned, as the number of shares depends on it
    column_tiles = triton.cdiv(hidden_width, block_n)
    share_NC = hidden_NI.new_zeros(len(hidden_NI), column_tiles, dtype=torch.float32)
    kernels.down_backward_kernel[(len(tiles.expert_of_tile) * column_tiles,)](
        grad_TD, token_N, down_LDF, weight_N, hidden_NI, grad_hidden_NI, weighted_NF, share_NC, *tiles.arguments,
        D=d_model, F=hidden_width, ACTIVATION=activation, BLOCK_M=tiles.block_m, BLOCK_N=block_n,
    )  # fmt: skip
    return grad_hidden_NI, weighted_NF, share_NC.sum(dim=1)


def up_project_backward(grad_hidden_NI: Tensor, gate_up_LID: Tensor, tiles: TileSchedule) -> Tensor:
    """The gradient of each row's input, [N, D]."""
    inner, d_model = gate_up_LID.shape[1:]
    grad_ND = grad_hidden_NI.new_empty(len(grad_hidden_NI), d_model)
    kernels.rows_kernel[_over(tiles, d_model)](
        grad_hidden_NI, gate_up_LID, grad_hidden_NI, grad_ND, *tiles.arguments,
        DEPTH=inner, WIDTH=d_model, STRIDE_N=1, STRIDE_K=d_model, WEIGHTED=False, BLOCK_M=tiles.block_m,
    )  # fmt: skip
    return grad_ND


def weight_grad(
    a: Tensor, b: Tensor, token_N: Tensor, tiles: TileSchedule, *, gather_a: bool = False, gather_b: bool = False
) -> Tensor:
    """Each expert's sum of outer products of its rows of ``a`` [N or T, O] and ``b`` [N or T, I]. Returns [L, O, I].

    Args:
        gather_a, gather_b: whether its rows are tokens', to be taken in the order of ``token_N``.
    """
    num_experts, height, width = len(tiles.starts) - 1, a.shape[1], b.shape[1]
    grad = a.new_empty(num_experts, height, width)

    def grid(meta: dict[str, Any]) -> tuple[int]:
        return (num_experts * triton.cdiv(height, meta["BLOCK_M"]) * triton.cdiv(width, meta["BLOCK_N"]),)

    kernels.weight_grad_kernel[grid](
        a, b, token_N, grad, tiles.starts, HEIGHT=height, WIDTH=width, GATHER_A=gather_a, GATHER_B=gather_b
    )
    return grad


def sum_places(rows_ND: Tensor, place_TK: Tensor) -> Tensor:
    """Each token's sum of the rows at its places, in one order and in fp32; the place N holds nothing. y_TD."""
    (num_tokens, top_k), (num_rows, d_model) = place_TK.shape, rows_ND.shape
    y_TD = rows_ND.new_empty(num_tokens, d_model)
    block_d = min(triton.next_power_of_2(d_model), 1024)
    block_t = max(1, 4096 // block_d) if not kernels.INTERPRETED else 16
    kernels.sum_places_kernel[(triton.cdiv(num_tokens, block_t), triton.cdiv(d_model, block_d))](
        rows_ND, place_TK, y_TD, num_tokens, num_rows,
        D=d_model, TOP_K=top_k, BLOCK_T=block_t, BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip
    return y_TD


def _over(tiles: TileSchedule, width: int) -> Any:
    """A grid of all tiles of rows by the tiles of ``width`` columns. Those of one tile of rows are neighbours, and so
    run at about the same time: they find its rows, and its expert's matrix, in the L2 cache."""
    return lambda meta: (len(tiles.expert_of_tile) * triton.cdiv(width, meta["BLOCK_N"]),)


def _block_m(num_rows: int, num_experts: int) -> int:
    """Rows of a tile, from the mean load of an expert, as the real ones are not known to the host."""
    if kernels.INTERPRETED:
        return 16
    return 128 if num_rows > 64 * num_experts else 64
