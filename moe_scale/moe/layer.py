"""The mixture-of-experts layer, in five steps: route, plan the dispatch, exchange, run the experts, combine.

Shapes: B batch, S sequence, T = B*S tokens, D model width, E experts, K experts per token, N = T*K routed rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe_scale.config import MoEConfig
from moe_scale.initialization import Init
from moe_scale.moe import exchange
from moe_scale.moe.dispatch import capacity, combine_rows, gather_rows, plan_dispatch
from moe_scale.moe.experts import Experts
from moe_scale.moe.losses import assignments_per_expert, load_balance_loss, router_z_loss, routing_entropy
from moe_scale.moe.router import Router, Routing, softmax_top_k
from moe_scale.parallel.groups import ParallelGroups


class MoEStats(NamedTuple):
    """What one layer reports of one micro-batch on this rank. The two losses are unweighted and carry gradients."""

    aux_loss: Tensor
    """Load-balancing loss, 1 when even."""
    z_loss: Tensor
    """Router z-loss."""
    assignments_E: Tensor
    """fp32 (token, choice) pairs given to each expert, before drops."""
    dropped: Tensor
    """fp32 number of those pairs that found no place."""
    entropy: Tensor
    """Routing entropy as a share of log E."""


class MoELayer(nn.Module):
    """Top-k mixture of SwiGLU experts, from scratch: the ``custom`` backend.

    Args:
        config: the layer's settings.
        d_model: D.
        groups: process groups; with ``ep_size`` > 1 this rank holds E/ep_size experts.
        init: seeds the weights by their paths.
        depth_scale: factor on the initial standard deviation of the experts' output matrices.
    """

    def __init__(self, config: MoEConfig, d_model: int, groups: ParallelGroups, init: Init, depth_scale: float = 1.0):
        super().__init__()
        self.config, self.groups = config, groups
        self.router = Router(d_model, config.num_experts, init / "router")
        self.experts = Experts(
            d_model, config.intermediate_size, config.num_experts, groups, init / "experts", depth_scale
        )

    def forward(self, x_BSD: Tensor, valid_BS: Tensor | None = None) -> tuple[Tensor, MoEStats]:
        """Apply the layer.

        Args:
            x_BSD: hidden states.
            valid_BS: bool, False for padding: such tokens are sent to no expert, count in no loss and get 0.

        Returns:
            the experts' contribution to each token (0 for a dropped one, which so passes by the residual), and the
            layer's :class:`MoEStats`.
        """
        config, groups = self.config, self.groups
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        valid_T = None if valid_BS is None else valid_BS.reshape(-1)

        routing = softmax_top_k(self.router(x_TD), config.top_k, renormalize=config.renormalize)
        plan = plan_dispatch(
            routing.ids_TK,
            routing.probs_TE.gather(1, routing.ids_TK),
            config.num_experts,
            valid_T=valid_T,
            rows_per_expert=rows_per_expert(config, x_TD.shape[0], training=self.training),
            drop_policy=config.drop_policy,
        )
        rows_ND = gather_rows(x_TD, plan, config.top_k)
        if groups.ep_size == 1:
            rows_ND = self.experts(rows_ND, plan.counts_E)
        else:
            trip = exchange.plan_exchange(plan.counts_E, groups)
            rows_RD = self.experts(exchange.to_experts(rows_ND, trip, groups), trip.counts_L)
            rows_ND = exchange.from_experts(rows_RD, trip, groups)
        y_TD = combine_rows(rows_ND, plan, routing.weights_TK)
        return y_TD.view_as(x_BSD), make_stats(routing, config.num_experts, plan.dropped, valid_T)


def rows_per_expert(config: MoEConfig, num_tokens: int, *, training: bool) -> int | None:
    """The capacity C that the settings give for ``num_tokens`` tokens; None for dropless."""
    if config.dispatch == "dropless":
        return None
    factor = config.capacity_factor if training else config.eval_capacity_factor
    return capacity(num_tokens, config.top_k, config.num_experts, factor, config.min_capacity)


def make_stats(routing: Routing, num_experts: int, dropped: Tensor, valid_T: Tensor | None) -> MoEStats:
    """Losses and measures of one routing decision, the same for every backend."""
    assignments_E = assignments_per_expert(routing.ids_TK, num_experts, valid_T)
    with torch.no_grad():
        entropy = routing_entropy(routing.probs_TE, valid_T)
    return MoEStats(
        aux_loss=load_balance_loss(routing.probs_TE, assignments_E, valid_T),
        z_loss=router_z_loss(routing.logits_TE, valid_T),
        assignments_E=assignments_E.float(),
        dropped=dropped.float(),
        entropy=entropy.float(),
    )
