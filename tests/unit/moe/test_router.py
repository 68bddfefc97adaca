"""Each router against its equations written out one number at a time, and what it must not depend on.

Shapes: T tokens, D model width, E experts, K experts per token, C tokens per expert.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe_scale.config import MoEConfig
from moe_scale.initialization import Init
from moe_scale.moe.layer import MoELayer
from moe_scale.moe.router import (
    Router,
    balanced_bias,
    expert_choice,
    hash_top_k,
    jittered,
    noisy_top_k,
    sigmoid_top_k,
    softmax_top_k,
)
from moe_scale.parallel.groups import ParallelGroups

GPT2_IDS = 50_257


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_layer(d_model: int = 4, seed: int = 0, **settings: Any) -> MoELayer:
    config = MoEConfig(**{"num_experts": 6, "intermediate_size": 3, **settings})
    return MoELayer(config, d_model, ParallelGroups(), Init(seed)).double()


def best(values: list[float], count: int) -> list[int]:
    """Indices of the ``count`` largest values, largest first."""
    return sorted(range(len(values)), key=lambda i: -values[i])[:count]


# --- scores


class _PrecisionOfProducts(TorchDispatchMode):
    """Notes what a GPU would be allowed to do to the fp32 inputs of each product."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.seen.append(torch.backends.cuda.matmul.fp32_precision)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def tf32() -> Iterator[None]:
    before, torch.backends.cuda.matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision, "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.usefixtures("tf32")
def test_scores_and_their_gradients_are_fp32_where_the_rest_may_be_tf32() -> None:
    router, x_TD = Router(4, 6, Init(0)), randn(5, 4).float().requires_grad_()
    with _PrecisionOfProducts() as products:
        router(x_TD).square().sum().backward()
    assert products.seen == ["ieee"] * 3, "the scores, the gradient of the weight, that of the tokens"
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"


# --- noisy top-k


@pytest.mark.parametrize("top_k", [1, 2, 3, 5])
def test_noisy_top_k_is_the_papers_equations(top_k: int) -> None:
    """arXiv 1701.06538, equations 3 to 5, entry by entry; K=1 keeps its probability among all experts instead."""
    logits_TE, noise_TE = randn(7, 5), randn(7, 5, seed=1)
    torch.manual_seed(3)
    routing = noisy_top_k(logits_TE, noise_TE, top_k, training=True)
    torch.manual_seed(3)
    normal_TE = torch.randn_like(logits_TE)
    for t in range(7):
        noised = [
            float(logits_TE[t, e]) + float(normal_TE[t, e]) * math.log1p(math.exp(float(noise_TE[t, e])))
            for e in range(5)
        ]
        kept = best(noised, top_k)
        below = range(5) if top_k == 1 else kept
        total = sum(math.exp(noised[e]) for e in below)
        assert routing.ids_TK[t].tolist() == kept
        assert routing.weights_TK[t].tolist() == pytest.approx([math.exp(noised[e]) / total for e in kept], abs=1e-12)
        assert routing.logits_TE[t].tolist() == pytest.approx(noised, abs=1e-12)


def test_noisy_top_k_has_no_noise_at_evaluation() -> None:
    """There it is the softmax router, whatever the noise map says."""
    logits_TE, noise_TE = randn(7, 5), randn(7, 5, seed=1) + 5
    quiet, plain = noisy_top_k(logits_TE, noise_TE, 2, training=False), softmax_top_k(logits_TE, 2, renormalize=True)
    assert all(map(torch.equal, quiet, plain))

    layer, x_BSD = make_layer(router="noisy").eval(), randn(1, 9, 4)
    assert torch.equal(layer(x_BSD)[0], layer(x_BSD)[0])
    layer.train()
    assert not torch.equal(layer(x_BSD)[0], layer(x_BSD)[0])


