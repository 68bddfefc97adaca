"""Sparse layers with weights and scores that set their experts apart."""

from __future__ import annotations

from typing import Any

import torch

from moe_scale.config import MoEConfig
from moe_scale.initialization import Init
from moe_scale.moe.layer import MoELayer
from moe_scale.parallel.groups import ParallelGroups

VARIANTS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "top-1": {"top_k": 1},
    "not rescaled": {"renormalize": False},
    "noisy": {"router": "noisy"},
    "sigmoid": {"router": "sigmoid"},
    "sigmoid, not rescaled": {"router": "sigmoid", "renormalize": False},
    "by deepspeed's rules": {"conventions": "deepspeed"},
    "shared expert, biases": {"shared_intermediate_size": 6, "expert_bias": True, "activation": "gelu"},
    "residual": {"residual": True, "activation": "relu", "router_temperature": 0.7},
    "top-3": {"top_k": 3},
}
"""Settings of layers whose experts can be dropped."""


def random_layer(**settings: Any) -> MoELayer:
    """A layer of 8 experts of width 16 in fp64, whose experts differ in size and in how often they are chosen."""
    config = MoEConfig(**{"num_experts": 8, "top_k": 2, "intermediate_size": 6, **settings})
    layer = MoELayer(config, 16, ParallelGroups(), Init(7)).double().eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, tensor in layer.state_dict().items():
            tensor.normal_(generator=generator)
            if name.startswith("experts."):
                tensor *= torch.linspace(0.3, 1.0, 8).reshape(-1, *[1] * (tensor.dim() - 1))
    return layer
