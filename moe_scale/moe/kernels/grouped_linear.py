"""One linear map per expert over rows sorted by expert.

Shapes: L experts, R rows sorted by expert, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_linear(x_RI: Tensor, w_LOI: Tensor, counts_L: Tensor) -> Tensor:
    """y[r] = w[expert of r] @ x[r].

    Args:
        x_RI: rows sorted by expert.
        w_LOI: a matrix an expert, laid out as in ``nn.Linear``.
        counts_L: int64 rows of each expert. An expert may have none; its gradient is then zero. Rows beyond their sum
            are no expert's: their outputs and gradients hold anything, and nothing of them is in the weights' gradient.

    Returns:
        y_RO in the type of ``x_RI``.
    """
    if x_RI.device.type != "cpu" and x_RI.dtype in (torch.bfloat16, torch.float16):
        return GroupedMM.apply(x_RI, w_LOI, counts_L.cumsum(0).to(torch.int32))
    return _LoopedLinear.apply(x_RI, w_LOI, counts_L.tolist())


class GroupedMM(torch.autograd.Function):
    """torch's grouped matrix product. In bf16 on an H100 and later it reads the group ends on the device, and the host
    waits for nothing; elsewhere torch reads them back and makes a product an expert.

    A Function of its own so that the parameter itself is what is saved. Left to autograd that would be a transposed
    view of it, whose memory ZeRO-3 cannot take back when it releases the gathered parameter after the forward pass.
    """

    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, w_LOI: Tensor, ends_L: Tensor) -> Tensor:
        ctx.save_for_backward(x_RI, w_LOI, ends_L)
        return F.grouped_mm(x_RI, w_LOI.transpose(1, 2), offs=ends_L)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x_RI, w_LOI, ends_L = ctx.saved_tensors
        grad_RO = grads[0].contiguous()
        grad_x = F.grouped_mm(grad_RO, w_LOI, offs=ends_L) if ctx.needs_input_grad[0] else None
        grad_w = F.grouped_mm(grad_RO.t(), x_RI, offs=ends_L) if ctx.needs_input_grad[1] else None
        return grad_x, grad_w, None


class _LoopedLinear(torch.autograd.Function):
    """A matrix product per expert, written straight into slices of one result.

    On a CPU this beats both a batched product, which pads every expert to the fullest, and ``F.grouped_mm``.
    """

    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, w_LOI: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(x_RI, w_LOI)
        ctx.counts = counts
        y_RO = x_RI.new_empty(x_RI.shape[0], w_LOI.shape[1])
        start = 0
        for expert, count in enumerate(counts):
            if count:
                torch.mm(x_RI[start : start + count], w_LOI[expert].t(), out=y_RO[start : start + count])
            start += count
        return y_RO

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad_RO,) = grads
        x_RI, w_LOI = ctx.saved_tensors
        grad_RO = grad_RO.contiguous()
        grad_x = torch.empty_like(x_RI) if ctx.needs_input_grad[0] else None
        grad_w = torch.empty_like(w_LOI) if ctx.needs_input_grad[1] else None
        start = 0
        for expert, count in enumerate(ctx.counts):
            rows = slice(start, start + count)
            if grad_x is not None and count:
                torch.mm(grad_RO[rows], w_LOI[expert], out=grad_x[rows])
            if grad_w is not None:
                if count:
                    torch.mm(grad_RO[rows].t(), x_RI[rows], out=grad_w[expert])
                else:
                    grad_w[expert].zero_()
            start += count
        return grad_x, grad_w, None
