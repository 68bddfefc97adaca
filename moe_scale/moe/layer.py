"""The mixture-of-experts layer, in five steps: route, plan the dispatch, exchange, run the experts, combine.

Shapes: B batch, S sequence, T = B*S tokens, D model width, E experts, K experts per token, N routed rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe_scale.config import MoEConfig
from moe_scale.initialization import Init
from moe_scale.moe import exchange, losses
from moe_scale.moe.conventions import deepspeed_capacity, deepspeed_keeps, deepspeed_top_k
from moe_scale.moe.dispatch import DispatchPlan, capacity, combine_rows, gather_rows, plan_dispatch, plan_expert_choice
from moe_scale.moe.experts import Experts, SharedExpert
from moe_scale.moe.placement import Placement, experts_of
from moe_scale.moe.router import (
    ExpertChoice,
    Router,
    Routing,
    balanced_bias,
    expert_choice,
    hash_top_k,
    jittered,
    noisy_top_k,
    sigmoid_top_k,
    softmax_top_k,
)
from moe_scale.parallel.collectives import sum_over_ranks
from moe_scale.parallel.groups import ParallelGroups
from moe_scale.parallel.zero import full_shape


class MoEStats(NamedTuple):
    """What one layer reports of one micro-batch on this rank. The two losses are unweighted and carry gradients."""

    aux_loss: Tensor
    """Load-balancing loss, 1 when even; 0 for routers that need none."""
    z_loss: Tensor
    """Router z-loss."""
    assignments_E: Tensor
    """fp32 (token, choice) pairs given to each expert, before drops."""
    dropped: Tensor
    """fp32 number of those pairs that found no place."""
    entropy: Tensor
    """Routing entropy as a share of log E."""
    logit_rms: Tensor
    """Root mean square of the router's scores."""


class SparseLayer(nn.Module):
    """What every backend shares: its interface, and the dense half of a layer that has one.

    A shared expert (``shared_intermediate_size``) adds its output to the experts'; in a Residual MoE (``residual``)
    the two are mixed by a softmax over two scores of the token.
    """

    def __init__(self, config: MoEConfig, d_model: int, init: Init, depth_scale: float):
        super().__init__()
        self.config = config
        hidden = config.intermediate_size if config.residual else config.shared_intermediate_size
        self.dense = SharedExpert(d_model, hidden, config.activation, init / "dense", depth_scale) if hidden else None
        self.mix = Router(d_model, 2, init / "mix") if config.residual else None

    def forward(
        self, x_BSD: Tensor, valid_BS: Tensor | None = None, token_ids_BS: Tensor | None = None
    ) -> tuple[Tensor, MoEStats]:
        """Apply the layer.

        Args:
            x_BSD: hidden states.
            valid_BS: bool, False for padding: such tokens are sent to no expert and count in no loss.
            token_ids_BS: int64 ids of the tokens, which hash routing needs and nothing else.

        Returns:
            the layer's contribution to each token (from the experts 0 for a dropped one, which so passes by the
            residual), and its :class:`MoEStats`.
        """
        y_BSD, stats, dense_BSD = self.run_experts(x_BSD, valid_BS, token_ids_BS)
        if dense_BSD is not None:
            if self.mix is not None:
                share = self.mix(x_BSD).softmax(dim=-1).to(y_BSD.dtype)
                return y_BSD * share[..., :1] + dense_BSD * share[..., 1:], stats
            y_BSD = y_BSD + dense_BSD
        return y_BSD, stats

    def run_dense(self, x_BSD: Tensor) -> Tensor | None:
        """The dense half's output, None without one. A backend calls it while its rows travel, or when it likes."""
        return None if self.dense is None else self.dense(x_BSD)

    def run_experts(
        self, x_BSD: Tensor, valid_BS: Tensor | None, token_ids_BS: Tensor | None
    ) -> tuple[Tensor, MoEStats, Tensor | None]:
        """The experts' output, the statistics, and the result of :meth:`run_dense`."""
        raise NotImplementedError

    def placements(self) -> dict[str, Placement]:
        """Where this rank's parameters lie in the logical tensors, where they are not logical tensors themselves."""
        raise NotImplementedError


