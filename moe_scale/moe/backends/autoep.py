"""``moe.backend autoep``: DeepSpeed's AutoEP replaces the expert block of the layer when the engine starts.

AutoEP finds modules by name pattern, takes their router and stacked expert weights, keeps this rank's share and runs
dispatch, all-to-all and experts itself. It has no auxiliary loss and no z-loss, so the layer here computes both,
and the statistics, from the same router scores that AutoEP routes by.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moe_scale.config import MoEConfig
from moe_scale.initialization import Init
from moe_scale.moe.dispatch import plan_dispatch
from moe_scale.moe.experts import Experts
from moe_scale.moe.layer import MoEStats, SparseLayer, make_stats
from moe_scale.moe.placement import Placement, Stretch, experts_of, whole
from moe_scale.moe.router import Router, softmax_top_k
from moe_scale.parallel.groups import ParallelGroups
from moe_scale.parallel.zero import full_shape


def ds_section(config: MoEConfig, *, on_cpu: bool) -> dict[str, Any]:
    """The ``expert_parallel`` section of the DeepSpeed JSON that makes the engine replace the blocks."""
    return {
        "enabled": True,
        "autoep_size": config.ep_size,
        "moe_layer_pattern": r"(?:.*\.)?block",
        "router_pattern": "router",
        "expert_pattern": "experts",
        "expert_w1": "gate_up",
        "expert_w2": "down",
        "expert_w3": None,
        "top_k": config.top_k,
        "score_func": "softmax",
        "score_apply": "post",
        "route_norm": config.renormalize and config.top_k > 1,
        "use_grouped_mm": not on_cpu,
    }


class _Block(nn.Module):
    """What AutoEP replaces. It runs too, with all experts on this rank, so that a model works without an engine."""

    def __init__(self, config: MoEConfig, d_model: int, init: Init, depth_scale: float):
        super().__init__()
        self.config = config
        self.router = Router(d_model, config.num_experts, init / "router", config.router_init_scale)
        # All experts, ordinary parameters: AutoEP cuts out this rank's share itself.
        self.experts = Experts(config, d_model, ParallelGroups(), init / "experts", depth_scale)

    def forward(self, x_BSD: Tensor) -> Tensor:
        config, x_TD = self.config, x_BSD.reshape(-1, x_BSD.shape[-1])
        routing = softmax_top_k(self.router(x_TD), config.top_k, renormalize=config.renormalize)
        plan = plan_dispatch(routing.ids_TK, routing.weights_TK, config.num_experts)
        return self.experts(x_TD, plan.counts_E, plan).view_as(x_BSD)


class AutoEPMoE(SparseLayer):
    """AutoEP behind the interface of :class:`moe_scale.moe.layer.SparseLayer`. Padding is routed like other tokens."""

    def __init__(self, config: MoEConfig, d_model: int, init: Init, depth_scale: float = 1.0):
        super().__init__(config, d_model, init, depth_scale)
        self.block: nn.Module = _Block(config, d_model, init, depth_scale)

    def run_experts(
        self, x_BSD: Tensor, valid_BS: Tensor | None, token_ids_BS: Tensor | None
    ) -> tuple[Tensor, MoEStats, Tensor | None]:
        config = self.config
        y_BSD = self.block(x_BSD)
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        # AutoEP keeps its scores to itself. Asking its router again costs E of about 6*K*F products a token.
        router: Any = self.block.router
        logits_TE = router(x_TD) if isinstance(router, Router) else router.gate(x_TD).float()
        valid_T = None if valid_BS is None else valid_BS.reshape(-1)
        routing = softmax_top_k(logits_TE, config.top_k, renormalize=config.renormalize)
        none_dropped = torch.zeros((), device=x_BSD.device)
        return y_BSD, make_stats(config, routing, none_dropped, len(x_BSD), valid_T), self.run_dense(x_BSD)

    def placements(self) -> dict[str, Placement]:
        num_experts, block = self.config.num_experts, self.block
        shapes = {name: tuple(full_shape(parameter)) for name, parameter in block.named_parameters()}
        if isinstance(block, _Block):  # no engine has replaced it
            return {
                f"block.{name}": experts_of(name, num_experts, 0, num_experts, shape[1:])
                if name.startswith("experts")
                else whole(name, shape)
                for name, shape in shapes.items()
            }
        first: int = block.ep_rank * block.num_local_experts  # type: ignore[assignment,operator]
        local, hidden, d_model = shapes["experts.w1"]
        half = hidden * d_model
        gate, up = ([Stretch(e * half, (2 * (first + e) + part) * half, half) for e in range(local)] for part in (0, 1))
        gate_up = (num_experts, 2 * hidden, d_model)
        return {
            "block.router.gate.weight": whole("router.weight", shapes["router.gate.weight"]),
            "block.experts.w1": Placement("experts.gate_up", gate_up, gate),
            "block.experts.w3": Placement("experts.gate_up", gate_up, up),
            "block.experts.w2": experts_of("experts.down", num_experts, first, local, (d_model, hidden)),
        }


def replace_block(model: nn.Module, config: MoEConfig) -> None:
    """Let AutoEP replace the blocks of a model that no engine will wrap, all experts on this rank."""
    from deepspeed.module_inject.auto_ep import AutoEP
    from deepspeed.module_inject.auto_ep_config import parse_autoep_config

    on_cpu = next(model.parameters()).device.type == "cpu"
    replacer = AutoEP(model, parse_autoep_config(ds_section(config, on_cpu=on_cpu)))
    replacer.replace_moe_layers(replacer.ep_parser(), ep_size=1, ep_rank=0)
