"""The norm that gradients and weights are measured by."""

from __future__ import annotations

import pytest
import torch

from moe_scale.parallel import zero


@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 2**21), (2**22 + 1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squared_norm_adds_up_in_fp64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    found = zero.squared_norm(values)
    assert found.dtype == torch.float64
    assert not found.requires_grad
    assert found == pytest.approx(float(values.detach().double().square().sum()), rel=1e-12)


def test_squared_norm_makes_no_wider_copy_of_the_whole() -> None:
    values = torch.ones(2**25)  # 128 MiB, 256 MiB in fp64
    with torch.profiler.profile(profile_memory=True) as profile:
        zero.squared_norm(values)
    assert max(event.self_cpu_memory_usage for event in profile.events()) <= 8 * 2**22
