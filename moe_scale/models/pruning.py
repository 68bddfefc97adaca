"""Fewer experts in a trained model: some are kept, the others dropped or merged into them.

Shapes: E experts, D model width, F expert hidden width; I = 2F for a gated activation, else F.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from moe_scale.config import MoEConfig
from moe_scale.errors import Problem
from moe_scale.initialization import Init
from moe_scale.models.layers import is_sparse
from moe_scale.moe.layer import MoELayer
from moe_scale.parallel.groups import ParallelGroups

TOKENS_CHOOSE = ("softmax", "noisy", "sigmoid")
"""Routers whose experts can be dropped: tokens choose them, by a learned score of each."""

PER_EXPERT = ("router.weight", "noise.weight", "selection_bias_E")
"""Tensors of a layer beside the experts that have a row for each of them."""

Groups = Sequence[Sequence[int]]
"""Of one layer, in ascending order of their first members: the experts that become one, the kept one first."""


def kept_number(num_experts: int, share: float) -> int:
    """How many experts a share of them is, at least one."""
    return max(1, round(num_experts * share))


def pruned_config(moe: MoEConfig, num_kept: int) -> MoEConfig:
    """The settings of layers with ``num_kept`` of the experts. ``top_k`` stays where there are as many."""
    ep_size = math.gcd(moe.ep_size, num_kept) if moe.ep_size else 0
    return replace(moe, num_experts=num_kept, top_k=min(moe.top_k, num_kept), ep_size=ep_size)


def pruning_problems(where: str, moe: MoEConfig, num_layers: int, num_kept: int) -> list[Problem]:
    """Why experts of a model with these settings cannot be dropped."""
    if not any(is_sparse(moe, layer) for layer in range(num_layers)):
        return [Problem(where, "holds a dense model, which has no experts", "give a run with moe.enabled")]
    if moe.router == "hash":
        what = "was trained with moe.router hash, which sends a token to experts by its number and has no scores"
        return [Problem(where, what, f"experts can be dropped of the routers {', '.join(TOKENS_CHOOSE)}")]
    if moe.router == "expert_choice":
        what = "was trained with moe.router expert_choice, whose experts all take equally many tokens and would take "
        what += "other ones were they fewer"
        return [Problem(where, what, f"experts can be dropped of the routers {', '.join(TOKENS_CHOOSE)}")]
    if num_kept >= moe.num_experts:
        return [Problem("--keep", f"keeps all {moe.num_experts} experts", "choose a smaller share")]
    if num_kept < moe.top_k and moe.every > 1:
        what = f"leaves {num_kept} experts for moe.top_k = {moe.top_k}, by which the dense layers between are sized"
        return [Problem("--keep", what, f"keep at least {moe.top_k} of the {moe.num_experts} experts")]
    return []


def sparse_layers(model: nn.Module) -> dict[str, MoELayer]:
    """The layers with experts of a model that :func:`moe_scale.models.build.build_model` built, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}


def highest(scores_E: Tensor, num_kept: int) -> list[int]:
    """The experts with the highest scores, in ascending order of their numbers; of equal ones the first."""
    return sorted(scores_E.argsort(descending=True, stable=True)[:num_kept].tolist())


def grouped(similarity_EE: Tensor, kept: Sequence[int]) -> list[list[int]]:
    """Every dropped expert joins the kept one that it is most similar to (arXiv 2310.01334)."""
    groups = {expert: [expert] for expert in sorted(kept)}
    similarity_EK = similarity_EE[:, sorted(kept)]
    for expert, place in enumerate(similarity_EK.argmax(dim=1).tolist()):
        if expert not in groups:
            groups[sorted(kept)[place]].append(expert)
    return list(groups.values())


