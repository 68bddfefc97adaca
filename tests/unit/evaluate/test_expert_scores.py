"""Scores of experts against loops over single tokens, and the greedy choice against all sets of experts."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from moe_scale.config import DecoderConfig, MoEConfig
from moe_scale.data.packing import Batch
from moe_scale.evaluate.expert_scores import (
    Reconstruction,
    layer_inputs,
    logit_similarity,
    output_norms,
    scores_of,
    usage,
)
from moe_scale.models.decoder import DecoderLM
from moe_scale.models.pruning import pruned_layer
from moe_scale.moe.layer import MoELayer
from tests.unit.models.sparse_layers import VARIANTS, random_layer

TOKENS = 40


def tokens() -> Tensor:
    return torch.randn(TOKENS, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def run(layer: MoELayer, expert: int, x_D: Tensor) -> Tensor:
    """An expert's output of one token, by its matrices."""
    experts = layer.experts
    hidden_I = experts.gate_up[expert] @ x_D
    if experts.gate_up_bias is not None:
        hidden_I = hidden_I + experts.gate_up_bias[expert]
    gate_F, up_F = hidden_I.chunk(2) if experts.activation == "swiglu" else (hidden_I, torch.ones(()))
    activation = {"swiglu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu, "relu": torch.relu}
    out_D = experts.down[expert] @ (activation[experts.activation](gate_F) * up_F)
    return out_D if experts.down_bias is None else out_D + experts.down_bias[expert]


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_weights_are_those_of_the_layer(name: str) -> None:
    layer, x_TD = random_layer(**VARIANTS[name]), tokens()
    weights_TE = scores_of(layer, x_TD).weights()
    expected_TD = torch.stack(
        [
            sum(weight * run(layer, expert, x_D) for expert, weight in enumerate(weights_E))
            for x_D, weights_E in zip(x_TD, weights_TE, strict=True)
        ]
    )
    if layer.dense is not None:
        share_T1 = 1.0 if layer.mix is None else layer.mix(x_TD).softmax(dim=1)[:, 1:]
        expected_TD = expected_TD + layer.dense(x_TD) * share_T1
    torch.testing.assert_close(layer(x_TD.unsqueeze(0))[0][0], expected_TD)
    assert (weights_TE != 0).sum(dim=1).tolist() == [layer.config.top_k] * TOKENS


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_usage_and_norms_are_those_of_single_tokens(name: str) -> None:
    layer, x_TD = random_layer(**VARIANTS[name]), tokens()
    counts, sums = [0] * 8, [0.0] * 8
    for x_D in x_TD:  # one token at a time, through the layer's own route
        routing = layer.route(x_D.unsqueeze(0), None, None)
        weights_K = routing.weights_TK[0] / (routing.weights_TK.sum() if layer.config.conventions == "deepspeed" else 1)
        share = 1.0 if layer.mix is None else float(layer.mix(x_D).softmax(dim=0)[0])
        for expert, weight in zip(routing.ids_TK[0].tolist(), weights_K.tolist(), strict=True):
            counts[expert] += 1
            sums[expert] += share * weight * float(run(layer, expert, x_D).norm())
    assert usage(layer, x_TD).tolist() == counts
    expected = [total / count if count else 0.0 for total, count in zip(sums, counts, strict=True)]
    assert output_norms(layer, x_TD).tolist() == pytest.approx(expected)


def test_an_expert_that_no_token_is_sent_to_scores_0() -> None:
    layer = random_layer(router="sigmoid")
    layer.selection_bias_E[3] = -5
    assert (usage(layer, tokens())[3], output_norms(layer, tokens())[3]) == (0, 0)


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_the_error_is_how_far_the_layers_output_moves(name: str) -> None:
    layer, x_TD = random_layer(**VARIANTS[name]), tokens()
    reconstruction = Reconstruction(layer, x_TD)
    before_TD = layer(x_TD.unsqueeze(0))[0][0]
    for kept in ([0, 2, 3, 6], [1, 7], [5]):
        after_TD = pruned_layer(layer, [[expert] for expert in kept])(x_TD.unsqueeze(0))[0][0]
        assert reconstruction.error(kept) == pytest.approx(float((before_TD - after_TD).square().sum()), rel=1e-9)
    assert reconstruction.error(range(8)) == pytest.approx(0, abs=1e-9)
    dense_TD = layer.run_dense(x_TD)
    if layer.mix is None:
        rest_TD = before_TD if dense_TD is None else before_TD - dense_TD
        assert reconstruction.energy == pytest.approx(float(rest_TD.square().sum()))


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_each_elimination_is_the_best_of_all_experts(name: str) -> None:
    reconstruction = Reconstruction(random_layer(**VARIANTS[name]), tokens())
    kept = list(range(8))
    for left in range(7, 0, -1):
        kept = min(([e for e in kept if e != dropped] for dropped in kept), key=reconstruction.error)
        assert reconstruction.eliminate(left) == kept


@torch.no_grad()
def test_greedy_elimination_against_all_sets() -> None:
    """The first drop is the best one; after more, this greedy choice stays near the best of all sets, and far from
    the worst."""
    reconstruction = Reconstruction(random_layer(), tokens())
    for left in (7, 6, 4):
        errors = sorted(reconstruction.error(kept) for kept in itertools.combinations(range(8), left))
        found = reconstruction.error(reconstruction.eliminate(left))
        assert found == pytest.approx(errors[0]) if left == 7 else errors[0] <= found <= 1.1 * errors[0]
        assert found < errors[len(errors) // 4]


@torch.no_grad()
def test_similarity_is_the_cosine_of_scores() -> None:
    layer, x_TD = random_layer(), tokens()
    logits_TE = x_TD @ layer.router.weight.t()
    found = logit_similarity(layer, x_TD)
    for one, other in ((0, 3), (5, 5), (7, 2)):
        expected = torch.nn.functional.cosine_similarity(logits_TE[:, one], logits_TE[:, other], dim=0)
        torch.testing.assert_close(found[one, other], expected)


def test_inputs_are_what_the_layers_are_given() -> None:
    config = DecoderConfig(num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, vocab_size=50)
    model = DecoderLM(config, MoEConfig(num_experts=4, intermediate_size=8, every=2), seed=1).eval()
    ids_BS = torch.randint(50, (3, 5))
    batches = [Batch(ids_BS[:2], ids_BS[:2], torch.zeros(2, 5).long()), Batch(ids_BS[2:], ids_BS[2:], ids_BS[2:] // 25)]
    found = layer_inputs(model, batches)
    assert {name: tuple(x_TD.shape) for name, x_TD in found.items()} == {"layers.1.moe": (15, 16)}
    layer = model.layers[1]
    seen = []
    with torch.no_grad():
        layer.ffn_norm.register_forward_hook(lambda module, given, normed: seen.append(normed.flatten(0, 1)))
        for batch in batches:
            model(batch.ids_BS, document_ids_BS=batch.document_ids_BS)
    assert torch.equal(found["layers.1.moe"], torch.cat(seen))
    assert not layer.moe._forward_pre_hooks
