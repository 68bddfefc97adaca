"""What the layer may not do on a device that computes on its own: make the host wait for a value."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_scale.config import MoEConfig
from moe_scale.initialization import Init
from moe_scale.moe.layer import MoELayer
from moe_scale.parallel.groups import ParallelGroups


def run_on_meta(*, dtype: torch.dtype = torch.bfloat16, padding: bool = False, **settings: Any) -> None:
    """Forward and backward with tensors that have shapes and no values: reading one on the host is an error."""
    config = MoEConfig(num_experts=8, intermediate_size=64, **settings)
    layer = MoELayer(config, 128, ParallelGroups(), Init(0)).to("meta", dtype)
    x_BSD = torch.randn(2, 96, 128, device="meta", dtype=dtype, requires_grad=True)
    ids_BS = torch.zeros(2, 96, device="meta", dtype=torch.int64)
    valid_BS = torch.ones(2, 96, device="meta", dtype=torch.bool) if padding else None
    y_BSD, stats = layer(x_BSD, valid_BS, ids_BS)
    (y_BSD.float().mean() + stats.aux_loss + stats.z_loss).backward()
    assert x_BSD.grad is not None


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("router", ["softmax", "noisy", "sigmoid", "hash", "expert_choice"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_the_host_reads_nothing_back(router: str, top_k: int, padding: bool) -> None:
    run_on_meta(router=router, top_k=top_k, padding=padding)


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"expert_dropout": 0.1},
        {"expert_bias": True},
        {"residual": True},
        {"shared_intermediate_size": 64},
        {"aux_loss_scope": "sequence"},
        {"router_jitter": 0.1},
        {"dispatch": "capacity"},
        {"dispatch": "capacity", "drop_policy": "probability", "expert_bias": True},
        {"dispatch": "capacity", "conventions": "deepspeed", "top_k": 1},
        {"dispatch": "capacity", "conventions": "deepspeed"},
        {"dispatch": "capacity", "conventions": "deepspeed", "top_k": 3},
    ],
    ids=str,
)
def test_nor_with_what_surrounds_it(settings: dict[str, Any], padding: bool) -> None:
    run_on_meta(**settings, padding=padding)


def test_a_read_would_be_seen() -> None:
    """In fp32 the products are a loop that needs the counts: the check of this file notices that."""
    with pytest.raises(RuntimeError, match="meta"):
        run_on_meta(dtype=torch.float32)