class MoELayer(SparseLayer):
    """A mixture of experts from scratch: the ``custom`` backend.

    Args:
        config: the layer's settings.
        d_model: D.
        groups: process groups; with ``ep_size`` > 1 this rank holds E/ep_size experts.
        init: seeds the weights by their paths.
        depth_scale: factor on the initial standard deviation of the output matrices.
    """

    selection_bias_E: Tensor
    _keep_in_fp32_modules_strict = ("selection_bias_E",)  # DeepSpeed casts buffers to the training precision otherwise

    def __init__(self, config: MoEConfig, d_model: int, groups: ParallelGroups, init: Init, depth_scale: float = 1.0):
        super().__init__(config, d_model, init, depth_scale)
        self.groups = groups
        if config.router != "hash":
            self.router = Router(d_model, config.num_experts, init / "router", config.router_init_scale)
        if config.router == "noisy":
            self.noise = Router(d_model, config.num_experts, init / "noise", scale=0.0)
        if config.router == "sigmoid":
            self.register_buffer("selection_bias_E", torch.zeros(config.num_experts))
        self.experts = Experts(config, d_model, groups, init / "experts", depth_scale)

    def run_experts(
        self, x_BSD: Tensor, valid_BS: Tensor | None, token_ids_BS: Tensor | None
    ) -> tuple[Tensor, MoEStats, Tensor | None]:
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        valid_T = None if valid_BS is None else valid_BS.reshape(-1)
        routing = self.route(x_TD, valid_T, token_ids_BS)
        plan = self.plan(routing, len(x_TD), valid_T)
        if self.groups.ep_size == 1:  # nothing to exchange: the experts gather and combine where they read and write
            y_TD = self.experts(x_TD, plan.counts_E, plan)
            dense_BSD = self.run_dense(x_BSD)
        else:
            trip = exchange.plan_exchange(plan.counts_E, self.groups)
            # No name holds the rows of a step that is done: they would stay in memory to the end of the layer.
            rows_RD, dense_BSD = exchange.to_experts(
                gather_rows(x_TD, plan), trip, self.groups, lambda: self.run_dense(x_BSD)
            )
            rows_RD = self.experts(rows_RD, trip.counts_L)
            rows_ND = exchange.from_experts(rows_RD, trip, self.groups)
            del rows_RD
            y_TD = combine_rows(rows_ND, plan, len(x_TD))
        return y_TD.view_as(x_BSD), make_stats(self.config, routing, plan.dropped, len(x_BSD), valid_T), dense_BSD

    def route(self, x_TD: Tensor, valid_T: Tensor | None, token_ids_BS: Tensor | None) -> Routing | ExpertChoice:
        """Step 1: the decision of the router that the settings name."""
        config = self.config
        if config.router == "hash":
            assert token_ids_BS is not None, "hash routing needs the token ids"
            wide = torch.promote_types(x_TD.dtype, torch.float32)
            return hash_top_k(token_ids_BS.reshape(-1), config.num_experts, config.top_k, wide)
        if config.router_jitter and self.training:
            x_TD = jittered(x_TD, config.router_jitter)
        logits_TE = self.router(x_TD) / config.router_temperature
        if config.router == "noisy":
            return noisy_top_k(logits_TE, self.noise(x_TD), config.top_k, training=self.training)
        if config.router == "expert_choice":
            factor = config.capacity_factor if self.training else config.eval_capacity_factor
            tokens = capacity(len(x_TD), config.top_k, config.num_experts, factor, config.min_capacity)
            return expert_choice(logits_TE, tokens, valid_T)
        return choose_experts(config, logits_TE, self.selection_bias_E if config.router == "sigmoid" else None)

    def plan(self, routing: Routing | ExpertChoice, num_tokens: int, valid_T: Tensor | None) -> DispatchPlan:
        """Step 2: the rows that the decision gives."""
        config = self.config
        if isinstance(routing, ExpertChoice):
            return plan_expert_choice(routing.tokens_EC, routing.weights_EC, config.top_k, num_tokens, valid_T)
        as_deepspeed = config.conventions == "deepspeed"
        rows = rows_per_expert(config, num_tokens, training=self.training)
        priority_TK, drop_policy = routing.probs_TE.gather(1, routing.ids_TK), config.drop_policy
        if as_deepspeed and rows is not None and config.top_k != 2:
            priority_TK, drop_policy = deepspeed_keeps(routing, rows, valid_T).float(), "probability"
        return plan_dispatch(
            routing.ids_TK,
            routing.weights_TK,
            config.num_experts,
            priority_TK=priority_TK,
            valid_T=valid_T,
            rows_per_expert=rows,
            drop_policy=drop_policy,
            rescale_kept=as_deepspeed and config.top_k > 1,
            # An exchange sends rows that are somebody's. The loops of a CPU like fewer rows, and wait for nothing.
            trim=self.groups.ep_size > 1 or (routing.ids_TK.device.type == "cpu" and config.kernels != "triton"),
        )

    def placements(self) -> dict[str, Placement]:
        num_experts, local = self.config.num_experts, self.groups.local_experts(self.config.num_experts)
        return {
            f"experts.{name}": experts_of(
                f"experts.{name}", num_experts, local[0], len(local), tuple(full_shape(parameter)[1:])
            )
            for name, parameter in self.experts.named_parameters()
        }


