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
from moe_scale.models.layers import DenseFeedForward, dense_hidden
from moe_scale.moe.backends import build_moe
from moe_scale.moe.layer import MoELayer
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

    def __init__(self, layer: Any):
        super().__init__()
        self.layer = layer

    def forward(self, x_BSD: Tensor) -> Tensor:
        if self.layer.config.router != "hash":
            return self.layer(x_BSD)[0]
        # It reads token ids: here every token of a sequence is another one.
        ids_BS = torch.arange(x_BSD.shape[1], device=x_BSD.device).expand(x_BSD.shape[:2])
        return self.layer(x_BSD, None, ids_BS)[0]


def build_peer(name: str, config: MoEConfig, d_model: int, seed: int = 0) -> nn.Module:
    """The layer called ``name`` in :data:`PEERS`, with the weights of ``seed``: the same for all sparse layers."""
    if name == "dense":
        return DenseFeedForward(d_model, dense_hidden(config), Init(seed))
    if name.startswith("hf-"):
        return hugging_face_block(config, d_model, "grouped_mm" if name == "hf-grouped" else "eager", seed)
    if name == "triton":
        config = dataclasses.replace(config, kernels="triton")
        return OutputOnly(build_moe(config, d_model, ParallelGroups(), Init(seed)))
    backend, _, dispatch = name.partition("-")
    if backend not in ("custom", "deepspeed", "autoep"):
        raise ValueError(f"no peer called {name!r}; choose from {', '.join(PEERS)}")
    choice: dict[str, Any] = {"backend": backend, "dispatch": dispatch or "dropless", "capacity_factor": 1.0}
    return backend_layer(dataclasses.replace(config, **choice), d_model, seed)


def backend_layer(config: MoEConfig, d_model: int, seed: int = 0) -> nn.Module:
    """The layer of ``config.backend`` with all experts on this rank, returning its output alone."""
    layer = OutputOnly(build_moe(config, d_model, ParallelGroups(), Init(seed)))
    if config.backend == "autoep":
        from moe_scale.moe.backends.autoep import replace_block

        replace_block(layer, config)
    return layer


def hugging_face_block(config: MoEConfig, d_model: int, implementation: str, seed: int = 0) -> nn.Module:
    """Hugging Face's Qwen3-MoE block, with the weights that this project's layer has with ``seed``."""
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    settings = Qwen3MoeConfig(
        hidden_size=d_model,
        moe_intermediate_size=config.intermediate_size,
        num_experts=config.num_experts,
        num_experts_per_tok=config.top_k,
        norm_topk_prob=config.renormalize and config.top_k > 1,
    )
    settings._experts_implementation = implementation
    block = Qwen3MoeSparseMoeBlock(settings)
    ours = MoELayer(config, d_model, ParallelGroups(), Init(seed))
    with torch.no_grad():
        block.gate.weight.copy_(ours.router.weight)
        block.experts.gate_up_proj.copy_(ours.experts.gate_up)
        block.experts.down_proj.copy_(ours.experts.down)
    return block


def peak_extra_bytes(step: Callable[[], Any], device: torch.device) -> int:
    """Most memory that ``step`` holds beyond what was held before, from the allocator's own record. Bytes.

    On a CPU the record is of one thread, and so is the step. Where experts are shared out over threads, each further
    one holds the temporaries of one more expert.
    """
    if device.type != "cpu":
        module = torch.get_device_module(device)
        module.synchronize()
        module.reset_peak_memory_stats()
        before = module.memory_allocated()
        step()
        module.synchronize()
        return int(module.max_memory_allocated() - before)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            step()
    finally:
        torch.set_num_threads(threads)
    held = peak = 0
    results = profile.profiler.kineto_results
    for event in sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
