"""Step 1, route: which experts take each token, and with which weight.

Shapes: T tokens, D model width, E experts, K experts per token, C tokens per expert.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_scale.initialization import Init
from moe_scale.moe.kernels import cpu_bf16


class Routing(NamedTuple):
    """A decision for T tokens, each of which goes to K experts."""

    logits_TE: Tensor
    """fp32 scores before they become probabilities."""
    probs_TE: Tensor
    """fp32 probabilities of the experts, which the load-balancing loss sees; they sum to 1."""
    ids_TK: Tensor
    """int64 experts of each token, best first."""
    weights_TK: Tensor
    """fp32 factors of the experts' outputs in the token's sum."""


class ExpertChoice(NamedTuple):
    """A decision for E experts, each of which takes C tokens; a token may be taken by none or by many."""

    logits_TE: Tensor
    probs_TE: Tensor
    tokens_EC: Tensor
    """int64 tokens that each expert takes, best first."""
    weights_EC: Tensor
    """fp32 factors of the outputs; 0 for padding, which is taken only where real tokens run out."""


class Router(nn.Module):
    """One linear map to E scores, computed in fp32 whatever the model's precision.

    The softmax of a bf16 score is off by several per cent; "selective precision" (arXiv 2101.03961, section 2.4)
    keeps the router alone in fp32 and trains as stably as an all-fp32 model.

    Args:
        scale: factor on the initial standard deviation, which is fan-in; 0 starts at zero.
    """

    def __init__(self, d_model: int, num_experts: int, init: Init, scale: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_experts, d_model))
        if scale:
            init.normal_(self.weight, std=scale * d_model**-0.5)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Scores of T tokens. Returns fp32 (or wider) logits_TE."""
        return _WideLinear.apply(x_TD, self.weight)


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    """Products of fp32 as they are: a GPU takes their inputs to 10 bits where that is allowed, as it is for the rest
    of a run."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


class _WideLinear(torch.autograd.Function):
    """``F.linear`` in fp32 or wider that keeps its input as it came, which others keep too, and not a wider copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OD: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_OD)
        if x.device.type == "cpu" and x.dtype == weight_OD.dtype and cpu_bf16.has_kernel(x.dtype, x.shape[-1]):
            return cpu_bf16.scores(x.flatten(0, -2), weight_OD).view(*x.shape[:-1], -1)
        wide = torch.promote_types(x.dtype, torch.float32)
        with _without_tf32():
            return F.linear(x.to(wide), weight_OD.to(wide))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight_OD = ctx.saved_tensors
        grad_TO = grads[0].flatten(0, -2)
        grad_x = grad_weight = None
        with _without_tf32():
            if ctx.needs_input_grad[1]:
                grad_weight = grad_TO.t().mm(x.flatten(0, -2).to(grad_TO.dtype)).to(weight_OD.dtype)
            if ctx.needs_input_grad[0]:
                grad_x = grad_TO.mm(weight_OD.to(grad_TO.dtype)).view(x.shape).to(x.dtype)
        return grad_x, grad_weight


def softmax_top_k(logits_TE: Tensor, top_k: int, *, renormalize: bool) -> Routing:
    """Softmax over all experts, then the K most probable (arXiv 2101.03961 for K=1, 2006.16668 for K=2).

    With ``renormalize`` the K weights of a token sum to 1. For K=1 that would make the weight a constant 1 and
    leave the router without a gradient, so it never applies there.
    """
    probs_TE = logits_TE.softmax(dim=-1)
    weights_TK, ids_TK = probs_TE.topk(top_k, dim=-1)
    return Routing(logits_TE, probs_TE, ids_TK, _renormalized(weights_TK) if renormalize else weights_TK)


