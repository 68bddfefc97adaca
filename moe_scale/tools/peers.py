"""The layers that ``moe-scale bench`` times: this project's, what it competes with, and the dense floor.

Shapes: B batch, S sequence, D model width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moe_scale.config import MoEConfig
from moe_scale.initialization import Init
from moe_scale.models.decoder import dense_hidden
from moe_scale.models.layers import DenseFeedForward
from moe_scale.moe.backends import build_moe
from moe_scale.parallel.groups import ParallelGroups

PEERS: dict[str, str] = {
    "dense": "dense SwiGLU of the same active FLOPs: the floor",
    "custom": "this project's layer, dropless",
    "triton": "the same with its Triton kernels, on a GPU",
    "deepspeed": "deepspeed.moe, dropless",
    "deepspeed-capacity": "deepspeed.moe, capacity factor 1.0",
    "autoep": "DeepSpeed's AutoEP layer",
    "hf-grouped": "Hugging Face's Qwen3-MoE block, grouped_mm",
    "hf-eager": "Hugging Face's Qwen3-MoE block, eager",
}


class OutputOnly(nn.Module):
    """A sparse layer that returns its output alone, as its peers do; the statistics are computed all the same."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.layer(x_BSD)[0]


def build_peer(name: str, config: MoEConfig, d_model: int, seed: int = 0) -> nn.Module:
    """The layer called ``name`` in :data:`PEERS`, with the weights of ``seed`` where it is this project's own."""
    init = Init(seed)
    if name == "dense":
        return DenseFeedForward(d_model, dense_hidden(config), init)
    if name.startswith("hf-"):
        return _hugging_face(config, d_model, "grouped_mm" if name == "hf-grouped" else "eager")
    if name == "triton":
        config = dataclasses.replace(config, kernels="triton")
        return OutputOnly(build_moe(config, d_model, ParallelGroups(), init))
    backend, _, dispatch = name.partition("-")
    if backend not in ("custom", "deepspeed", "autoep"):
        raise ValueError(f"no peer called {name!r}; choose from {', '.join(PEERS)}")
    choice: dict[str, Any] = {"backend": backend, "dispatch": dispatch or "dropless", "capacity_factor": 1.0}
    config = dataclasses.replace(config, **choice)
    layer = OutputOnly(build_moe(config, d_model, ParallelGroups(), init))
    if backend == "autoep":
        from moe_scale.moe.backends.autoep import replace_block

        replace_block(layer, config)
    return layer


def _hugging_face(config: MoEConfig, d_model: int, implementation: str) -> nn.Module:
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    settings = Qwen3MoeConfig(
        hidden_size=d_model,
        moe_intermediate_size=config.intermediate_size,
        num_experts=config.num_experts,
        num_experts_per_tok=config.top_k,
        norm_topk_prob=config.renormalize,
    )
    settings._experts_implementation = implementation
    block = Qwen3MoeSparseMoeBlock(settings)
    for index, parameter in enumerate(block.parameters()):
        (Init(index) / "peer").normal_(parameter.data, parameter.shape[-1] ** -0.5)
    return block


def peak_extra_bytes(step: Callable[[], Any], device: torch.device) -> int:
    """Most memory that ``step`` holds beyond what was held before, from the allocator's own record. Bytes."""
    if device.type != "cpu":
        module = torch.get_device_module(device)
        module.synchronize()
        module.reset_peak_memory_stats()
        before = module.memory_allocated()
        step()
        module.synchronize()
        return int(module.max_memory_allocated() - before)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    held = peak = 0
    results = profile.profiler.kineto_results
    for event in sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
