"""``moe.backend deepspeed``: the gate, dispatch and experts of ``deepspeed.moe``.

DeepSpeed's engine refuses its own class ``MoE`` under ZeRO-3. What it wraps, ``MOELayer`` over a ``TopKGate`` and
``Experts``, runs there once the experts are marked as :mod:`moe_scale.parallel.zero` says, so those are built here
directly. Routing decisions, drops, data movement and expert evaluation are DeepSpeed's; the losses and statistics are
computed from the same router scores as in every other backend, so that runs can be compared. With ``moe.conventions
deepspeed`` its capacity, its drops of top-1 and its balancing loss, which counts padding, are left to it as well.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from deepspeed.moe.experts import Experts as DeepSpeedExperts
from deepspeed.moe.sharded_moe import MOELayer, TopKGate, top1gating, top2gating, topkgating
from torch import Tensor, nn

from moe_scale.config import MoEConfig
from moe_scale.initialization import Init
from moe_scale.moe.conventions import deepspeed_top_k
from moe_scale.moe.dispatch import capacity
from moe_scale.moe.experts import activate, expert_stds
from moe_scale.moe.layer import MoEStats, SparseLayer, make_stats
from moe_scale.moe.placement import Placement, experts_of, whole
from moe_scale.moe.router import Router, softmax_top_k
from moe_scale.parallel.groups import ParallelGroups
from moe_scale.parallel.zero import full_shape, has_tutel, mark_expert_parameters, set_expert_group


class _Gate(TopKGate):
    """DeepSpeed's gate, which hands out its router scores and its choices together with its auxiliary loss."""

    def __init__(self, config: MoEConfig, d_model: int, init: Init):
        super().__init__(
            d_model,
            config.num_experts,
            config.top_k,
            config.capacity_factor,
            config.eval_capacity_factor,
            config.min_capacity,
            drop_tokens=config.dispatch == "capacity",
            use_rts=False,
            top2_2nd_expert_sampling=False,  # random choices, on by default; a comparison needs none
        )
        self.own_rules = config.conventions == "deepspeed"
        self.wg = Router(
            d_model, config.num_experts, init, config.router_init_scale
        )  # the seeded weight; the gate reads wg.weight alone

    def forward(
        self, input: Tensor, used_token: Any = None, sparse_routes: bool = False, use_tutel: bool = False
    ) -> Any:
        logits_TE = self.wg(input)
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        num_tokens, num_experts = logits_TE.shape
        if self.own_rules:
            # top1gating refuses a minimum above T, as generation from a short prompt has; it drops nothing either way.
            places = min(self.min_capacity, num_tokens)
        else:
            # Counted here, in whole numbers: DeepSpeed's fp32 product can land one above a whole share.
            places = capacity(num_tokens, self.k, num_experts, factor, self.min_capacity) if self.drop_tokens else 0
            factor = 0.0
        if self.k == 1:
            # Asked to drop, top1gating keeps an arbitrary choice of the tokens; undropped, it numbers them in order.
            drop = self.drop_tokens and self.own_rules
            routes = top1gating(
                logits_TE, factor, places, used_token, None, drop, self.use_rts, self.ep_group, sparse_routes, use_tutel
            )
            if self.drop_tokens and not drop:
                aux, _, _, ids_KT, places_KT, gates_KT, counts = routes
                over_KT = places_KT >= places
                routes = (
                    aux,
                    places,
                    num_experts,
                    ids_KT.masked_fill(over_KT, -1),
                    places_KT.masked_fill(over_KT, 0),
                    gates_KT,
                    counts,
                )
        elif self.k == 2:
            routes = top2gating(
                logits_TE,
                factor,
                places,
                self.drop_tokens,
                self.ep_group,
                self.top2_2nd_expert_sampling,
                sparse_routes,
            )
        else:
            routes = topkgating(
                logits_TE,
                self.k,
                factor,
                places,
                self.drop_tokens,
                self.ep_group,
                sparse_routes=sparse_routes,
            )
        return ((logits_TE, routes[3], routes[0]), *routes[1:])