def noisy_top_k(logits_TE: Tensor, noise_logits_TE: Tensor, top_k: int, *, training: bool) -> Routing:
    """Noisy top-k gating (arXiv 1701.06538, equations 3 to 5): H = scores + N(0, 1) * softplus(noise scores).

    The weights are the softmax over the K largest entries of H, which is the softmax over all, renormalized; a
    single expert keeps its probability among all, so that K=1 trains. Without ``training`` there is no noise.
    """
    if training:
        logits_TE = logits_TE + torch.randn_like(logits_TE) * F.softplus(noise_logits_TE)
    return softmax_top_k(logits_TE, top_k, renormalize=True)


def sigmoid_top_k(logits_TE: Tensor, bias_E: Tensor, top_k: int, *, renormalize: bool) -> Routing:
    """Sigmoid gates with loss-free balancing (arXiv 2408.15664): the bias decides who is chosen, never the weight.

    Args:
        bias_E: added to the gates for the selection alone; :func:`balanced_bias` moves it after each step.
    """
    gates_TE = logits_TE.sigmoid()
    ids_TK = (gates_TE + bias_E).topk(top_k, dim=-1).indices
    # exp(log gate) over their sum: dividing the gates is the same until all of them underflow, and then it is 0 / 0.
    log_gates_TE = F.logsigmoid(logits_TE)
    probs_TE = log_gates_TE.softmax(dim=-1)
    if renormalize and top_k > 1:
        weights_TK = log_gates_TE.gather(1, ids_TK).softmax(dim=-1)
    else:
        weights_TK = gates_TE.gather(1, ids_TK)
    return Routing(logits_TE, probs_TE, ids_TK, weights_TK)


def balanced_bias(bias_E: Tensor, load_E: Tensor, rate: float) -> Tensor:
    """b + u * sign(mean load - load) (arXiv 2408.15664, algorithm 1). Works on [..., E]."""
    return bias_E + rate * torch.sign(load_E.mean(dim=-1, keepdim=True) - load_E).to(bias_E.dtype)


def hash_top_k(token_ids_T: Tensor, num_experts: int, top_k: int, dtype: torch.dtype = torch.float32) -> Routing:
    """A fixed hash of the token's id picks its experts (arXiv 2106.04426): nothing is learned, nothing can collapse.

    K neighbours of a multiplicative hash, so that they differ; each has weight 1/K, in ``dtype``.
    """
    first_T = (token_ids_T * 2654435761 % 2**32) * num_experts // 2**32  # Knuth's multiplier
    ids_TK = (first_T.unsqueeze(1) + torch.arange(top_k, device=token_ids_T.device)) % num_experts
    weights_TK = torch.full(ids_TK.shape, 1.0 / top_k, dtype=dtype, device=ids_TK.device)
    probs_TE = torch.zeros(len(ids_TK), num_experts, dtype=dtype, device=ids_TK.device).scatter_(1, ids_TK, weights_TK)
    return Routing(torch.zeros_like(probs_TE), probs_TE, ids_TK, weights_TK)


def expert_choice(logits_TE: Tensor, tokens_per_expert: int, valid_T: Tensor | None = None) -> ExpertChoice:
    """Each expert takes the C tokens that want it most (arXiv 2202.09368, equation 1): even by construction.

    Whether a token is taken depends on the tokens after it, so a decoder trained like this sees the future.
    """
    probs_TE = logits_TE.softmax(dim=-1)
    eligible_TE = probs_TE if valid_T is None else probs_TE * valid_T.unsqueeze(1)
    weights_EC, tokens_EC = eligible_TE.t().topk(tokens_per_expert, dim=-1)
    return ExpertChoice(logits_TE, probs_TE, tokens_EC, weights_EC)


def jittered(x_TD: Tensor, amount: float) -> Tensor:
    """The router's input times U(1 - amount, 1 + amount), elementwise (arXiv 2101.03961, section 2.4)."""
    return x_TD * torch.empty_like(x_TD, dtype=torch.float32).uniform_(1 - amount, 1 + amount)


def _renormalized(weights_TK: Tensor) -> Tensor:
    return weights_TK / weights_TK.sum(dim=-1, keepdim=True) if weights_TK.shape[1] > 1 else weights_TK
