"""Which experts of each layer a pruned model keeps, by one of several rankings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from moe_scale.evaluate.expert_scores import Reconstruction, layer_inputs, logit_similarity, output_norms, usage
from moe_scale.models.pruning import Groups, grouped, highest, pruned_layer, sparse_layers
from moe_scale.moe.layer import MoELayer

RANKINGS = {
    "usage": "how often an expert is chosen",
    "output_norm": "mean of router weight times norm of the output, over an expert's tokens (REAP)",
    "reconstruction": "drop one after the other, each time the one without which the layer's output moves least",
    "random": "drawn by --seed: the control",
}


@dataclass(frozen=True)
class Method:
    """A way to get rid of experts: by which ranking, and whether those that go are merged into those that stay."""

    by: str
    merge: bool = False
    seed: int = 0

    @property
    def name(self) -> str:
        """For tables and folders."""
        return f"random-{self.seed}" if self.by == "random" else self.by + ("-merge" if self.merge else "")


@dataclass(frozen=True)
class LayerChoice:
    """What became of the experts of one layer.

    Attributes:
        groups: experts that become one, the kept one first.
        usage_E: how many of the calibration tokens chose each expert.
        moved: squared distance of the layer's output from what it was, over its squared norm, on those tokens.
    """

    groups: Groups
    usage_E: Tensor
    moved: float

    @property
    def usage_kept(self) -> float:
        """Share of the tokens' choices that fell on experts that are kept."""
        kept = [group[0] for group in self.groups]
        return float(self.usage_E[kept].sum() / self.usage_E.sum())


Choice = dict[str, LayerChoice]
"""By the name of the layer."""


@torch.no_grad()
def choose(model: nn.Module, batches: Iterable[Any], methods: Sequence[Method], num_kept: int) -> dict[Method, Choice]:
    """The choice of each method, by what the whole model makes of the calibration text: a layer is judged by what it is
    given while all others have all of their experts.

    Args:
        model: in evaluation mode, its experts dropless.
        batches: packed calibration text on the model's device, without padding.
        num_kept: experts that each layer keeps.
    """
    inputs = layer_inputs(model, batches)
    draws = {method: torch.Generator().manual_seed(method.seed) for method in methods}
    choices: dict[Method, Choice] = {method: {} for method in methods}
    for name, layer in track(sparse_layers(model).items(), description="ranking", transient=True):
        x_TD = inputs.pop(name)
        usage_E = usage(layer, x_TD)
        before_TD = layer(x_TD.unsqueeze(0))[0]
        for method in methods:
            kept = _kept(method, layer, x_TD, usage_E, num_kept, draws[method])
            groups: Groups = [[expert] for expert in kept]
            if method.merge:
                groups = grouped(logit_similarity(layer, x_TD), kept)
            after_TD = pruned_layer(layer, groups, usage_E if method.merge else None)(x_TD.unsqueeze(0))[0]
            moved = float((after_TD - before_TD).square().sum() / before_TD.square().sum())
            choices[method][name] = LayerChoice(groups, usage_E.cpu(), moved)
    return choices


def _kept(
    method: Method, layer: MoELayer, x_TD: Tensor, usage_E: Tensor, num_kept: int, draw: torch.Generator
) -> list[int]:
    if method.by == "random":
        return sorted(torch.randperm(layer.config.num_experts, generator=draw)[:num_kept].tolist())
    if method.by == "reconstruction":
        return Reconstruction(layer, x_TD).eliminate(num_kept)
    return highest(usage_E if method.by == "usage" else output_norms(layer, x_TD), num_kept)
