"""Losses and measures of the router. T = B*S tokens in B sequences of S, E experts, K experts per token.

Each takes ``valid_T`` (bool, True for real tokens) or None when all tokens are real; padding counts nowhere.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moe_scale.moe.dispatch import count_ids


def assignments_per_expert(ids_TK: Tensor, num_experts: int, valid_T: Tensor | None = None) -> Tensor:
    """How many (token, choice) pairs each expert was given, before any drop. Returns int64 counts_E."""
    ids_N = ids_TK.flatten()
    if valid_T is not None:
        # Padding is counted in a bin of its own: a selection would make the host wait for its size.
        ids_N = torch.where(valid_T.repeat_interleave(ids_TK.shape[1]), ids_N, num_experts)
    return count_ids(ids_N, num_experts + 1)[:num_experts]


def load_balance_loss(probs_TE: Tensor, assignments_E: Tensor, valid_T: Tensor | None = None) -> Tensor:
    """E * sum_e f_e * P_e (arXiv 2101.03961, equations 4 to 6), for any K.

    f_e is the share of all T*K assignments that expert e was given, so that the f_e sum to 1 for any K and an even
    load gives exactly 1; P_e is the mean probability of expert e. Only P_e carries a gradient. Hugging Face's
    ``load_balancing_loss_func`` sums over the K choices instead of averaging, and so is K times this.

    With the assignments of all ranks it balances the global load (arXiv 2501.11873): the loss is linear in P_e, so
    the average of the ranks' losses is the loss of the joined batch where ranks have equally many real tokens.
    """
    share_E = assignments_E.to(probs_TE.dtype) / assignments_E.sum().clamp(min=1)
    return probs_TE.shape[-1] * (share_E * _mean_over_tokens(probs_TE, valid_T)).sum()


def sequence_load_balance_loss(probs_TE: Tensor, ids_TK: Tensor, batch: int, valid_T: Tensor | None = None) -> Tensor:
    """:func:`load_balance_loss` of each of the ``batch`` sequences, averaged over those that hold a real token.

    Stricter than the batch's: a batch can be even while each of its sequences uses a few experts only.
    """
    num_experts, top_k = probs_TE.shape[1], ids_TK.shape[1]
    weight_T = probs_TE.new_ones(len(probs_TE)) if valid_T is None else valid_T.to(probs_TE.dtype)
    seq_len = len(probs_TE) // max(batch, 1)
    weight_BS = weight_T.view(batch, seq_len)
    tokens_B = weight_BS.sum(dim=1)
    chosen_TE = torch.zeros_like(probs_TE).scatter_(1, ids_TK, 1.0)
    per_token = torch.stack([chosen_TE.detach() / top_k, probs_TE]) * weight_T.unsqueeze(1)
    share_BE, mean_BE = per_token.view(2, batch, seq_len, num_experts).sum(dim=2) / tokens_B.clamp(min=1).unsqueeze(1)
    loss_B = num_experts * (share_BE * mean_BE).sum(dim=1)
    return loss_B.sum() / (tokens_B > 0).sum().clamp(min=1)


def router_z_loss(logits_TE: Tensor, valid_T: Tensor | None = None) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2 (arXiv 2202.08906, equation 5): keeps the logits small."""
    return _mean_over_tokens(logits_TE.logsumexp(dim=-1).square(), valid_T)


def routing_entropy(probs_TE: Tensor, valid_T: Tensor | None = None) -> Tensor:
    """Mean entropy of a token's distribution over experts as a share of log E: 0 is certain, 1 undecided."""
    num_experts = probs_TE.shape[-1]
    if num_experts == 1:
        return probs_TE.new_zeros(())
    entropy_T = torch.special.entr(probs_TE).sum(dim=-1) / math.log(num_experts)
    return _mean_over_tokens(entropy_T, valid_T)


def root_mean_square(logits_TE: Tensor, valid_T: Tensor | None = None) -> Tensor:
    """Root of the mean square of the scores of all tokens; 0 without a token."""
    return _mean_over_tokens(logits_TE.square().mean(dim=-1), valid_T).sqrt()


def _mean_over_tokens(values: Tensor, valid_T: Tensor | None) -> Tensor:
    """Mean over the first dimension, real tokens only; 0 when there is none."""
    if valid_T is None:
        return values.sum(dim=0) / max(values.shape[0], 1)
    mask = valid_T.view(-1, *[1] * (values.dim() - 1)).to(values.dtype)
    return (values * mask).sum(dim=0) / valid_T.sum().clamp(min=1)
