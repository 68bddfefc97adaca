"""Counts against a loop over tokens; mutual information against cases whose value is known."""

from __future__ import annotations

import math

import pytest
import torch

from moe_scale.config import MoEConfig
from moe_scale.evaluate.expert_usage import Grouping, LayerUsage, chosen_experts, watched_choices
from moe_scale.initialization import Init
from moe_scale.moe.layer import MoELayer
from moe_scale.parallel.groups import ParallelGroups


def grouping(*rows: list[float]) -> Grouping:
    return Grouping([str(number) for number in range(len(rows))], torch.tensor(rows, dtype=torch.float64))


def test_information_of_known_tables() -> None:
    assert grouping([5, 5], [10, 10]).mutual_information == pytest.approx(0, abs=1e-12)
    assert grouping([8, 0], [0, 8]).mutual_information == pytest.approx(1)
    assert grouping([8, 0, 0, 0], [0, 8, 0, 0], [0, 0, 8, 0], [0, 0, 0, 8]).mutual_information == pytest.approx(2)
    # H(G) - H(G|E), by hand: E = 0 is surely group 0, E = 1 is 1/3 to 2/3.
    half = grouping([2, 1], [0, 2])
    given = 3 / 5 * (-(1 / 3) * math.log2(1 / 3) - (2 / 3) * math.log2(2 / 3))
    assert half.mutual_information == pytest.approx(half.entropy - given)
    assert grouping([0, 0], [0, 0]).mutual_information == 0
    assert grouping([3, 3], [0, 0], [1, 2]).occurring().groups == ["0", "2"]
    assert grouping([3, 3], [0, 0]).shares().tolist() == [[0.5, 0.5], [0, 0]]


def test_chance_is_what_blind_experts_show() -> None:
    torch.manual_seed(0)
    found = []
    for _ in range(200):
        table = torch.zeros(4, 8, dtype=torch.float64)
        table.index_put_(
            (torch.randint(4, (500,)), torch.randint(8, (500,))), torch.ones(500, dtype=torch.float64), accumulate=True
        )
        found.append(Grouping(list("abcd"), table))
    mean = sum(f.mutual_information for f in found) / len(found)
    assert mean == pytest.approx(found[0].chance, rel=0.1)


@pytest.mark.parametrize("router", ["softmax", "sigmoid", "hash", "expert_choice"])
def test_counts_are_those_of_the_layer(router: str) -> None:
    choice = router == "expert_choice"
    config = MoEConfig(
        num_experts=6, top_k=2, intermediate_size=8, router=router, dispatch="capacity" if choice else "dropless"
    )
    layer = MoELayer(config, 12, ParallelGroups(), Init(3)).eval()
    torch.manual_seed(0)
    x, ids = torch.randn(3, 5, 12), torch.randint(50, (3, 5))
    valid = torch.ones(3, 5, dtype=torch.bool)
    valid[2, 3:] = False
    with watched_choices(layer) as seen, torch.no_grad():
        _, stats = layer(x, valid, ids)
    ((name, chosen_TE, valid_T),) = seen
    assert name == ""
    assert torch.equal(valid_T, valid.flatten())
    assert torch.equal(chosen_TE[valid_T].sum(dim=0).float(), stats.assignments_E)

    usage = LayerUsage(6, {"parity": ["even", "odd"]})
    groups_T = ids.flatten() % 2
    usage.add(chosen_TE[valid_T], {"parity": groups_T[valid_T]})
    for group in (0, 1):
        expected = chosen_TE[valid_T & (groups_T == group)].sum(dim=0).double()
        assert torch.equal(usage.groupings["parity"].counts_GE[group], expected)
    assert torch.equal(usage.counts_E.float(), stats.assignments_E)

    layer(x, valid, ids)
    assert len(seen) == 1, "nothing is watched any more"


def test_tokens_in_no_group_count_in_the_total_alone() -> None:
    usage = LayerUsage(2, {"kind": ["a"]})
    usage.add(torch.tensor([[True, False], [False, True]]), {"kind": torch.tensor([0, -1])})
    assert usage.counts_E.tolist() == [1, 1]
    assert usage.groupings["kind"].counts_GE.tolist() == [[1, 0]]


def test_load_figures() -> None:
    usage = LayerUsage(4, {})
    usage.counts_E = torch.tensor([0.0, 100.0, 100.0, 200.0], dtype=torch.float64)
    assert usage.load_max == 2
    assert usage.load_cv == pytest.approx(math.sqrt(0.5))
    assert usage.unused == 1


def test_choices_of_a_token_are_distinct_experts() -> None:
    layer = MoELayer(MoEConfig(num_experts=5, top_k=3, intermediate_size=4), 8, ParallelGroups(), Init(0))
    routing = layer.route(torch.randn(7, 8), None, None)
    assert chosen_experts(routing, 7).sum(dim=1).tolist() == [3] * 7
