"""What the layer may not do on a device that computes on its own: make the host wait for a value."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_scale.config import MoEConfig
from moe_scale.initialization import Init
from moe_scale.moe.layer import MoELayer
from moe_scale.parallel.groups import ParallelGroups


def run_on_meta(valid_BS: Tensor | None = None, **settings: Any) -> None:
    """Forward and backward with tensors that have shapes and no values: reading one on the host is an error."""
    config = MoEConfig(num_experts=8, intermediate_size=64, **settings)
    layer = MoELayer(config, 128, ParallelGroups(), Init(0)).to("meta", torch.bfloat16)
    x_BSD = torch.randn(2, 96, 128, device="meta", dtype=torch.bfloat16, requires_grad=True)
    ids_BS = torch.zeros(2, 96, device="meta", dtype=torch.int64)
    y_BSD, stats = layer(x_BSD, valid_BS, ids_BS)
    (y_BSD.float().mean() + stats.aux_loss + stats.z_loss).backward()
    assert x_BSD.grad is not None


@pytest.mark.parametrize("router", ["softmax", "noisy", "sigmoid", "hash"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_the_host_reads_nothing_back(router: str, top_k: int) -> None:
    run_on_meta(router=router, top_k=top_k)


@pytest.mark.parametrize("settings", [{"expert_dropout": 0.1}, {"expert_bias": True}, {"residual": True},
                                      {"aux_loss_scope": "sequence"}, {"router_jitter": 0.1}])  # fmt: skip
def test_nor_with_what_surrounds_it(settings: dict[str, Any]) -> None:
    run_on_meta(**settings)


def test_a_read_would_be_seen() -> None:
    """With padding the number of rows is read back, once: the check of this file notices that."""
    with pytest.raises(RuntimeError, match=r"item\(\) cannot be called on meta"):
        run_on_meta(torch.ones(2, 96, device="meta", dtype=torch.bool))
