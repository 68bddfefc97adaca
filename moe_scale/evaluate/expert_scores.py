"""How much each expert of a trained model matters, judged by what calibration text makes of it.

Shapes: B batch, S sequence, T = B*S tokens, D model width, E experts, M kept experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_scale.config import MoEConfig
from moe_scale.models.pruning import pruned_config, sparse_layers
from moe_scale.moe.layer import MoELayer, choose_experts

ROWS = 1 << 14
"""Rows that the experts compute at a time."""


@torch.no_grad()
def layer_inputs(model: nn.Module, batches: Iterable[Any]) -> dict[str, Tensor]:
    """What every sparse layer is given in forward passes over packed text without padding, by the layer's name.

    Args:
        model: in evaluation mode.
        batches: of ids_BS and document_ids_BS.

    Returns:
        x_TD of each layer, all of them in memory: T * D elements a layer.
    """
    inputs: dict[str, list[Tensor]] = {name: [] for name in sparse_layers(model)}
    with _watched(model, inputs):
        for batch in batches:
            model(batch.ids_BS, document_ids_BS=batch.document_ids_BS, last_only=True)
    return {name: torch.cat(parts) for name, parts in inputs.items()}


@contextmanager
def _watched(model: nn.Module, inputs: dict[str, list[Tensor]]) -> Iterator[None]:
    def watch(name: str, layer: MoELayer) -> Any:
        return layer.register_forward_pre_hook(lambda _, given: inputs[name].append(given[0].flatten(0, 1)))

    handles = [watch(name, layer) for name, layer in sparse_layers(model).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Scores:
    """What one layer's router makes of T tokens.

    Attributes:
        config: of the layer, which takes every token.
        logits_TE: the router's scores.
        bias_E: the selection bias of a sigmoid router.
        share_T: factor of the experts' sum in the layer's output; 1 but for Residual MoE.
    """

    config: MoEConfig
    logits_TE: Tensor
    bias_E: Tensor | None
    share_T: Tensor

    def of(self, kept: Sequence[int]) -> Scores:
        """The same of a layer that has these experts alone."""
        bias_E = None if self.bias_E is None else self.bias_E[list(kept)]
        return replace(
            self, config=pruned_config(self.config, len(kept)), logits_TE=self.logits_TE[:, list(kept)], bias_E=bias_E
        )

    def at(self, tokens_T: Tensor) -> Scores:
        """The same of some of the tokens."""
        return replace(self, logits_TE=self.logits_TE[tokens_T], share_T=self.share_T[tokens_T])

    def weights(self) -> Tensor:
        """Factors of the experts' outputs in the layer's output, [T, E]; 0 for those that a token is not sent to."""
        routing = choose_experts(self.config, self.logits_TE, self.bias_E)
        weights_TK = routing.weights_TK
        if self.config.conventions == "deepspeed" and self.config.top_k > 1:
            weights_TK = weights_TK / weights_TK.sum(dim=1, keepdim=True)  # as the dispatch does it there
        weights_TE = torch.zeros_like(self.logits_TE).scatter(1, routing.ids_TK, weights_TK.to(self.logits_TE.dtype))
        return weights_TE * self.share_T.unsqueeze(1)


@torch.no_grad()
def scores_of(layer: MoELayer, x_TD: Tensor) -> Scores:
    """What the layer's router makes of the tokens; a noisy one without its noise, as at evaluation."""
    logits_TE = layer.router(x_TD) / layer.config.router_temperature
    share_T = logits_TE.new_ones(len(x_TD)) if layer.mix is None else layer.mix(x_TD).softmax(dim=-1)[:, 0]
    bias_E = layer.selection_bias_E if layer.config.router == "sigmoid" else None
    return Scores(layer.config, logits_TE, bias_E, share_T)


def usage(layer: MoELayer, x_TD: Tensor) -> Tensor:
    """How many of the tokens are sent to each expert: int64 [E]."""
    scores = scores_of(layer, x_TD)
    ids_TK = choose_experts(scores.config, scores.logits_TE, scores.bias_E).ids_TK
    return ids_TK.flatten().bincount(minlength=layer.config.num_experts)


@torch.no_grad()
def output_norms(layer: MoELayer, x_TD: Tensor) -> Tensor:
    """Router-weighted norms of the experts' outputs (REAP, arXiv 2510.13999): mean over the tokens that are sent to an
    expert of g(x) * |f(x)|, with its factor g in the layer's output. 0 where there is none. Returns [E].
    """
    weights_TE = scores_of(layer, x_TD).weights()
    sums_E = torch.zeros(layer.config.num_experts, dtype=torch.float64)
    for expert in range(layer.config.num_experts):
        tokens = weights_TE[:, expert].nonzero().squeeze(1)
        if len(tokens):
            norms_R = _run_expert(layer, expert, x_TD[tokens]).norm(dim=1)
            sums_E[expert] = (norms_R * weights_TE[tokens, expert]).double().mean()
    return sums_E


