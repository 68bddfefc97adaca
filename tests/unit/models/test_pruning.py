"""Layers with fewer experts against the layer that has all of them and may not choose some."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_scale.config import DecoderConfig, MoEConfig
from moe_scale.models import pruning
from moe_scale.models.counts import num_params
from moe_scale.models.decoder import DecoderLM
from moe_scale.models.pruning import aligned, grouped, highest, kept_number, prune_model, pruned_layer, sparse_layers
from moe_scale.moe.layer import MoELayer
from tests.unit.models.sparse_layers import VARIANTS, random_layer

KEPT = [1, 2, 5, 7]


def may_not_choose(layer: MoELayer, dropped: list[int]) -> None:
    """Make the router's scores of these experts -inf, whatever the token."""
    mask_E = torch.zeros(layer.config.num_experts, dtype=torch.float64)
    mask_E[dropped] = float("-inf")
    layer.router.register_forward_hook(lambda module, given, logits_TE: logits_TE + mask_E)
    if layer.config.router == "sigmoid":
        layer.selection_bias_E += mask_E


@pytest.mark.parametrize("name", VARIANTS)
def test_a_pruned_layer_is_one_that_may_not_choose_the_others(name: str) -> None:
    layer = random_layer(**VARIANTS[name])
    x_BSD = torch.randn(2, 30, 16, dtype=torch.float64)
    pruned = pruned_layer(layer, [[expert] for expert in KEPT])
    full = copy.deepcopy(layer)
    may_not_choose(full, [expert for expert in range(8) if expert not in KEPT])
    with torch.no_grad():
        expected, stats = full(x_BSD)
        found, its_stats = pruned(x_BSD)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert its_stats.assignments_E.tolist() == stats.assignments_E[KEPT].tolist()
    with torch.no_grad():
        assert not torch.allclose(found, layer(x_BSD)[0]), "the dropped experts were not needed: nothing is tested"


def test_a_pruned_layer_with_fewer_experts_than_choices_uses_all_of_them() -> None:
    layer = random_layer(top_k=3)
    pruned = pruned_layer(layer, [[4], [6]])
    assert (pruned.config.num_experts, pruned.config.top_k) == (2, 2)
    x_BSD = torch.randn(1, 9, 16, dtype=torch.float64)
    logits_TE = layer.router(x_BSD[0])[:, [4, 6]]
    outputs = [layer.experts(x_BSD[0], torch.tensor([9 if e == number else 0 for e in range(8)])) for number in (4, 6)]
    expected = (logits_TE.softmax(dim=1).unsqueeze(2) * torch.stack(outputs, dim=1)).sum(dim=1)
    torch.testing.assert_close(pruned(x_BSD)[0][0], expected)


def shuffled(weights: dict[str, Tensor], gated: bool, seed: int) -> dict[str, Tensor]:
    """An expert's weights with its neurons in another order."""
    order_F = torch.randperm(weights["down"].shape[1], generator=torch.Generator().manual_seed(seed))
    rows_I = torch.cat([order_F, order_F + len(order_F)]) if gated else order_F
    moved = {name: values[rows_I] for name, values in weights.items() if name.startswith("gate_up")}
    return weights | moved | {"down": weights["down"][:, order_F]}


def with_equal_experts(groups: list[list[int]], **settings: Any) -> MoELayer:
    """A layer whose experts are equal within each group, but for the order of their neurons."""
    layer, gated = random_layer(**settings), settings.get("activation", "swiglu") == "swiglu"
    with torch.no_grad():
        for group in groups:
            first = {name: values[group[0]].clone() for name, values in layer.experts.named_parameters()}
            for expert in group[1:]:
                for name, values in shuffled(first, gated, seed=expert).items():
                    getattr(layer.experts, name)[expert] = values
    return layer


@pytest.mark.parametrize("settings", [{}, {"activation": "gelu", "expert_bias": True}, {"router": "sigmoid"}])
def test_merging_equal_experts_changes_nothing(settings: dict[str, Any]) -> None:
    """All experts are one function: wherever tokens go that were sent to dropped ones, the output is the same."""
    everyone = [[3, 0, 1], [4, 2, 5, 6, 7]]
    layer = with_equal_experts([list(range(8))], **settings)
    usage_E = torch.arange(1, 9)
    x_BSD = torch.randn(2, 20, 16, dtype=torch.float64)
    with torch.no_grad():
        before, stats = layer(x_BSD)
        after, its_stats = pruned_layer(layer, everyone, usage_E)(x_BSD)
    assert its_stats.assignments_E.sum() == stats.assignments_E.sum()
    torch.testing.assert_close(after, before, rtol=1e-11, atol=1e-12)


def test_merging_without_alignment_would_change_the_output() -> None:
    layer = with_equal_experts([[0, 1]])
    experts = dict(layer.experts.named_parameters())
    merged = pruning.merge(experts, [0, 1], torch.tensor([3, 1, 0, 0, 0, 0, 0, 0]), gated=True)
    for name, values in merged.items():
        torch.testing.assert_close(values, experts[name][0])
        assert (experts[name][0] * 0.75 + experts[name][1] * 0.25 - values).abs().max() > 0.01


