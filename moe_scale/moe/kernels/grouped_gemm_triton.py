"""Triton kernels of grouped matrix products that gather their rows, and do what stands around the products as well.

Shapes: T tokens, K experts per token, L experts, N rows sorted by expert, D model width, F expert hidden width; I = 2F
for a gated activation (the first F rows of an expert are the gate), else F. The widths are compiled in.

A program of a tile of rows reads which expert's it is, and ends at once where there is no such tile. Products add up in
fp32, nothing is added up by atomics: the same input gives the same bits. ``grouped_gemm.py`` launches them.

Needs Triton; runs on a CPU, slowly, under ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)


# --- what the compiler may choose from


def _configs(*choices: tuple[dict[str, int], int, int]) -> list[triton.Config]:
    """(block sizes, warps, stages) to try on the first call of a shape; the interpreter takes one of small blocks."""
    if INTERPRETED:
        return [triton.Config(dict.fromkeys(choices[0][0], 16), num_warps=1, num_stages=1)]
    return [triton.Config(blocks, num_warps=warps, num_stages=stages) for blocks, warps, stages in choices]


def _row_configs() -> list[triton.Config]:
    """For products of a tile of rows. The last two leave room for a second program on a Hopper SM, whose product can
    run while the first one stores its result."""
    return _configs(
        ({"BLOCK_N": 256, "BLOCK_K": 64}, 8, 3),
        ({"BLOCK_N": 256, "BLOCK_K": 64}, 8, 4),
        ({"BLOCK_N": 128, "BLOCK_K": 64}, 8, 3),
        ({"BLOCK_N": 128, "BLOCK_K": 64}, 4, 3),
        ({"BLOCK_N": 64, "BLOCK_K": 16}, 8, 2),
    )


def _of_this_type(configs: list[triton.Config], arguments: dict[str, Any], **_: Any) -> list[triton.Config]:
    """fp32, which takes no matrix unit, has the configuration of blocks 16 deep, the others have all but that."""
    if INTERPRETED:
        return configs
    wide = next(value for value in arguments.values() if isinstance(value, Tensor)).dtype == torch.float32
    return [config for config in configs if (config.kwargs["BLOCK_K"] == 16) == wide]


# --- kernels


@triton.jit
def schedule_kernel(
    counts_ptr, starts_ptr, expert_of_tile_ptr, row_of_tile_ptr, num_experts, num_tiles,
    BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_TILES: tl.constexpr,
):  # fmt: skip
    """One program an expert, and a last one for the tiles that do not exist."""
    mine = tl.program_id(0)
    experts = tl.arange(0, BLOCK_L)
    counts = tl.load(counts_ptr + experts, mask=experts < num_experts, other=0).to(tl.int32)
    tiles = (counts + BLOCK_M - 1) // BLOCK_M
    first_row = tl.sum(tl.where(experts < mine, counts, 0))
    first_tile = tl.sum(tl.where(experts < mine, tiles, 0))
    tl.store(starts_ptr + mine, first_row)
    is_last = mine == num_experts
    end_tile = tl.where(is_last, num_tiles, first_tile + tl.sum(tl.where(experts == mine, tiles, 0)))
    label = tl.where(is_last, -1, mine)
    for some_tile in range(first_tile, end_tile, BLOCK_TILES):
        tile = some_tile + tl.arange(0, BLOCK_TILES)
        tl.store(expert_of_tile_ptr + tile, label, mask=tile < end_tile)
        tl.store(row_of_tile_ptr + tile, first_row + (tile - first_tile) * BLOCK_M, mask=tile < end_tile)


@triton.jit
def _product(
    a_ptrs, w_ptrs, a_step, w_step,
    DEPTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sum over DEPTH of a [BLOCK_M, BLOCK_K] times w [BLOCK_K, BLOCK_N], whose pointers move by a step a turn."""
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    k = tl.arange(0, BLOCK_K)
    for done in range(0, DEPTH, BLOCK_K):
        if DEPTH % BLOCK_K == 0:
            a = tl.load(a_ptrs)
            w = tl.load(w_ptrs)
        else:
            a = tl.load(a_ptrs, mask=(k < DEPTH - done)[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=(k < DEPTH - done)[:, None], other=0.0)
        total = tl.dot(a, w, total, input_precision="ieee")
        a_ptrs += a_step
        w_ptrs += w_step
    return total


@triton.jit
def _gelu_and_slope(x):
    cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    return x * cdf, cdf + x * tl.exp(-0.5 * x * x) * 0.3989422804014327


@triton.autotune(
    configs=_row_configs(),
    key=["D", "F", "BLOCK_M", "ACTIVATION"],
    prune_configs_by={"early_config_prune": _of_this_type},
)
@triton.jit
def up_kernel(
    x_ptr, token_ptr, w_ptr, hidden_ptr, active_ptr, starts_ptr, expert_of_tile_ptr, row_of_tile_ptr,
    D: tl.constexpr, F: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """hidden[n] = w[expert of n] x[token of n], and its activation.

    With a gate, the columns of a tile are a gate and an up in turn, so that one product gives both, and a thread of
    the matrix unit, which holds neighbours, the two that belong together.
    """
    GATED: tl.constexpr = ACTIVATION == "swiglu"
    I: tl.constexpr = 2 * F if GATED else F  # noqa: E741
    COLUMN_TILES: tl.constexpr = (I + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) // COLUMN_TILES
    expert = tl.load(expert_of_tile_ptr + tile)
    if expert < 0:
        return
    end = tl.load(starts_ptr + expert + 1)
    row = tl.load(row_of_tile_ptr + tile) + tl.arange(0, BLOCK_M)
    # Rows past the end repeat the last one, and are not stored: so the loads need no mask.
    token = tl.load(token_ptr + tl.minimum(row, end - 1)).to(tl.int64)
    first_column = (tl.program_id(0) % COLUMN_TILES) * BLOCK_N
    column = first_column + tl.arange(0, BLOCK_N)
    w_row = (column % 2) * F + column // 2 if GATED else column
    if I % BLOCK_N:
        w_row = tl.where(column < I, w_row, 0)
    k = tl.arange(0, BLOCK_K)
    a_ptrs = x_ptr + token[:, None] * D + k[None, :]
    w_ptrs = w_ptr + expert.to(tl.int64) * (I * D) + w_row[None, :] * D + k[:, None]
    total = _product(a_ptrs, w_ptrs, BLOCK_K, BLOCK_K, D, BLOCK_M, BLOCK_N, BLOCK_K)

    # The backward pass computes the activation from what is stored, so this one does as well.
    rounded = total.to(hidden_ptr.dtype.element_ty)
    hidden_row = hidden_ptr + row.to(tl.int64)[:, None] * I
    if GATED:
        gate, up = tl.split(tl.reshape(rounded, (BLOCK_M, BLOCK_N // 2, 2)))
        column = first_column // 2 + tl.arange(0, BLOCK_N // 2)
        inside = (row < end)[:, None] & (column < F)[None, :]
        tl.store(hidden_row + column[None, :], gate, mask=inside)
        tl.store(hidden_row + F + column[None, :], up, mask=inside)
        wide = gate.to(tl.float32)
        active = wide * tl.sigmoid(wide) * up.to(tl.float32)
    else:
        inside = (row < end)[:, None] & (column < F)[None, :]
        tl.store(hidden_row + column[None, :], rounded, mask=inside)
        wide = rounded.to(tl.float32)
        if ACTIVATION == "gelu":
            active, _ = _gelu_and_slope(wide)
        else:
            active = tl.maximum(wide, 0.0)
    to = active_ptr + row.to(tl.int64)[:, None] * F + column[None, :]
    tl.store(to, active.to(active_ptr.dtype.element_ty), mask=inside)


@triton.autotune(
    configs=_row_configs(),
    key=["DEPTH", "WIDTH", "STRIDE_N", "BLOCK_M", "WEIGHTED"],
    prune_configs_by={"early_config_prune": _of_this_type},
)
@triton.jit
def rows_kernel(
    a_ptr, w_ptr, weight_ptr, y_ptr, starts_ptr, expert_of_tile_ptr, row_of_tile_ptr,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, STRIDE_N: tl.constexpr, STRIDE_K: tl.constexpr, WEIGHTED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[n] = w[expert of n] a[n], by the weight of n where WEIGHTED; w is strided, WIDTH outputs by DEPTH inputs."""
    COLUMN_TILES: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) // COLUMN_TILES
    expert = tl.load(expert_of_tile_ptr + tile)
    if expert < 0:
        return
    end = tl.load(starts_ptr + expert + 1)
    row = tl.load(row_of_tile_ptr + tile) + tl.arange(0, BLOCK_M)
    column = (tl.program_id(0) % COLUMN_TILES) * BLOCK_N + tl.arange(0, BLOCK_N)
    w_column = column if WIDTH % BLOCK_N == 0 else tl.where(column < WIDTH, column, 0)
    k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + tl.minimum(row, end - 1).to(tl.int64)[:, None] * DEPTH + k[None, :]
    w_ptrs = w_ptr + expert.to(tl.int64) * (DEPTH * WIDTH) + w_column[None, :] * STRIDE_N + k[:, None] * STRIDE_K
    total = _product(a_ptrs, w_ptrs, BLOCK_K, BLOCK_K * STRIDE_K, DEPTH, BLOCK_M, BLOCK_N, BLOCK_K)
    if WEIGHTED:
        total *= tl.load(weight_ptr + row, mask=row < end, other=0.0).to(tl.float32)[:, None]
    inside = (row < end)[:, None] & (column < WIDTH)[None, :]
    to = y_ptr + row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    tl.store(to, total.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _activation_backward(
    b, weight, hidden_ptr, grad_hidden_ptr, weighted_ptr, row, end, column, F: tl.constexpr, ACTIVATION: tl.constexpr
):
    """Write the gradient before the activation and the weighted activation; returns each row's <activation, b>."""
    GATED: tl.constexpr = ACTIVATION == "swiglu"
    I: tl.constexpr = 2 * F if GATED else F  # noqa: E741
    kind = grad_hidden_ptr.dtype.element_ty
    inside = (row < end)[:, None] & (column < F)[None, :]
    at = row.to(tl.int64)[:, None] * I + column[None, :]
    hidden = tl.load(hidden_ptr + at, mask=inside, other=0.0).to(tl.float32)
    grad_active = weight[:, None] * b
    if GATED:
        up = tl.load(hidden_ptr + at + F, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(hidden)
        silu = hidden * sigmoid
        active = silu * up
        tl.store(grad_hidden_ptr + at + F, (grad_active * silu).to(kind), mask=inside)
        grad_hidden = grad_active * up * (sigmoid + silu * (1.0 - sigmoid))
    elif ACTIVATION == "gelu":
        active, slope = _gelu_and_slope(hidden)
        grad_hidden = grad_active * slope
    else:
        active = tl.maximum(hidden, 0.0)
        grad_hidden = tl.where(hidden > 0.0, grad_active, 0.0)
    tl.store(grad_hidden_ptr + at, grad_hidden.to(kind), mask=inside)
    active = active.to(kind).to(tl.float32)  # as the forward pass has rounded it
    to = weighted_ptr + row.to(tl.int64)[:, None] * F + column[None, :]
    tl.store(to, (weight[:, None] * active).to(kind), mask=inside)
    return tl.sum(active * b, axis=1)  # outside of the columns that there are, active is 0


@triton.autotune(
    configs=_configs(
        ({"BLOCK_K": 64}, 8, 3),
        ({"BLOCK_K": 64}, 8, 4),
        ({"BLOCK_K": 16}, 8, 2),
    ),
    prune_configs_by={"early_config_prune": _of_this_type},
    key=["D", "F", "BLOCK_M", "ACTIVATION"],
)
@triton.jit
def down_backward_kernel(
    grad_ptr, token_ptr, w_ptr, weight_ptr, hidden_ptr,
    grad_hidden_ptr, weighted_ptr, grad_weight_ptr, starts_ptr, expert_of_tile_ptr, row_of_tile_ptr,
    D: tl.constexpr, F: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """From a token's gradient g back to what stood before the activation, for y[n] = weight[n] w a[n].

    With b[n] = transposed w times g[token of n]: the gradient of a is weight b, and that of the weight <y, g> / weight
    = <a, b>, so that y need not be kept (arXiv 2512.14080). Each tile of columns adds its share of <a, b> to a row of
    its own in ``grad_weight``.
    """
    COLUMN_TILES: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) // COLUMN_TILES
    expert = tl.load(expert_of_tile_ptr + tile)
    if expert < 0:
        return
    end = tl.load(starts_ptr + expert + 1)
    row = tl.load(row_of_tile_ptr + tile) + tl.arange(0, BLOCK_M)
    token = tl.load(token_ptr + tl.minimum(row, end - 1)).to(tl.int64)
    column_tile = tl.program_id(0) % COLUMN_TILES
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    w_column = column if F % BLOCK_N == 0 else tl.where(column < F, column, 0)
    k = tl.arange(0, BLOCK_K)
    a_ptrs = grad_ptr + token[:, None] * D + k[None, :]
    w_ptrs = w_ptr + expert.to(tl.int64) * (D * F) + w_column[None, :] + k[:, None] * F
    b = _product(a_ptrs, w_ptrs, BLOCK_K, BLOCK_K * F, D, BLOCK_M, BLOCK_N, BLOCK_K)

    # Half of the columns at a time, or there are not registers enough for what follows.
    left, right = tl.split(tl.permute(tl.reshape(b, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
    weight = tl.load(weight_ptr + row, mask=row < end, other=0.0).to(tl.float32)
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N // 2)
    share = _activation_backward(
        left, weight, hidden_ptr, grad_hidden_ptr, weighted_ptr, row, end, column, F, ACTIVATION
    )
    share += _activation_backward(
        right, weight, hidden_ptr, grad_hidden_ptr, weighted_ptr, row, end, column + BLOCK_N // 2, F, ACTIVATION
    )
    tl.store(grad_weight_ptr + row.to(tl.int64) * COLUMN_TILES + column_tile, share, mask=row < end)


@triton.autotune(
    configs=_configs(
        # One stage more than for rows: the one that loads which rows to gather.
        ({"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64}, 8, 4),
        ({"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64}, 8, 5),
        ({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}, 8, 4),
        ({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}, 4, 4),
        ({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 16}, 8, 3),
    ),
    prune_configs_by={"early_config_prune": _of_this_type},
    key=["HEIGHT", "WIDTH", "GATHER_A", "GATHER_B"],
)
@triton.jit
def weight_grad_kernel(
    a_ptr, b_ptr, token_ptr, grad_ptr, starts_ptr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, GATHER_A: tl.constexpr, GATHER_B: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grad[expert] = sum over its rows n of a[n] (outer) b[n], where a or b may be gathered by the token of n."""
    ROW_TILES: tl.constexpr = (HEIGHT + BLOCK_M - 1) // BLOCK_M
    COLUMN_TILES: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) % (ROW_TILES * COLUMN_TILES)
    expert = tl.program_id(0) // (ROW_TILES * COLUMN_TILES)
    start = tl.load(starts_ptr + expert)
    end = tl.load(starts_ptr + expert + 1)
    m = tile // COLUMN_TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile % COLUMN_TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(start, end, BLOCK_K):
        row = first + k
        row_inside = row < end
        a_row = row.to(tl.int64)
        b_row = a_row
        if GATHER_A:
            a_row = tl.load(token_ptr + row, mask=row_inside, other=0).to(tl.int64)
        if GATHER_B:
            b_row = tl.load(token_ptr + row, mask=row_inside, other=0).to(tl.int64)
        a_inside = row_inside[:, None]
        if HEIGHT % BLOCK_M:
            a_inside = a_inside & (m < HEIGHT)[None, :]
        b_inside = row_inside[:, None]
        if WIDTH % BLOCK_N:
            b_inside = b_inside & (n < WIDTH)[None, :]
        a = tl.load(a_ptr + a_row[:, None] * HEIGHT + m[None, :], mask=a_inside, other=0.0)
        b = tl.load(b_ptr + b_row[:, None] * WIDTH + n[None, :], mask=b_inside, other=0.0)
        total = tl.dot(tl.trans(a), b, total, input_precision="ieee")
    to = grad_ptr + expert.to(tl.int64) * (HEIGHT * WIDTH) + m[:, None] * WIDTH + n[None, :]
    tl.store(to, total.to(grad_ptr.dtype.element_ty), mask=(m < HEIGHT)[:, None] & (n < WIDTH)[None, :])


@triton.jit
def sum_places_kernel(
    rows_ptr, place_ptr, y_ptr, num_tokens, num_rows,
    D: tl.constexpr, TOP_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    for choice in range(TOP_K):
        place = tl.load(place_ptr + token.to(tl.int64) * TOP_K + choice, mask=token < num_tokens, other=num_rows)
        inside = (place < num_rows)[:, None] & (d < D)[None, :]
        from_ = rows_ptr + place.to(tl.int64)[:, None] * D + d[None, :]
        total += tl.load(from_, mask=inside, other=0.0).to(tl.float32)
    to = y_ptr + token.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(to, total.to(y_ptr.dtype.element_ty), mask=(token < num_tokens)[:, None] & (d < D)[None, :])
