"""The router's losses and measures against loops over sequences, tokens and experts.

Shapes: B sequences of S tokens, T = B*S, E experts, K experts per token.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_scale.config import MoEConfig
from moe_scale.initialization import Init
from moe_scale.moe.layer import MoELayer
from moe_scale.moe.losses import (
    assignments_per_expert,
    load_balance_loss,
    router_z_loss,
    routing_entropy,
    sequence_load_balance_loss,
)
from moe_scale.moe.router import softmax_top_k
from moe_scale.parallel.groups import ParallelGroups

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_sequence_loss(probs_TE: Tensor, ids_TK: Tensor, batch: int, valid_T: Tensor) -> Tensor:
    """The mean over sequences with a real token of E * sum_e f_e * P_e, each counted token by token."""
    seq_len, num_experts, top_k = len(probs_TE) // batch, probs_TE.shape[1], ids_TK.shape[1]
    losses = []
    for b in range(batch):
        tokens = [t for t in range(b * seq_len, (b + 1) * seq_len) if valid_T[t]]
        if not tokens:
            continue
        loss = probs_TE.new_zeros(())
        for expert in range(num_experts):
            given = sum(ids_TK[t].tolist().count(expert) for t in tokens)
            mean_prob = sum(probs_TE[t, expert] for t in tokens) / len(tokens)
            loss = loss + num_experts * given / (top_k * len(tokens)) * mean_prob
        losses.append(loss)
    return torch.stack(losses).mean() if losses else probs_TE.sum() * 0


# Which tokens of three sequences of four are real: all; some; all but a sequence of padding alone; none.
MASKS = {
    "none": None,
    "some": [[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 0, 0]],
    "a sequence of padding alone": [[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]],
    "all": [[0] * 4] * 3,
}


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("padding", list(MASKS))
def test_sequence_loss_is_that_of_a_loop_over_sequences(padding: str, top_k: int) -> None:
    logits_TE = randn(12, 5).requires_grad_()
    mask = MASKS[padding]
    valid_T = None if mask is None else torch.tensor(mask).bool().flatten()
    routing = softmax_top_k(logits_TE, top_k, renormalize=True)
    ours = sequence_load_balance_loss(routing.probs_TE, routing.ids_TK, 3, valid_T)
    everyone = torch.ones(12, dtype=torch.bool)
    theirs = slow_sequence_loss(routing.probs_TE, routing.ids_TK, 3, everyone if valid_T is None else valid_T)
    torch.testing.assert_close(ours, theirs, **CLOSE)
    ours, theirs = (torch.autograd.grad(loss, logits_TE, retain_graph=True)[0] for loss in (ours, theirs))
    torch.testing.assert_close(ours, theirs, **CLOSE)
    if valid_T is not None:
        assert not ours[~valid_T].any()


def test_sequence_loss_of_no_sequence_is_zero() -> None:
    """A rank can have a micro-batch without any token."""
    for batch in (0, 2):
        loss = sequence_load_balance_loss(torch.zeros(0, 5), torch.zeros(0, 2, dtype=torch.int64), batch)
        assert loss == 0


def test_sequence_loss_of_one_sequence_is_the_batchs() -> None:
    routing = softmax_top_k(randn(9, 5), 2, renormalize=True)
    whole = load_balance_loss(routing.probs_TE, assignments_per_expert(routing.ids_TK, 5))
    torch.testing.assert_close(sequence_load_balance_loss(routing.probs_TE, routing.ids_TK, 1), whole, **CLOSE)


def test_sequence_loss_sees_what_an_even_batch_hides() -> None:
    """Each of four sequences uses an expert of its own: the batch is even, no sequence is."""
    probs_TE = (20 * torch.eye(4, dtype=torch.float64)).repeat_interleave(3, dim=0).softmax(dim=-1)
    ids_TK = torch.arange(4).repeat_interleave(3).unsqueeze(1)
    assert float(load_balance_loss(probs_TE, assignments_per_expert(ids_TK, 4))) == pytest.approx(1)
    assert float(sequence_load_balance_loss(probs_TE, ids_TK, 4)) == pytest.approx(4)


# --- any K, one meaning


@pytest.mark.parametrize("top_k", [1, 2, 3, 6])
def test_load_balance_loss_is_the_mean_over_choices(top_k: int) -> None:
    """Of the losses of the first choices alone, the second ones alone, and so on: so its size does not grow with K."""
    routing = softmax_top_k(randn(11, 6), top_k, renormalize=True)
    whole = load_balance_loss(routing.probs_TE, assignments_per_expert(routing.ids_TK, 6))
    by_choice = [
        load_balance_loss(routing.probs_TE, assignments_per_expert(routing.ids_TK[:, k : k + 1], 6))
        for k in range(top_k)
    ]
    torch.testing.assert_close(whole, torch.stack(by_choice).mean(), **CLOSE)


@pytest.mark.parametrize("top_k", [1, 2, 3, 6])
@pytest.mark.parametrize("scope", ["micro_batch", "sequence", "global"])
def test_undecided_router_has_an_aux_loss_of_one_for_any_k(scope: Any, top_k: int) -> None:
    """In every scope; and so has a router that sends every token to all experts, however decided."""
    config = MoEConfig(num_experts=6, top_k=top_k, intermediate_size=3, aux_loss_scope=scope)
    layer = MoELayer(config, 4, ParallelGroups(), Init(0)).double()
    valid_BS = torch.tensor([[True] * 5, [True, True, False, False, False]])
    if top_k == 6:
        assert layer(randn(2, 5, 4), valid_BS)[1].aux_loss.item() == pytest.approx(1, abs=1e-12)
    with torch.no_grad():
        layer.router.weight.zero_()
    assert layer(randn(2, 5, 4), valid_BS)[1].aux_loss.item() == pytest.approx(1, abs=1e-12)


def test_collapsed_router_has_an_aux_loss_of_e_over_k() -> None:
    """All tokens to the same K experts, among which the probability is shared."""
    for top_k in (1, 2, 3, 6):
        logits_TE = torch.full((7, 6), -60.0, dtype=torch.float64)
        logits_TE[:, :top_k] = 0
        routing = softmax_top_k(logits_TE, top_k, renormalize=True)
        loss = load_balance_loss(routing.probs_TE, assignments_per_expert(routing.ids_TK, 6))
        assert float(loss) == pytest.approx(6 / top_k, abs=1e-12)


def test_layer_reports_the_loss_of_its_scope() -> None:
    x_BSD, valid_BS = randn(3, 4, 4), torch.tensor(MASKS["some"]).bool()
    losses = {}
    for scope in ("micro_batch", "sequence", "global"):
        config = MoEConfig(num_experts=5, top_k=2, intermediate_size=3, aux_loss_scope=scope)
        layer = MoELayer(config, 4, ParallelGroups(), Init(0)).double()
        losses[scope] = layer(x_BSD, valid_BS)[1].aux_loss
    routing = softmax_top_k(layer.router(x_BSD.flatten(0, 1)), 2, renormalize=True)
    valid_T = valid_BS.flatten()
    batch = load_balance_loss(routing.probs_TE, assignments_per_expert(routing.ids_TK, 5, valid_T), valid_T)
    torch.testing.assert_close(losses["micro_batch"], batch, **CLOSE)
    torch.testing.assert_close(losses["global"], batch, **CLOSE, msg="with one rank, global is the micro-batch")
    torch.testing.assert_close(
        losses["sequence"], slow_sequence_loss(routing.probs_TE, routing.ids_TK, 3, valid_T), **CLOSE
    )
    assert abs(losses["sequence"] - batch) > 1e-3


# --- z-loss and entropy


def test_z_loss_and_its_gradient_by_hand() -> None:
    """d/dlogit of logsumexp^2 is 2 * logsumexp * probability, over the number of real tokens."""
    logits_TE = randn(4, 3).requires_grad_()
    valid_T = torch.tensor([True, False, True, True])
    loss = router_z_loss(logits_TE, valid_T)
    (gradient,) = torch.autograd.grad(loss, logits_TE)
    total = 0.0
    for t in range(4):
        exps = [math.exp(value) for value in logits_TE[t].tolist()]
        log_sum = math.log(sum(exps)) if valid_T[t] else 0.0
        total += log_sum**2
        assert gradient[t].tolist() == pytest.approx([2 * log_sum * e / sum(exps) / 3 for e in exps], abs=1e-12)
    assert loss.item() == pytest.approx(total / 3, abs=1e-12)


def test_entropy_by_hand() -> None:
    """-sum p log p over log E, averaged over real tokens."""
    probs_TE = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [1.0, 0.0, 0.0]], dtype=torch.float64)
    by_token = [-sum(p * math.log(p) for p in row if p) / math.log(3) for row in probs_TE.tolist()]
    assert float(routing_entropy(probs_TE)) == pytest.approx(sum(by_token) / 3, abs=1e-12)
    valid_T = torch.tensor([True, False, True])
    assert float(routing_entropy(probs_TE, valid_T)) == pytest.approx((by_token[0] + by_token[2]) / 2, abs=1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_no_token_gives_zero_and_not_nan(masked: bool) -> None:
    valid_T = torch.zeros(0, dtype=torch.bool) if masked else None
    ids_TK, probs_TE = torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 5)
    counts_E = assignments_per_expert(ids_TK, 5, valid_T)
    assert counts_E.tolist() == [0] * 5
    assert load_balance_loss(probs_TE, counts_E, valid_T) == 0
    assert router_z_loss(probs_TE, valid_T) == 0
    assert routing_entropy(probs_TE, valid_T) == 0