def test_a_merged_expert_is_the_average_by_usage() -> None:
    layer = random_layer(activation="relu")
    experts = dict(layer.experts.named_parameters())
    usage_E = torch.tensor([6, 0, 2, 0, 0, 0, 0, 0])
    second = {name: values[2] for name, values in experts.items()}
    second = aligned(second, {name: values[0] for name, values in experts.items()}, gated=False)
    merged = pruning.merge(experts, [0, 1, 2], usage_E, gated=False)
    for name in experts:
        torch.testing.assert_close(merged[name], 0.75 * experts[name][0] + 0.25 * second[name])
    unused = pruning.merge(experts, [3, 4], usage_E, gated=False)
    assert all(torch.equal(unused[name], experts[name][3]) for name in experts)


@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_aligning_is_the_nearest_of_all_orders_and_the_same_function(activation: str) -> None:
    gated = activation == "swiglu"
    layer = random_layer(activation=activation, intermediate_size=4, expert_bias=True)
    one, other = ({name: v[e].detach() for name, v in layer.experts.named_parameters()} for e in (0, 1))
    found = aligned(other, one, gated=gated)

    def distance(expert: dict[str, Tensor]) -> float:
        return sum(float((expert[name] - one[name]).square().sum()) for name in one)

    orders = [shuffled(other, gated, seed) for seed in range(200)]  # of 24 orders, by far enough draws
    assert distance(found) == pytest.approx(min(distance(order) for order in orders))
    with torch.no_grad():
        x_RD, counts_E = torch.randn(5, 16, dtype=torch.float64), torch.tensor([0, 5, 0, 0, 0, 0, 0, 0])
        before = layer.experts(x_RD, counts_E)
        for name, values in found.items():
            getattr(layer.experts, name)[1] = values
        torch.testing.assert_close(layer.experts(x_RD, counts_E), before)


def test_dropped_experts_join_the_kept_one_that_is_most_alike() -> None:
    similarity_EE = torch.tensor([[1, 0.9, 0.1, 0.3], [0.9, 1, 0.2, 0.4], [0.1, 0.2, 1, -0.5], [0.3, 0.4, -0.5, 1]])
    assert grouped(similarity_EE, [2, 0]) == [[0, 1, 3], [2]]
    assert grouped(similarity_EE, [3, 1]) == [[1, 0, 2], [3]]


def test_the_highest_scores_are_kept_in_the_order_of_the_experts() -> None:
    assert highest(torch.tensor([1.0, 5.0, 2.0, 5.0, 0.0]), 3) == [1, 2, 3]
    assert highest(torch.tensor([2, 2, 2]), 2) == [0, 1]
    assert [kept_number(16, 0.5), kept_number(4, 0.01), kept_number(10, 0.34)] == [8, 1, 3]


def test_a_pruned_model_has_fewer_experts_and_the_rest_as_it_was() -> None:
    config = DecoderConfig(num_layers=4, d_model=16, num_heads=4, num_kv_heads=2, vocab_size=50)
    moe = MoEConfig(num_experts=6, intermediate_size=8, every=2, router="sigmoid", shared_intermediate_size=4)
    model = DecoderLM(config, moe, seed=3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    groups = {"layers.1.moe": [[0], [3], [5]], "layers.3.moe": [[1], [2], [4]]}
    pruned = prune_model(model, groups)
    assert sum(p.numel() for p in pruned.parameters()) == num_params(config, pruned.moe_config).total
    assert pruned.head.weight is pruned.embedding.weight
    expected = DecoderLM(config, pruned.moe_config, seed=0)
    assert {n: t.shape for n, t in expected.state_dict().items()} == {
        n: t.shape for n, t in pruned.state_dict().items()
    }
    for name, tensor in pruned.state_dict().items():
        first = [group[0] for group in groups.get(".".join(name.split(".")[:3]), [])]
        of_experts = name.endswith(("router.weight", "bias_E")) or ".experts." in name
        assert torch.equal(tensor, before[name][first] if of_experts else before[name]), name
    assert model.moe_config.num_experts == 6
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    ids_BS = torch.randint(50, (2, 7))
    assert pruned(ids_BS).isfinite().all()
    with pytest.raises(ValueError, match="every sparse layer"):
        prune_model(model, {"layers.1.moe": [[0]]})
    assert sparse_layers(pruned).keys() == groups.keys()


def test_what_has_no_experts_to_drop_is_refused() -> None:
    def said(num_kept: int = 4, **settings: Any) -> str:
        return "; ".join(map(str, pruning.pruning_problems("RUN", MoEConfig(num_experts=8, **settings), 4, num_kept)))

    assert not said()
    assert "holds a dense model" in said(enabled=False)
    assert "moe.router hash" in said(router="hash")
    assert "moe.router expert_choice" in said(router="expert_choice", dispatch="capacity")
    assert "--keep: keeps all 8 experts" in said(8)
    assert "keep at least 2" in said(1, every=2)
    assert not said(1)
    assert pruning.pruned_config(MoEConfig(num_experts=8, ep_size=4), 6).ep_size == 2