class _Expert(nn.Module):
    """One expert, the unit that DeepSpeed's ``Experts`` loops over."""

    def __init__(self, config: MoEConfig, d_model: int, groups: ParallelGroups, init: Init, depth_scale: float):
        super().__init__()
        hidden, self.activation = config.intermediate_size, config.activation
        std_in, std_out = expert_stds(d_model, hidden, depth_scale)
        inner = 2 * hidden if config.activation == "swiglu" else hidden
        self.gate_up = nn.Parameter(torch.empty(inner, d_model))
        self.down = nn.Parameter(torch.empty(d_model, hidden))
        (init / "gate_up").normal_(self.gate_up, std_in)
        (init / "down").normal_(self.down, std_out)
        mark_expert_parameters(self.parameters(), groups)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(activate(F.linear(x, self.gate_up), self.activation), self.down)


class _Experts(DeepSpeedExperts):
    """DeepSpeed's loop over experts, filled with experts that are sharded where they are created.

    Its own constructor copies one expert; under ``zero.Init`` that one is already a shard by then.
    """

    def __init__(self, config: MoEConfig, d_model: int, groups: ParallelGroups, init: Init, depth_scale: float):
        nn.Module.__init__(self)
        local = groups.local_experts(config.num_experts)
        self.num_local_experts = len(local)
        self.deepspeed_experts = nn.ModuleList(
            _Expert(config, d_model, groups, init / expert, depth_scale) for expert in local
        )


class DeepSpeedMoE(SparseLayer):
    """``deepspeed.moe`` behind the interface of :class:`moe_scale.moe.layer.SparseLayer`.

    Padding tokens are routed like others (DeepSpeed masks them for top-1 alone); their results are unused, and they
    count in no loss.
    """

    def __init__(self, config: MoEConfig, d_model: int, groups: ParallelGroups, init: Init, depth_scale: float = 1.0):
        super().__init__(config, d_model, init, depth_scale)
        self.first_expert = groups.local_experts(config.num_experts)[0]
        self.layer = MOELayer(
            _Gate(config, d_model, init / "router"),
            _Experts(config, d_model, groups, init / "experts", depth_scale),
            f"ep_size_{groups.ep_size}",
            groups.ep_size,
            config.num_experts // groups.ep_size,
            use_tutel=has_tutel(),
        )
        set_expert_group(self.layer, groups)

    def run_experts(
        self, x_BSD: Tensor, valid_BS: Tensor | None, token_ids_BS: Tensor | None
    ) -> tuple[Tensor, MoEStats, Tensor | None]:
        config, layer = self.config, self.layer
        y_BSD = layer(x_BSD, None)
        # DeepSpeed leaves what it measured on the module; take it off, so that no graph outlives its step.
        logits_TE, routes_KT, own_aux_loss = layer.l_aux
        layer.l_aux = layer.exp_counts = None
        valid_T = None if valid_BS is None else valid_BS.reshape(-1)
        as_deepspeed = config.conventions == "deepspeed"
        routing = (
            deepspeed_top_k(logits_TE, config.top_k)
            if as_deepspeed
            else softmax_top_k(logits_TE, config.top_k, renormalize=config.renormalize)
        )
        lost_KT = routes_KT < 0
        dropped = lost_KT.sum() if valid_T is None else (lost_KT & valid_T).sum()
        stats = make_stats(config, routing, dropped, len(x_BSD), valid_T)
        if as_deepspeed:
            stats = stats._replace(aux_loss=own_aux_loss)
        return y_BSD, stats, self.run_dense(x_BSD)

    def placements(self) -> dict[str, Placement]:
        gate, experts = "layer.gate.wg.weight", "layer.experts.deepspeed_experts"
        found = {gate: whole("router.weight", tuple(full_shape(self.get_parameter(gate))))}
        for place, expert in enumerate(self.get_submodule(experts).children()):
            for name, parameter in expert.named_parameters():
                found[f"{experts}.{place}.{name}"] = experts_of(
                    f"experts.{name}",
                    self.config.num_experts,
                    self.first_expert + place,
                    1,
                    tuple(full_shape(parameter)),
                )
        return found
