"""Which tokens go to which experts: load by layer and by group of tokens, and how much an expert tells of the group.

Shapes: B batch, S sequence, T = B*S tokens, E experts, K experts per token, G groups.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_scale.moe.layer import MoELayer
from moe_scale.moe.router import ExpertChoice


@dataclass
class Grouping:
    """One way of sorting tokens, and the load of each group.

    Attributes:
        groups: their names (G).
        counts_GE: (token, choice) pairs of each group given to each expert, before any drop.
    """

    groups: list[str]
    counts_GE: Tensor

    def shares(self) -> Tensor:
        """Of each group's pairs, the share that each expert was given, [G, E]; 0 for groups without one."""
        return self.counts_GE / self.counts_GE.sum(dim=1, keepdim=True).clamp(min=1)

    def occurring(self) -> Grouping:
        """The same without the groups that no token is in."""
        kept = [row for row, counts_E in enumerate(self.counts_GE) if float(counts_E.sum())]
        return Grouping([self.groups[row] for row in kept], self.counts_GE[kept])

    @property
    def mutual_information(self) -> float:
        """What the expert of a pair tells of its token's group, in bits: sum p(g,e) log2(p(g,e) / p(g)p(e)).

        0 where every group is spread alike; at most the entropy of the groups. A sample has a little by chance alone:
        :attr:`chance`.
        """
        joint_GE = self.counts_GE / self.counts_GE.sum().clamp(min=1)
        apart_GE = joint_GE.sum(dim=1, keepdim=True) * joint_GE.sum(dim=0, keepdim=True)
        terms_GE = torch.where(joint_GE > 0, joint_GE * (joint_GE / apart_GE.clamp(min=1e-300)).log2(), 0.0)
        return max(0.0, float(terms_GE.sum()))

    @property
    def entropy(self) -> float:
        """Entropy of the groups in bits: the most that an expert could tell."""
        shares_G = self.counts_GE.sum(dim=1) / self.counts_GE.sum().clamp(min=1)
        return float(torch.special.entr(shares_G).sum()) / math.log(2)

    @property
    def chance(self) -> float:
        """Bits of mutual information expected of as many pairs if experts knew nothing of groups.

        (G' - 1)(E' - 1) / (2 N ln 2) over the groups and experts that occur (Miller 1955), as if pairs were drawn
        independently, which tokens of one sentence are not.
        """
        groups, experts = (int((self.counts_GE.sum(dim=dim) > 0).sum()) for dim in (1, 0))
        pairs = float(self.counts_GE.sum())
        return max(groups - 1, 0) * max(experts - 1, 0) / (2 * pairs * math.log(2)) if pairs else 0.0


class LayerUsage:
    """The load of one sparse layer, in total and by each grouping.

    Args:
        num_experts: E.
        groupings: names of the groupings, each with those of its groups.
    """

    def __init__(self, num_experts: int, groupings: Mapping[str, Sequence[str]]):
        self.groupings = {
            name: Grouping(list(groups), torch.zeros(len(groups), num_experts, dtype=torch.float64))
            for name, groups in groupings.items()
        }
        self.counts_E = torch.zeros(num_experts, dtype=torch.float64)

    def add(self, chosen_TE: Tensor, groups: Mapping[str, Tensor]) -> None:
        """Count tokens.

        Args:
            chosen_TE: bool, the experts that each token was given to.
            groups: for each grouping the tokens' groups, int64 [T]; -1 for a token that is in none.
        """
        chosen_TE = chosen_TE.cpu().double()
        self.counts_E += chosen_TE.sum(dim=0)
        for name, groups_T in groups.items():
            counted = (groups_T >= 0).cpu()
            self.groupings[name].counts_GE.index_add_(0, groups_T.cpu()[counted], chosen_TE[counted])

    @property
    def load_max(self) -> float:
        """The largest load over the mean; 1 is even."""
        return float(self.counts_E.max() / self.counts_E.mean().clamp(min=1e-12))

    @property
    def load_cv(self) -> float:
        """Standard deviation of the experts' load over its mean."""
        return float(self.counts_E.std(correction=0) / self.counts_E.mean().clamp(min=1e-12))

    @property
    def unused(self) -> int:
        """Experts that got less than a hundredth of an even share."""
        return int((self.counts_E < 0.01 * self.counts_E.mean()).sum())


@contextmanager
def watched_choices(model: nn.Module) -> Iterator[list[tuple[str, Tensor, Tensor]]]:
    """Record, at each forward pass of a model in evaluation mode, what every sparse layer chooses.

    Yields:
        a list that grows by (the layer's name, chosen_TE bool, valid_T bool) and that the caller empties.
    """
    seen: list[tuple[str, Tensor, Tensor]] = []

    def watch(name: str, layer: MoELayer) -> Any:
        def before(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            x_BSD, valid_BS, ids_BS = (*inputs, None, None)[:3]
            x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
            valid_T = None if valid_BS is None else valid_BS.reshape(-1)
            # In evaluation a router draws nothing, so it decides now as it will in the pass itself.
            routing = layer.route(x_TD, valid_T, ids_BS)
            all_valid_T = torch.ones(len(x_TD), dtype=torch.bool, device=x_TD.device)
            seen.append((name, chosen_experts(routing, len(x_TD)), all_valid_T if valid_T is None else valid_T))

        return layer.register_forward_pre_hook(before)

    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}
    handles = [watch(name, layer) for name, layer in layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def chosen_experts(routing: Any, num_tokens: int) -> Tensor:
    """bool [T, E]: the experts that a router's decision gives each token to."""
    chosen_TE = torch.zeros(num_tokens, routing.probs_TE.shape[1], dtype=torch.bool, device=routing.probs_TE.device)
    if isinstance(routing, ExpertChoice):
        taken_EC = routing.weights_EC > 0
        experts_EC = torch.arange(len(taken_EC), device=taken_EC.device).unsqueeze(1).expand_as(taken_EC)
        chosen_TE[routing.tokens_EC[taken_EC], experts_EC[taken_EC]] = True
        return chosen_TE
    return chosen_TE.scatter_(1, routing.ids_TK, True)
