"""The grouped matrix product that a GPU uses, held against a product per expert; torch runs it on a CPU too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_scale.moe.kernels.grouped_linear import GroupedMM, grouped_linear

COUNTS = [[3, 0, 5, 1], [0, 0, 9, 0], [9, 0, 0, 0], [2, 3, 3, 1]]


def make(counts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_RI = torch.randn(sum(counts), 16, generator=generator).bfloat16().requires_grad_()
    w_LOI = torch.randn(len(counts), 24, 16, generator=generator).bfloat16().requires_grad_()
    return x_RI, w_LOI, torch.tensor(counts)


@pytest.mark.parametrize("counts", COUNTS)
def test_grouped_product_is_the_looped_one_with_its_gradients(counts: list[int]) -> None:
    x_RI, w_LOI, counts_L = make(counts)
    looped_RO = grouped_linear(x_RI, w_LOI, counts_L)
    weight_RO = torch.randn(looped_RO.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = torch.autograd.grad((looped_RO * weight_RO).sum(), [x_RI, w_LOI])
    grouped_RO = GroupedMM.apply(x_RI, w_LOI, counts_L.cumsum(0).to(torch.int32))
    torch.testing.assert_close(grouped_RO, looped_RO)
    found = torch.autograd.grad((grouped_RO * weight_RO).sum(), [x_RI, w_LOI])
    torch.testing.assert_close(found, expected)
    assert not found[1][counts_L == 0].any(), "an expert without rows has a gradient of zero"


def test_the_graph_holds_the_parameter_and_no_view_of_it() -> None:
    """ZeRO-3 takes a gathered parameter's memory back by emptying the parameter; a saved view would keep it alive."""
    x_RI, w_LOI, counts_L = make(COUNTS[0])
    out = GroupedMM.apply(x_RI, w_LOI, counts_L.cumsum(0).to(torch.int32))
    assert any(saved is w_LOI for saved in out.grad_fn.saved_tensors)
    assert all(saved._base is None for saved in out.grad_fn.saved_tensors)
