"""The fused linear cross entropy against ``F.cross_entropy`` on whole logits, and the small layers by their formulas.

Shapes: T tokens, D model width, F hidden width, V vocabulary.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from moe_scale.initialization import Init
from moe_scale.models.layers import DenseFeedForward, Linear, TiedHead, TokenEmbedding

T, D, V = 70, 6, 11  # T spans several chunks and the blocks of rows inside them


def make_head(chunk_tokens: int = 16, dtype: torch.dtype = torch.float64, label_smoothing: float = 0.0) -> TiedHead:
    return TiedHead(TokenEmbedding(V, D, Init(0)), chunk_tokens, label_smoothing).to(dtype)


def make_hidden(dtype: torch.dtype = torch.float64, tokens: int = T) -> Tensor:
    return (
        torch.randn(tokens, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
    )


def make_targets(ignored: float = 0.0, tokens: int = T) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    targets_T = torch.randint(V, (tokens,), generator=generator)
    return targets_T.masked_fill(torch.rand(tokens, generator=generator) < ignored, -100)


@pytest.mark.parametrize("ignored", [0.0, 0.4])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 33, 64, T, 1000])
def test_fused_loss_and_gradients(chunk_tokens: int, ignored: float) -> None:
    head, hidden, targets_T = make_head(chunk_tokens), make_hidden(), make_targets(ignored)
    loss = head(hidden, targets_T).loss
    expected = F.cross_entropy(F.linear(hidden, head.weight), targets_T, reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    wanted = [hidden, head.weight]
    # A factor on the loss, as a mean over targets or a loss scale puts there.
    for ours, theirs in zip(
        torch.autograd.grad(0.3 * loss, wanted), torch.autograd.grad(0.3 * expected, wanted), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_smoothed_loss_and_gradients(ignored: float) -> None:
    head, hidden, targets_T = make_head(label_smoothing=0.3), make_hidden(), make_targets(ignored)
    found = head(hidden, targets_T)
    logits = F.linear(hidden, head.weight)
    expected = F.cross_entropy(logits, targets_T, reduction="sum", label_smoothing=0.3)
    torch.testing.assert_close(found.loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.nll, F.cross_entropy(logits, targets_T, reduction="sum").detach())
    assert not found.nll.requires_grad
    wanted = [hidden, head.weight]
    for ours, theirs in zip(
        torch.autograd.grad(0.3 * found.loss, wanted), torch.autograd.grad(0.3 * expected, wanted), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk_tokens", [3, 100])
def test_gradcheck(chunk_tokens: int) -> None:
    head, targets_T = make_head(chunk_tokens), make_targets(0.3, tokens=8)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return functional_call(head, {"weight": weight}, (hidden, targets_T)).loss

    hidden, weight = make_hidden(tokens=8), head.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, (hidden, weight))
    assert torch.autograd.gradcheck(lambda h: loss(h, weight.detach()), (hidden,))
    assert torch.autograd.gradcheck(lambda w: loss(hidden.detach(), w), (weight,))


def test_ignored_targets_have_no_gradient() -> None:
    head, hidden, targets_T = make_head(), make_hidden(), make_targets(0.5)
    head(hidden, targets_T).loss.backward()
    assert hidden.grad is not None
    assert not hidden.grad[targets_T == -100].any()
    assert hidden.grad[targets_T != -100].any(dim=1).all()


def test_all_ignored() -> None:
    head, hidden = make_head(), make_hidden()
    loss = head(hidden, torch.full((T,), -100)).loss
    loss.backward()
    assert loss == 0
    assert not hidden.grad.any()
    assert not head.weight.grad.any()


def test_bf16_is_close_to_fp32() -> None:
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        # The same values in both types, so that what differs is the arithmetic.
        head, hidden = (
            make_head(dtype=torch.bfloat16).to(dtype),
            make_hidden(torch.bfloat16).detach().to(dtype).requires_grad_(),
        )
        loss = head(hidden, make_targets(0.2)).loss
        assert loss.dtype == torch.float32, "a sum over thousands of tokens has no place in bf16"
        loss.backward()
        assert hidden.grad.dtype == head.weight.grad.dtype == dtype
        results[dtype] = (loss.detach(), hidden.grad.float(), head.weight.grad.float())
    for wide, narrow in zip(results[torch.float32], results[torch.bfloat16], strict=True):
        # bf16 keeps eight bits; a gradient is a sum of a few terms rounded so.
        assert (wide - narrow).abs().max() <= 2**-7 * wide.abs().max()


def test_loss_is_the_same_without_gradients() -> None:
    head, hidden, targets_T = make_head(), make_hidden(), make_targets(0.2)
    with torch.no_grad():
        loss = head(hidden, targets_T).loss
    assert torch.equal(loss, head(hidden, targets_T).loss.detach())


def test_evaluation_computes_no_gradients() -> None:
    head, hidden, targets_T = make_head(), make_hidden(), make_targets()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        head(hidden, targets_T)
    assert counter.get_total_flops() == 2 * T * D * V


def test_second_derivative_is_refused() -> None:
    """The stored gradient is a constant to autograd, so a second derivative would be silently wrong."""
    head, hidden = make_head(), make_hidden()
    (gradient,) = torch.autograd.grad(head(hidden, make_targets()).loss ** 2, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_large_logits_do_not_overflow() -> None:
    head, hidden = make_head(dtype=torch.float32), make_hidden(torch.float32)
    loss = head(1e4 * hidden, make_targets()).loss
    loss.backward()
    assert loss.isfinite()
    assert hidden.grad.isfinite().all()


def test_head_shares_the_embedding() -> None:
    embedding = TokenEmbedding(V, D, Init(0))
    head = TiedHead(embedding, 8)
    assert head.weight is embedding.weight
    ids = torch.arange(V)
    torch.testing.assert_close(head(embedding(ids)), embedding.weight @ embedding.weight.T)
    assert len(list(nn.ModuleList([embedding, head]).parameters())) == 1


def test_dense_feed_forward_is_swiglu() -> None:
    layer = DenseFeedForward(D, 9, Init(3)).double()
    x_BSD = make_hidden(tokens=8).view(2, 4, D)
    gate_FD, up_FD = layer.gate_up.weight[:9], layer.gate_up.weight[9:]
    gate = x_BSD @ gate_FD.T
    expected = (gate * torch.sigmoid(gate) * (x_BSD @ up_FD.T)) @ layer.down.weight.T
    torch.testing.assert_close(layer(x_BSD), expected, rtol=1e-12, atol=1e-12)


def test_linear_draws_at_fan_in_unless_told() -> None:
    for std, expected in ((None, 64**-0.5), (0.02, 0.02)):
        weight = Linear(64, 500, Init(0), std).weight.detach()
        assert weight.std().item() == pytest.approx(expected, rel=0.03)
        assert weight.abs().max() <= 3 * expected
