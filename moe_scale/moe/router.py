"""Step 1, route: which experts take each token, and with which weight.

Shapes: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_scale.initialization import Init


class Routing(NamedTuple):
    """The router's decision for T tokens."""

    logits_TE: Tensor
    """fp32 scores before the softmax."""
    probs_TE: Tensor
    """fp32 softmax of the logits."""
    ids_TK: Tensor
    """int64 experts of each token, most probable first."""
    weights_TK: Tensor
    """fp32 factors of the experts' outputs in the token's sum."""


class Router(nn.Module):
    """One linear map to E scores, computed in fp32 whatever the model's precision.

    The softmax of a bf16 score is off by several per cent; "selective precision" (arXiv 2101.03961, section 2.4)
    keeps the router alone in fp32 and trains as stably as an all-fp32 model.
    """

    def __init__(self, d_model: int, num_experts: int, init: Init):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        init.normal_(self.weight, std=d_model**-0.5)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Scores of T tokens. Returns fp32 (or wider) logits_TE."""
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        return F.linear(x_TD.to(wide), self.weight.to(wide))


def softmax_top_k(logits_TE: Tensor, top_k: int, *, renormalize: bool) -> Routing:
    """Softmax over all experts, then the K most probable (arXiv 1701.06538 without noise; 2101.03961 for K=1).

    With ``renormalize`` the K weights of a token sum to 1. For K=1 that would make the weight a constant 1 and
    leave the router without a gradient, so it never applies there.
    """
    probs_TE = logits_TE.softmax(dim=-1)
    weights_TK, ids_TK = probs_TE.topk(top_k, dim=-1)
    if renormalize and top_k > 1:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    return Routing(logits_TE, probs_TE, ids_TK, weights_TK)
