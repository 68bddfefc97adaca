"""The mixture of experts written to be obviously right: every expert computes every token, one-hot tensors choose.

Slow by design, and in the type of its input, so that fp64 gives a reference to hold outputs and gradients against.

Shapes: T tokens, D model width, F expert hidden width, E experts, K experts per token.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class OracleResult(NamedTuple):
    """What :func:`dense_moe` returns."""

    output_TD: Tensor
    aux_loss: Tensor
    z_loss: Tensor
    assignments_E: Tensor
    """int64 (token, choice) pairs given to each expert, before drops."""
    dropped: int
    """Pairs of real tokens that found no place."""
    ids_TK: Tensor
    """int64 experts of each token, most probable first."""
    kept_TK: Tensor
    """bool, True where the expert takes the token."""


def dense_moe(
    x_TD: Tensor,
    router_ED: Tensor,
    gate_up_EHD: Tensor,
    down_EDF: Tensor,
    *,
    top_k: int,
    renormalize: bool,
    valid_T: Tensor | None = None,
    rows_per_expert: int | None = None,
    drop_policy: Literal["position", "probability"] = "position",
    as_deepspeed: bool = False,
) -> OracleResult:
    """y_t = sum_k weight_tk * down_e(silu(gate_e x_t) * up_e x_t) over the choices e = ids_tk that are kept.

    Args:
        gate_up_EHD: H = 2F; the first F rows of an expert are its gate.
        top_k: K.
        renormalize: the K weights of a token are rescaled to sum to 1, for K > 1 alone.
        valid_T: False for padding.
        rows_per_expert: what an expert takes at most; None is dropless.
        drop_policy: see :func:`kept_choices`.
        as_deepspeed: what ``deepspeed.moe`` does otherwise under a capacity: a token's weights are rescaled over the
            choices that are kept.
    """
    num_tokens, num_experts = x_TD.shape[0], router_ED.shape[0]
    valid_T = torch.ones(num_tokens, dtype=torch.bool) if valid_T is None else valid_T

    logits_TE = torch.einsum("td,ed->te", x_TD, router_ED)
    probs_TE = logits_TE.softmax(dim=-1)
    ids_TK = probs_TE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    chosen_TKE = F.one_hot(ids_TK, num_experts).to(x_TD.dtype)
    chosen_probs_TK = torch.einsum("te,tke->tk", probs_TE, chosen_TKE)
    rescale = renormalize and top_k > 1
    weights_TK = chosen_probs_TK / chosen_probs_TK.sum(dim=-1, keepdim=True) if rescale else chosen_probs_TK

    kept_TK = kept_choices(ids_TK, chosen_probs_TK.detach(), valid_T, rows_per_expert, drop_policy)
    kept_weights_TK = weights_TK * kept_TK
    if as_deepspeed and rescale:
        kept_share_T1 = kept_weights_TK.sum(dim=-1, keepdim=True)
        kept_weights_TK = kept_weights_TK / torch.where(kept_share_T1 > 0, kept_share_T1, 1.0)

    gate_EFD, up_EFD = gate_up_EHD.chunk(2, dim=1)
    gate_TEF = torch.einsum("td,efd->tef", x_TD, gate_EFD)
    up_TEF = torch.einsum("td,efd->tef", x_TD, up_EFD)
    expert_out_TED = torch.einsum("tef,edf->ted", F.silu(gate_TEF) * up_TEF, down_EDF)
    combine_TE = torch.einsum("tk,tke->te", kept_weights_TK, chosen_TKE)
    output_TD = torch.einsum("te,ted->td", combine_TE, expert_out_TED)

    assignments_E = torch.einsum("t,tke->e", valid_T.to(x_TD.dtype), chosen_TKE)
    share_E = assignments_E / max(float(assignments_E.sum()), 1.0)
    num_valid = max(int(valid_T.sum()), 1)
    mean_prob_E = probs_TE[valid_T].sum(dim=0) / num_valid
    return OracleResult(
        output_TD,
        aux_loss=num_experts * torch.einsum("e,e->", share_E, mean_prob_E),
        z_loss=(logits_TE[valid_T].exp().sum(dim=-1).log() ** 2).sum() / num_valid,
        assignments_E=assignments_E.long(),
        dropped=int((~kept_TK & valid_T.unsqueeze(1)).sum()),
        ids_TK=ids_TK,
        kept_TK=kept_TK,
    )


def kept_choices(
    ids_TK: Tensor, probs_TK: Tensor, valid_T: Tensor, rows_per_expert: int | None, drop_policy: str
) -> Tensor:
    """Which choices find a place, by handing out places one at a time. Returns bool [T, K].

    ``position`` serves the first choices of all tokens in order, then all second choices, and so on; ``probability``
    serves the most probable first. Padding is not served and takes no place.
    """
    num_tokens, top_k = ids_TK.shape
    if drop_policy == "position":
        queue = [(token, choice) for choice in range(top_k) for token in range(num_tokens)]
    else:
        in_order = [(token, choice) for token in range(num_tokens) for choice in range(top_k)]
        queue = sorted(in_order, key=lambda pair: -float(probs_TK[pair]))  # stable: equal ones keep their order
    taken: dict[int, int] = {}
    kept_TK = torch.zeros(num_tokens, top_k, dtype=torch.bool)
    for token, choice in queue:
        expert = int(ids_TK[token, choice])
        has_place = rows_per_expert is None or taken.get(expert, 0) < rows_per_expert
        if valid_T[token] and has_place:
            kept_TK[token, choice] = True
            taken[expert] = taken.get(expert, 0) + 1
    return kept_TK
