"""Small layers that every model shares. B batch, S sequence, T tokens, D model width, F hidden width, V vocabulary."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_scale.config import MoEConfig
from moe_scale.initialization import Init
from moe_scale.moe.experts import expert_stds


def is_sparse(moe: MoEConfig, layer: int) -> bool:
    """Whether the ``layer``-th layer (from 0) has experts."""
    return moe.enabled and (layer + 1) % moe.every == 0


def dense_hidden(moe: MoEConfig) -> int:
    """Hidden width of a dense SwiGLU feed-forward that stands in for the sparse layer, as :func:`dense_width` says."""
    width = dense_width(moe)
    return width if moe.activation == "swiglu" else round(width * 2 / 3)  # two matrices where SwiGLU has three


def dense_width(moe: MoEConfig) -> int:
    """Hidden width of a dense feed-forward with the experts' activation, beside sparse layers or instead of them.

    As the experts that a token uses, the dense half of the layer included: equal active FLOPs. With ``moe.dense_size
    total`` a model without experts has, over all its layers, the parameters of the sparse one.
    """
    experts: float = moe.top_k
    if not moe.enabled and moe.dense_size == "total":
        experts = (moe.num_experts + (moe.every - 1) * moe.top_k) / moe.every
    dense_half = moe.intermediate_size if moe.residual else moe.shared_intermediate_size
    return round(experts * moe.intermediate_size) + dense_half


class Linear(nn.Module):
    """A linear map whose weights come from a seeded :class:`Init`.

    Args:
        std: initial standard deviation; None takes fan-in, ``in_features ** -0.5``.
        bias: add a bias, which begins at zero.
    """

    def __init__(
        self, in_features: int, out_features: int, init: Init, std: float | None = None, *, bias: bool = False
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        init.normal_(self.weight, in_features**-0.5 if std is None else std)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class DenseFeedForward(nn.Module):
    """SwiGLU feed-forward, the dense counterpart of the MoE layer (arXiv 2002.05202)."""

    def __init__(self, d_model: int, hidden: int, init: Init, depth_scale: float = 1.0):
        super().__init__()
        std_in, std_out = expert_stds(d_model, hidden, depth_scale)
        self.gate_up = Linear(d_model, 2 * hidden, init / "gate_up", std_in)
        self.down = Linear(hidden, d_model, init / "down", std_out)

    def forward(self, x_BSD: Tensor) -> Tensor:
        gate, up = self.gate_up(x_BSD).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class TokenEmbedding(nn.Module):
    """Token embedding [V, D], initialized so that as an output head it gives logits of unit variance."""

    def __init__(self, vocab_size: int, d_model: int, init: Init):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model))
        init.normal_(self.weight, d_model**-0.5)

    def forward(self, ids_BS: Tensor) -> Tensor:
        return F.embedding(ids_BS, self.weight)


class SummedLoss(NamedTuple):
    """Losses summed over the targets that count, nats."""

    loss: Tensor
    """fp32, with label smoothing where there is some: what is trained."""
    nll: Tensor
    """fp32 -log p(target), without a gradient; equal to ``loss`` where nothing is smoothed."""


class TiedHead(nn.Module):
    """Output head that shares an embedding's weight; where that of the input is not to be shared, of another one.

    A module of its own, so that ZeRO-3 gathers the weight for it as it does for the embedding.

    Args:
        label_smoothing: share of each target's probability that is spread evenly over the vocabulary in training
            (arXiv 1512.00567, section 7).
    """

    def __init__(self, embedding: TokenEmbedding, chunk_tokens: int, label_smoothing: float = 0.0):
        super().__init__()
        self.weight = embedding.weight
        self.chunk_tokens, self.label_smoothing = chunk_tokens, label_smoothing

    def forward(self, hidden: Tensor, targets_T: Tensor | None = None) -> Tensor | SummedLoss:
        """Logits [..., V] of hidden states [..., D], or with ``targets_T`` (-100 is ignored) their loss."""
        if targets_T is None:
            return F.linear(hidden, self.weight)
        smoothing = self.label_smoothing if self.training else 0.0
        return SummedLoss(
            *_LinearCrossEntropy.apply(
                hidden, self.weight, targets_T, self.chunk_tokens, smoothing, torch.is_grad_enabled()
            )
        )


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of the cross entropy of ``hidden @ weight.T``, never holding more than a chunk of logits.

    With a vocabulary of 50,304 the logits are by far the largest activation. The gradient of the loss with respect
    to them is known as soon as they are, so the forward pass computes both products of the backward pass while a
    chunk is at hand and keeps only those: no logits stored, none computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        targets_T: Tensor,
        chunk_tokens: int,
        smoothing: float,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor]:
        needs_grad = grad_enabled and (ctx.needs_input_grad[0] or ctx.needs_input_grad[1])
        wide = torch.promote_types(hidden_TD.dtype, torch.float32)
        losses = torch.zeros(2, dtype=wide, device=hidden_TD.device)
        grad_hidden = torch.empty_like(hidden_TD) if needs_grad else None
        needs_grad_weight = needs_grad and ctx.needs_input_grad[1]  # not beside adapters, which leave it as it is
        grad_weight = torch.zeros_like(weight_VD, dtype=wide) if needs_grad_weight else None
        for start in range(0, hidden_TD.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            logits = F.linear(hidden_TD[rows], weight_VD)
            losses += _softmax_loss_(logits, targets_T[rows], smoothing, needs_grad)
            if grad_hidden is not None:
                torch.mm(logits, weight_VD, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight += logits.t() @ hidden_TD[rows]
        if needs_grad:
            ctx.save_for_backward(grad_hidden, grad_weight)
            ctx.weight_dtype = weight_VD.dtype
        loss, nll = losses[0].clone(), losses[1].clone()
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            (grad_hidden * grads[0].view(1, 1)).to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * grads[0]).to(ctx.weight_dtype),
            *[None] * 4,
        )


def _softmax_loss_(logits_TV: Tensor, targets_T: Tensor, smoothing: float, write_gradient: bool) -> Tensor:
    """Summed cross entropy, smoothed and plain, [2]; with ``write_gradient`` the logits are overwritten by the
    gradient of the first."""
    wide = torch.promote_types(logits_TV.dtype, torch.float32)
    losses = torch.zeros(2, dtype=wide, device=logits_TV.device)
    vocab_size = logits_TV.shape[1]
    # On a CPU a block of rows stays in the cache over the passes of a softmax.
    block = 32 if logits_TV.device.type == "cpu" else logits_TV.shape[0]
    for start in range(0, logits_TV.shape[0], block):
        rows = slice(start, start + block)
        targets, counts = targets_T[rows], targets_T[rows] >= 0
        log_probs = logits_TV[rows].to(wide).log_softmax(dim=-1)
        index = targets.clamp(min=0).unsqueeze(1)
        nll = -(log_probs.gather(1, index).squeeze(1) * counts).sum()
        spread = -(log_probs.mean(dim=1) * counts).sum() if smoothing else 0.0
        losses += torch.stack([(1 - smoothing) * nll + smoothing * spread, nll])
        if write_gradient:
            gradient = log_probs.exp_()
            if smoothing:
                gradient.sub_(smoothing / vocab_size)
            gradient.scatter_add_(1, index, gradient.new_full(index.shape, smoothing - 1.0))
            logits_TV[rows] = gradient * counts.unsqueeze(1)
    return losses