def logit_similarity(layer: MoELayer, x_TD: Tensor) -> Tensor:
    """Cosine of two experts' scores over the tokens (arXiv 2310.01334), [E, E]: near 1 where both want the same."""
    rows_ET = F.normalize(scores_of(layer, x_TD).logits_TE.double().t(), dim=1)
    return rows_ET @ rows_ET.t()


class Reconstruction:
    """How far a layer's output moves when experts are dropped: the squared distance, summed over tokens.

    Of a token's outputs f_e the Gram matrix G = (f_e . f_g) is enough: with the factors w before and v after, the
    output moves by the square root of (w - v)' G (w - v). So all experts run on every token once, and what is held and
    computed after that does not depend on D.

    Args:
        layer: as it is trained.
        x_TD: what it is given.
    """

    def __init__(self, layer: MoELayer, x_TD: Tensor):
        self.scores = scores_of(layer, x_TD)
        self.before_TE = self.scores.weights()
        self.gram_TEE = _gram(layer, x_TD)
        # Weights that sum to 1 over the chosen, or that are each expert's own, do not change where none is dropped.
        config = layer.config
        self.local = config.router == "sigmoid" or (config.renormalize and config.top_k > 1)

    @property
    def energy(self) -> float:
        """The squared norm of the experts' sum, summed over tokens: the error of a layer whose experts give 0."""
        return float(_quadratic(self.before_TE, self.gram_TEE).double().sum())

    def error(self, kept: Sequence[int]) -> float:
        """Of the layer that has these experts alone."""
        return float(self._errors(kept, slice(None)).double().sum())

    def eliminate(self, num_kept: int) -> list[int]:
        """Drop one expert after the other, each time the one without which the error is least.

        E - 1 + ... + M candidates are tried, where the best of all sets (arXiv 2402.14800) takes E! / (M! (E - M)!):
        at 64 experts of which 32 stay, 1,552 in place of 10^18. Greedy choices need not find the best set.
        """
        kept = list(range(self.before_TE.shape[1]))
        while len(kept) > num_kept:
            errors_T = self._errors(kept, slice(None))
            chosen_TM = self._after(kept, slice(None))[:, kept] != 0
            rises = []
            for place, expert in enumerate(kept):
                others = [other for other in kept if other != expert]
                # Only tokens that were sent to it can go elsewhere.
                tokens = chosen_TM[:, place].nonzero().squeeze(1) if self.local else torch.arange(len(errors_T))
                rises.append(float((self._errors(others, tokens) - errors_T[tokens]).double().sum()))
            kept.pop(min(range(len(kept)), key=rises.__getitem__))
        return kept

    def _after(self, kept: Sequence[int], tokens: Any) -> Tensor:
        """Factors of all experts' outputs when the others are dropped, [tokens, E]."""
        weights_TM = self.scores.at(tokens).of(kept).weights()
        places_M = torch.tensor(kept, device=weights_TM.device)
        return torch.zeros_like(self.before_TE[tokens]).index_copy_(1, places_M, weights_TM)

    def _errors(self, kept: Sequence[int], tokens: Any) -> Tensor:
        return _quadratic(self.before_TE[tokens] - self._after(kept, tokens), self.gram_TEE[tokens])


def _quadratic(change_TE: Tensor, gram_TEE: Tensor) -> Tensor:
    """d' G d of each token, [T]."""
    return torch.einsum("te,teg,tg->t", change_TE, gram_TEE, change_TE)


@torch.no_grad()
def _gram(layer: MoELayer, x_TD: Tensor) -> Tensor:
    """Products of every two experts' outputs of each token, [T, E, E]."""
    num_experts = layer.config.num_experts
    parts = []
    for part_TD in x_TD.split(max(1, ROWS // num_experts)):
        outputs_ETD = torch.stack([_run_expert(layer, expert, part_TD) for expert in range(num_experts)])
        parts.append(torch.einsum("etd,gtd->teg", outputs_ETD, outputs_ETD))
    return torch.cat(parts)


def _run_expert(layer: MoELayer, expert: int, x_RD: Tensor) -> Tensor:
    """One expert's outputs y_RD, unweighted."""
    counts_E = torch.zeros(layer.config.num_experts, dtype=torch.int64, device=x_RD.device)
    counts_E[expert] = len(x_RD)
    return layer.experts(x_RD, counts_E)