def test_noise_starts_at_softplus_of_zero() -> None:
    """A zero noise map gives each score noise of standard deviation log 2, and can learn from the first step."""
    layer, x_TD = make_layer(router="noisy"), randn(11, 4)
    assert not layer.noise.weight.any()
    torch.manual_seed(5)
    routing = layer.route(x_TD, None, None)
    torch.manual_seed(5)
    expected_TE = x_TD @ layer.router.weight.T + math.log(2) * torch.randn(11, 6, dtype=torch.float64)
    torch.testing.assert_close(routing.logits_TE, expected_TE, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(routing.weights_TK[:, 0].sum(), layer.noise.weight)
    assert gradient.any()


# --- sigmoid gates and their balancing


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_selection_bias_changes_who_is_chosen_and_never_the_weight(top_k: int, renormalize: bool) -> None:
    logits_TE, bias_E = randn(40, 5), torch.tensor([0.5, -0.4, 0.0, 0.2, -0.1], dtype=torch.float64)
    plain = sigmoid_top_k(logits_TE, torch.zeros_like(bias_E), top_k, renormalize=renormalize)
    biased = sigmoid_top_k(logits_TE, bias_E, top_k, renormalize=renormalize)
    assert not torch.equal(plain.ids_TK.sort().values, biased.ids_TK.sort().values), "the bias must matter here"
    assert torch.equal(plain.probs_TE, biased.probs_TE)
    for t in range(40):
        gates = [1 / (1 + math.exp(-float(value))) for value in logits_TE[t]]
        chosen = best([gate + float(bias) for gate, bias in zip(gates, bias_E, strict=True)], top_k)
        total = sum(gates[e] for e in chosen) if renormalize and top_k > 1 else 1.0
        assert biased.ids_TK[t].tolist() == chosen
        assert biased.weights_TK[t].tolist() == pytest.approx([gates[e] / total for e in chosen], abs=1e-12)
        assert biased.probs_TE[t].tolist() == pytest.approx([gate / sum(gates) for gate in gates], abs=1e-12)


def test_selection_bias_gets_no_gradient() -> None:
    """It is a buffer, and even asked for a gradient it would have none."""
    layer = make_layer(router="sigmoid")
    assert "selection_bias_E" not in dict(layer.named_parameters())
    assert "selection_bias_E" in layer.state_dict(), "a resumed run needs it"
    bias_E, logits_TE = torch.zeros(5, requires_grad=True), randn(6, 5).requires_grad_()
    routing = sigmoid_top_k(logits_TE, bias_E, 2, renormalize=True)
    total = (routing.weights_TK * randn(6, 2)).sum() + routing.probs_TE.square().sum()
    of_bias, of_logits = torch.autograd.grad(total, [bias_E, logits_TE], allow_unused=True)
    assert of_bias is None
    assert of_logits.any()


def test_sigmoid_gates_that_underflow_still_share_a_weight_of_one() -> None:
    """In fp32 the sigmoid of -110 is 0; the shares of gates that are all that small are still defined."""
    logits_TE = torch.tensor([[-110.0, -111.0, -112.0]], requires_grad=True)
    routing = sigmoid_top_k(logits_TE, torch.zeros(3), 2, renormalize=True)
    routing.weights_TK[0, 0].backward()
    e = math.e
    assert routing.probs_TE[0].tolist() == pytest.approx(
        [e**2 / (e**2 + e + 1), e / (e**2 + e + 1), 1 / (e**2 + e + 1)], rel=1e-5
    )
    assert routing.weights_TK[0].tolist() == pytest.approx([e / (e + 1), 1 / (e + 1)], rel=1e-5)
    assert logits_TE.grad is not None
    assert logits_TE.grad.isfinite().all()


def test_balanced_bias_by_hand() -> None:
    """b + u * sign(mean load - load): by the same amount whether the load is a little off or much; 0 where it is even.

    One layer with a mean load of 5, one with a mean load of 2, in one call.
    """
    bias_ME = torch.tensor([[0.0, 0.5, -0.25, 1.0], [0.0, 0.0, 0.0, 0.0]])
    load_ME = torch.tensor([[4.0, 5.0, 11.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
    expected_ME = torch.tensor([[0.125, 0.5, -0.375, 1.125], [0.0, 0.0, 0.0, 0.0]])
    assert torch.equal(balanced_bias(bias_ME, load_ME, 0.125), expected_ME)
    assert torch.equal(balanced_bias(bias_ME[0], load_ME[0], 0.125), expected_ME[0])
    assert balanced_bias(bias_ME[0].double(), load_ME[0], 0.125).dtype == torch.float64
    assert torch.equal(balanced_bias(bias_ME, load_ME, 0.0), bias_ME)


# --- hash


@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (6, 2), (64, 2), (64, 8), (5, 5)])
def test_hash_picks_distinct_experts_in_range_by_its_formula(num_experts: int, top_k: int) -> None:
    """floor(frac(id * 2654435761 / 2^32) * E) in Python's whole numbers, and the K - 1 experts after it."""
    ids = [*range(50), GPT2_IDS - 1, 50_303, 128_255, 262_143]
    routing = hash_top_k(torch.tensor(ids), num_experts, top_k)
    for row, token in zip(routing.ids_TK.tolist(), ids, strict=True):
        first = (token * 2654435761 % 2**32) * num_experts >> 32
        assert row == [(first + k) % num_experts for k in range(top_k)]
        assert len(set(row)) == top_k
    assert torch.equal(routing.weights_TK, torch.full((len(ids), top_k), 1 / top_k))
    torch.testing.assert_close(routing.probs_TE.sum(dim=1), torch.ones(len(ids)))
    assert routing.probs_TE.count_nonzero(dim=1).tolist() == [top_k] * len(ids)


@pytest.mark.parametrize("num_experts", [4, 6, 16, 64, 128])
def test_hash_spreads_the_ids_of_gpt2_evenly(num_experts: int) -> None:
    """No expert is given more than 5 % beyond its share of the vocabulary, nor of its frequent first thousand ids."""
    for ids in (torch.arange(GPT2_IDS), torch.arange(1000)):
        counts_E = torch.bincount(hash_top_k(ids, num_experts, 1).ids_TK[:, 0], minlength=num_experts)
        mean = len(ids) / num_experts
        assert counts_E.max() <= max(1.05 * mean, mean + 3)
        assert counts_E.min() >= min(0.95 * mean, mean - 3)


def test_hash_depends_on_the_token_alone() -> None:
    """Not on its position, its neighbours, the call or the weights; and so never on a seed."""
    ids_T = torch.tensor([17, 4, 50_256, 17, 9, 4])
    order = torch.tensor([5, 3, 0, 2, 1, 4])
    whole, permuted = hash_top_k(ids_T, 64, 2), hash_top_k(ids_T[order], 64, 2)
    assert torch.equal(whole.ids_TK[order], permuted.ids_TK)
    assert torch.equal(whole.ids_TK[0], whole.ids_TK[3])
    x_BSD = randn(2, 3, 4)
    routings = [
        make_layer(router="hash", seed=seed).train(training).route(x.flatten(0, 1), None, ids_T.view(2, 3)).ids_TK
        for seed, training, x in ((0, True, x_BSD), (1, False, x_BSD), (2, True, -x_BSD))
    ]
    assert torch.equal(routings[0], routings[1])
    assert torch.equal(routings[0], routings[2])


def test_hash_router_has_nothing_to_learn() -> None:
    layer = make_layer(router="hash")
    assert {name.split(".")[0] for name, _ in layer.named_parameters()} == {"experts"}
    _, stats = layer(randn(1, 3, 4), None, torch.tensor([[1, 2, 3]]))
    assert stats.aux_loss == stats.z_loss == 0


# --- expert choice


def slow_expert_choice(logits_TE: Tensor, places: int, valid: list[bool]) -> list[dict[int, float]]:
    """For each expert the real tokens that it takes and their weights, by sorting them one expert at a time."""
    taken = []
    for expert in range(logits_TE.shape[1]):
        wish = {}
        for token, row in enumerate(logits_TE.tolist()):
            if valid[token]:
                wish[token] = math.exp(row[expert]) / sum(math.exp(value) for value in row)
        taken.append({token: wish[token] for token in sorted(wish, key=lambda t: -wish[t])[:places]})
    return taken


@pytest.mark.parametrize("padding", ["none", "some", "most", "all"])
@pytest.mark.parametrize("places", [1, 3, 8, 12])
def test_experts_choose_as_in_a_slow_loop(places: int, padding: str) -> None:
    """With more places than real tokens an expert fills up with padding, of weight 0 and without a gradient."""
    logits_TE = randn(12, 5).requires_grad_()
    share = {"none": 12, "some": 9, "most": 2, "all": 0}[padding]
    valid = [(7 * t) % 12 < share for t in range(12)]
    valid_T = None if padding == "none" else torch.tensor(valid)
    choice = expert_choice(logits_TE, places, valid_T)
    assert choice.tokens_EC.shape == choice.weights_EC.shape == (5, places)
    for expert, wanted in enumerate(slow_expert_choice(logits_TE.detach(), places, valid)):
        tokens, weights = choice.tokens_EC[expert].tolist(), choice.weights_EC[expert].tolist()
        assert len(set(tokens)) == places, "an expert takes a token once"
        assert tokens[: len(wanted)] == list(wanted)
        assert weights[: len(wanted)] == pytest.approx(list(wanted.values()), abs=1e-12)
        assert weights[len(wanted) :] == [0.0] * (places - len(wanted))
        assert not any(valid[token] for token in tokens[len(wanted) :])
    (gradient,) = torch.autograd.grad((choice.weights_EC * randn(5, places)).sum(), logits_TE)
    assert not gradient[[not v for v in valid]].any()
    assert bool(gradient.any()) == (share > 0)


def test_expert_choice_counts_only_real_tokens_as_load_and_as_lost() -> None:
    """Two real tokens and more places than that: every expert takes both, and none is lost."""
    layer = make_layer(
        router="expert_choice", dispatch="capacity", top_k=2, capacity_factor=2.0, min_capacity=1, num_experts=3
    )
    valid_BS = torch.tensor([[True, False, False], [False, True, False]])
    y_BSD, stats = layer(randn(2, 3, 4), valid_BS)
    assert stats.assignments_E.tolist() == [2, 2, 2]
    assert stats.dropped == stats.aux_loss == 0
    assert y_BSD[valid_BS].all()
    assert not y_BSD[~valid_BS].any()


def test_expert_choice_counts_tokens_that_none_took_as_k_lost_pairs() -> None:
    layer = make_layer(router="expert_choice", dispatch="capacity", top_k=2, capacity_factor=0.25, min_capacity=1)
    x_BSD = randn(1, 24, 4)
    y_BSD, stats = layer(x_BSD)
    assert stats.assignments_E.tolist() == [2] * 6, "ceil(24 * 2 / 6 * 0.25) places an expert"
    lost = int((y_BSD[0] == 0).all(dim=-1).sum())
    assert lost >= 12, "12 places in all for 24 tokens"
    assert stats.dropped == 2 * lost


# --- what all learned routers share


@pytest.mark.parametrize("router", ["softmax", "noisy", "sigmoid"])
def test_a_single_choice_keeps_a_router_gradient_under_renormalization(router: str) -> None:
    """Rescaled to sum to 1, the weight of one choice would be the constant 1."""
    layer = make_layer(router=router, top_k=1, renormalize=True)
    routing = layer.route(randn(9, 4), None, None)
    (gradient,) = torch.autograd.grad(routing.weights_TK.sum(), layer.router.weight)
    assert gradient.abs().max() > 1e-3
    assert (routing.weights_TK < 1).all()


@pytest.mark.parametrize("router", ["softmax", "noisy", "sigmoid", "expert_choice"])
def test_temperature_divides_the_scores(router: str) -> None:
    """The same as router weights divided by it."""
    dispatch = "capacity" if router == "expert_choice" else "dropless"
    hot = make_layer(router=router, dispatch=dispatch, router_temperature=4.0).eval()
    divided = make_layer(router=router, dispatch=dispatch).eval()
    with torch.no_grad():
        divided.router.weight /= 4
    x_TD = randn(9, 4)
    for ours, theirs in zip(hot.route(x_TD, None, None), divided.route(x_TD, None, None), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [0.0, 0.1, 0.5, 3.0])
def test_init_scale_is_a_factor_on_the_initial_weights(scale: float) -> None:
    plain, scaled = Router(256, 32, Init(0)), Router(256, 32, Init(0), scale)
    torch.testing.assert_close(scaled.weight, scale * plain.weight)
    # A normal distribution cut at three standard deviations has 0.9866 of its standard deviation.
    assert float(scaled.weight.detach().std()) == pytest.approx(0.9866 * scale * 256**-0.5, rel=0.03)
    layer = make_layer(d_model=256, router_init_scale=scale)
    torch.testing.assert_close(layer.router.weight, scale * make_layer(d_model=256).router.weight)


def test_router_is_computed_in_fp32_in_a_bf16_model() -> None:
    router, x_TD = Router(64, 8, Init(0)).bfloat16(), randn(5, 64).bfloat16()
    logits_TE = router(x_TD)
    assert logits_TE.dtype == torch.float32
    torch.testing.assert_close(logits_TE.double(), x_TD.double() @ router.weight.double().T, rtol=1e-5, atol=1e-5)


def test_jitter_stays_in_its_bounds_and_reaches_them() -> None:
    factors = jittered(torch.full((100, 100), 2.0, dtype=torch.float64), 0.1) / 2
    assert 0.9 <= float(factors.min()) < 0.901
    assert 1.099 < float(factors.max()) <= 1.1
    assert float(factors.mean()) == pytest.approx(1, abs=0.003)
    assert jittered(torch.ones(3, dtype=torch.bfloat16), 0.01).dtype == torch.float32, "bf16 has no 0.997"


@pytest.mark.parametrize("router", ["softmax", "noisy", "sigmoid", "expert_choice"])
def test_jitter_is_for_the_router_alone_and_only_in_training(router: str) -> None:
    """What the router sees is jittered; what the experts see is not."""
    dispatch = "capacity" if router == "expert_choice" else "dropless"
    layer, x_BSD = make_layer(router=router, dispatch=dispatch, router_jitter=0.2), randn(1, 50, 4)
    seen: dict[str, Tensor] = {}
    layer.router.register_forward_pre_hook(lambda _, inputs: seen.update(router=inputs[0]))
    layer.experts.register_forward_pre_hook(lambda _, inputs: seen.update(experts=inputs[0]))

    layer(x_BSD)
    ratio = seen["router"] / x_BSD[0]
    assert 0.8 <= float(ratio.min()) < 0.85
    assert 1.15 < float(ratio.max()) <= 1.2
    tokens = {tuple(row) for row in x_BSD[0].tolist()}
    assert {tuple(row) for row in seen["experts"].tolist()} <= tokens

    layer.eval()(x_BSD)
    assert torch.equal(seen["router"], x_BSD[0])