@torch.no_grad()
def pruned_layer(layer: MoELayer, groups: Groups, usage_E: Tensor | None = None) -> MoELayer:
    """The layer with one expert for each group. What every token passes (``dense``, ``mix``) stays as it is.

    Scores of dropped experts are gone, so that a router gives what it would if they were -inf: weights of the others
    are a softmax over fewer. A group's expert has the router's row of its first member: where M-SMoE (arXiv 2310.01334)
    keeps all rows, and one expert answers to several, this layer has one row an expert.

    Args:
        layer: stays as it is.
        groups: experts by the group that they become.
        usage_E: how often each expert is chosen; their weights are averaged by it. None leaves the first of each
            group as it is, and the others out.
    """
    first = torch.tensor([group[0] for group in groups])
    state = dict(layer.state_dict())
    for name in PER_EXPERT:
        if name in state:
            state[name] = state[name][first]
    experts = {name.removeprefix("experts."): values for name, values in state.items() if name.startswith("experts.")}
    if usage_E is None:
        chosen = {name: values[first] for name, values in experts.items()}
    else:
        merged = [merge(experts, group, usage_E, gated=layer.config.activation == "swiglu") for group in groups]
        chosen = {name: torch.stack([expert[name] for expert in merged]) for name in experts}
    state |= {f"experts.{name}": values for name, values in chosen.items()}
    config, d_model = pruned_config(layer.config, len(groups)), layer.experts.gate_up.shape[2]
    with torch.device("meta"):
        pruned = MoELayer(config, d_model, ParallelGroups(), Init(0))
    pruned.load_state_dict(state, assign=True)
    return pruned.train(layer.training)


def prune_model(model: Any, groups: Mapping[str, Groups], usage: Mapping[str, Tensor] | None = None) -> Any:
    """The model with its sparse layers pruned as :func:`pruned_layer` does it; other tensors are shared with ``model``.

    Args:
        model: with the settings of its sparse layers as ``moe_config``; stays as it is.
        groups: of each of its sparse layers, equally many.
        usage: of each layer, to merge by; None drops.
    """
    layers = sparse_layers(model)
    num_kept = {len(found) for found in groups.values()}
    if groups.keys() != layers.keys() or len(num_kept) != 1:
        raise ValueError("every sparse layer needs groups, and as many as the others")
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    usages = dict(usage or {})
    shared |= {id(layer): pruned_layer(layer, groups[name], usages.get(name)) for name, layer in layers.items()}
    pruned = copy.deepcopy(model, shared)  # a copy in which what is named here stands for itself, or is replaced
    pruned.moe_config = pruned_config(model.moe_config, num_kept.pop())
    return pruned


@torch.no_grad()
def merge(experts: Mapping[str, Tensor], group: Sequence[int], usage_E: Tensor, *, gated: bool) -> dict[str, Tensor]:
    """One expert of a group: the average of their weights by usage, each brought into the first one's order of neurons.

    Args:
        experts: stacked weights, as :class:`moe_scale.moe.experts.Experts` names them.
        group: numbers of the experts.
        usage_E: their weights in the average; where all are 0, the first expert stays as it is.
        gated: whether the first half of ``gate_up`` is a gate.
    """
    reference = _expert(experts, group[0])
    total = float(usage_E[list(group)].sum())
    if not total:
        return reference
    members = [reference, *(aligned(_expert(experts, e), reference, gated=gated) for e in group[1:])]
    shares = [float(usage_E[expert]) / total for expert in group]
    return {
        name: torch.stack([member[name] * share for member, share in zip(members, shares, strict=True)]).sum(dim=0)
        for name in reference
    }


def aligned(expert: Mapping[str, Tensor], reference: Mapping[str, Tensor], *, gated: bool) -> dict[str, Tensor]:
    """The same function with its hidden neurons in another order: the one that is nearest to the reference.

    Neurons of two experts that were trained apart have no common order, and their average would be of unlike ones. The
    order that makes the sum of squared differences least is a linear assignment (arXiv 2209.04836, section 3.2, where
    the maps before and after are the same for both, as they are here).
    """
    similarity_FF = _neurons(reference, gated) @ _neurons(expert, gated).t()
    order_F = torch.from_numpy(linear_sum_assignment(similarity_FF.detach().cpu().double().numpy(), maximize=True)[1])
    rows_I = torch.cat([order_F, order_F + len(order_F)]) if gated else order_F
    out = {"gate_up": expert["gate_up"][rows_I], "down": expert["down"][:, order_F]}
    if "gate_up_bias" in expert:
        out |= {"gate_up_bias": expert["gate_up_bias"][rows_I], "down_bias": expert["down_bias"]}
    return out


def _expert(experts: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    return {name: values[number] for name, values in experts.items()}


def _neurons(expert: Mapping[str, Tensor], gated: bool) -> Tensor:
    """All weights of each hidden neuron: its rows in the input map, its biases, its column in the output map."""
    parts = [*expert["gate_up"].chunk(2 if gated else 1), expert["down"].t()]
    if "gate_up_bias" in expert:
        parts += [bias.unsqueeze(1) for bias in expert["gate_up_bias"].chunk(2 if gated else 1)]
    return torch.cat(parts, dim=1).float()
