"""What ``deepspeed.moe`` does otherwise than this project, for ``moe.conventions deepspeed``.

Written after ``deepspeed/moe/sharded_moe.py`` (``top1gating``, ``top2gating``, ``topkgating``), with random token
selection and sampling of the second expert turned off:

- capacity is rounded up from an fp32 product and is not limited to T;
- of more tokens than an expert takes, those stay that ``torch.topk`` names: for K = 1 among ones and zeros, so
  whichever it meets; for K > 2 the most probable ones. For K = 2 first choices in token order go before second ones;
- for K > 1 a token's weights are rescaled over the choices that are kept (in :func:`plan_dispatch`);
- the balancing loss of K = 2 counts first choices alone (in :func:`make_stats`).

Shapes: T tokens, E experts, K experts per token, C tokens per expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_scale.moe.router import Routing


def deepspeed_capacity(num_tokens: int, top_k: int, num_experts: int, factor: float, minimum: int) -> int:
    """Rows that one expert takes at most: ceil(T / E * (factor * K)) of an fp32 product, from ``minimum`` up."""
    # The same product of a Python float and an fp32 tensor: one rounded otherwise is a row more or less.
    share = (num_tokens / num_experts) * torch.tensor(factor * top_k, dtype=torch.float32, device="cpu")
    return max(int(share.ceil()), minimum)


def deepspeed_top_k(logits_TE: Tensor, top_k: int) -> Routing:
    """The K most probable experts, equal ones chosen as ``deepspeed.moe`` chooses; weights are not rescaled here."""
    probs_TE = logits_TE.softmax(dim=-1)
    if top_k > 2:
        weights_TK, ids_TK = probs_TE.topk(top_k, dim=-1)
        return Routing(logits_TE, probs_TE, ids_TK, weights_TK)
    ids_TK = probs_TE.argmax(dim=-1, keepdim=True)
    if top_k == 2:
        second_T1 = logits_TE.scatter(1, ids_TK, float("-inf")).argmax(dim=-1, keepdim=True)
        ids_TK = torch.cat([ids_TK, second_T1], dim=1)
    return Routing(logits_TE, probs_TE, ids_TK, probs_TE.gather(1, ids_TK))


def deepspeed_keeps(routing: Routing, rows_per_expert: int, valid_T: Tensor | None) -> Tensor:
    """Which choices their experts keep, for K = 1 and K > 2. Returns bool [T, K]."""
    ids_TK, (num_tokens, num_experts) = routing.ids_TK, routing.probs_TE.shape
    if ids_TK.shape[1] == 1:
        wanted_TE = F.one_hot(ids_TK[:, 0], num_experts)
    else:
        wanted_TE = torch.zeros_like(routing.probs_TE).scatter(1, ids_TK, routing.weights_TK.detach())
    if valid_T is not None:
        wanted_TE = wanted_TE * valid_T.unsqueeze(1)
    kept_CE = wanted_TE.topk(min(rows_per_expert, num_tokens), dim=0, sorted=ids_TK.shape[1] == 1).indices
    return torch.zeros_like(wanted_TE, dtype=torch.bool).scatter(0, kept_CE, True).gather(1, ids_TK)
