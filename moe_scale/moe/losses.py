"""Losses and measures of the router. T tokens, E experts, K experts per token.

Each takes ``valid_T`` (bool, True for real tokens) or None when all tokens are real; padding counts nowhere.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def assignments_per_expert(ids_TK: Tensor, num_experts: int, valid_T: Tensor | None = None) -> Tensor:
    """How many (token, choice) pairs each expert was given, before any drop. Returns int64 counts_E."""
    ids = ids_TK if valid_T is None else ids_TK[valid_T]
    return torch.bincount(ids.flatten(), minlength=num_experts)


def load_balance_loss(probs_TE: Tensor, assignments_E: Tensor, valid_T: Tensor | None = None) -> Tensor:
    """E * sum_e f_e * P_e (arXiv 2101.03961, equations 4 to 6), for any K.

    f_e is the share of all T*K assignments that expert e was given, so that the f_e sum to 1 for any K and an even
    load gives exactly 1; P_e is the mean probability of expert e. Only P_e carries a gradient. Hugging Face's
    ``load_balancing_loss_func`` sums over the K choices instead of averaging, and so is K times this.
    """
    share_E = assignments_E.to(probs_TE.dtype) / assignments_E.sum().clamp(min=1)
    return probs_TE.shape[-1] * (share_E * _mean_over_tokens(probs_TE, valid_T)).sum()


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


def _mean_over_tokens(values: Tensor, valid_T: Tensor | None) -> Tensor:
    """Mean over the first dimension, real tokens only; 0 when there is none."""
    if valid_T is None:
        return values.sum(dim=0) / max(values.shape[0], 1)
    mask = valid_T.view(-1, *[1] * (values.dim() - 1)).to(values.dtype)
    return (values * mask).sum(dim=0) / valid_T.sum().clamp(min=1)