def choose_experts(config: MoEConfig, logits_TE: Tensor, bias_E: Tensor | None = None) -> Routing:
    """What a router whose tokens choose decides by its scores alone: without noise, and not by hash.

    Args:
        bias_E: the selection bias of a sigmoid router.
    """
    if config.router == "sigmoid":
        assert bias_E is not None, "a sigmoid router has a selection bias"
        return sigmoid_top_k(logits_TE, bias_E, config.top_k, renormalize=config.renormalize)
    if config.conventions == "deepspeed":
        return deepspeed_top_k(logits_TE, config.top_k)
    return softmax_top_k(logits_TE, config.top_k, renormalize=config.renormalize)


def rows_per_expert(config: MoEConfig, num_tokens: int, *, training: bool) -> int | None:
    """The capacity C that the settings give for ``num_tokens`` tokens; None for dropless."""
    if config.dispatch == "dropless":
        return None
    factor = config.capacity_factor if training else config.eval_capacity_factor
    rule = deepspeed_capacity if config.conventions == "deepspeed" else capacity
    return rule(num_tokens, config.top_k, config.num_experts, factor, config.min_capacity)


def make_stats(
    config: MoEConfig, routing: Routing | ExpertChoice, dropped: Tensor, batch: int, valid_T: Tensor | None
) -> MoEStats:
    """Losses and measures of one routing decision, the same for every backend.

    Args:
        batch: sequences that the tokens form, for a loss by sequence.
    """
    probs_TE = routing.probs_TE
    none = probs_TE.new_zeros(())
    if isinstance(routing, ExpertChoice):  # even by construction
        assignments_E, aux_loss = routing.weights_EC.count_nonzero(dim=1), none
    else:
        assignments_E = losses.assignments_per_expert(routing.ids_TK, config.num_experts, valid_T)
        if config.router == "hash":  # nothing to learn
            aux_loss = none
        elif config.aux_loss_scope == "sequence":
            aux_loss = losses.sequence_load_balance_loss(probs_TE, routing.ids_TK, batch, valid_T)
        else:
            load_E = sum_over_ranks(assignments_E) if config.aux_loss_scope == "global" else assignments_E
            if config.conventions == "deepspeed" and config.top_k == 2:
                load_E = losses.assignments_per_expert(routing.ids_TK[:, :1], config.num_experts, valid_T)
            aux_loss = losses.load_balance_loss(probs_TE, load_E, valid_T)
    with torch.no_grad():
        entropy = losses.routing_entropy(probs_TE, valid_T)
        logit_rms = losses.root_mean_square(routing.logits_TE, valid_T)
    return MoEStats(
        aux_loss=aux_loss,
        z_loss=none if config.router == "hash" else losses.router_z_loss(routing.logits_TE, valid_T),
        assignments_E=assignments_E.float(),
        dropped=dropped.float(),
        entropy=entropy.float(),
        logit_rms=logit_rms.float(),
    )


@torch.no_grad()
def update_selection_biases(model: nn.Module, load_ME: Tensor, rate: float) -> None:
    """Move every sigmoid router's selection bias towards an even load; once after each optimizer step.

    Args:
        load_ME: (token, choice) pairs given to each expert in the step, over all micro-batches and ranks, one row a
            sparse layer in the order of ``model.modules()``.
        rate: u.
    """
    layers = [m for m in model.modules() if isinstance(m, MoELayer) and m.config.router == "sigmoid"]
    for layer, load_E in zip(layers, load_ME, strict=True):
        layer.selection_bias_E.copy_(balanced_bias(layer.selection_bias_E, load_E, rate))
