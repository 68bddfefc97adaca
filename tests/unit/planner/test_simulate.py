from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_scale.errors import ConfigError
from moe_scale.moe.layer import rows_per_expert
from moe_scale.planner.cluster import preset
from moe_scale.planner.plan import make_plan
from moe_scale.planner.simulate import (
    all_to_all_seconds,
    capped_shares,
    draw_counts,
    group_members,
    measured_shares,
    params_per_rank,
    plan_all_to_all,
    routed_counts,
    simulate_plan,
    zipf_shares,
)
from moe_scale.planner.timing import Rates, flow_seconds
from moe_scale.planner.traffic import Flow
from tests.unit.planner.subjects import small


def run(subject, **changes):
    return simulate_plan(make_plan(subject), **({"zipf": 0.5, "routing": "", "spread": 0.02, "seed": 0} | changes))


def test_groups_are_neighbours_and_those_at_their_places() -> None:
    expert, expert_data = group_members(4, 2)
    assert expert.tolist() == [[0, 1], [2, 3]]
    assert expert_data.tolist() == [[0, 2], [1, 3]]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("ranks", [8, 24, 1024])
def test_the_ranks_parts_add_up_to_the_model(stage: int, ranks: int) -> None:
    ep = ["--moe.ep_size", "8"] if stage == 3 else []
    subject = small(
        *ep, ds=[f"zero_optimization.stage={stage}"], cluster=preset("H100", nodes=ranks // 8, devices_per_node=8)
    )
    held = params_per_rank(subject)
    assert held.shape == (ranks,)
    assert held.min() >= 0
    assert held.sum() == sum(subject.global_params().values())


def test_without_zero_every_rank_has_all() -> None:
    subject = small(ds=["zero_optimization.stage=0"])
    assert set(params_per_rank(subject)) == {sum(subject.global_params().values())}


def test_zipf_of_zero_is_even_and_of_more_is_not() -> None:
    assert np.allclose(zipf_shares(8, 0.0, 3, 0), 1 / 8)
    shares = zipf_shares(8, 1.0, 3, 0)
    assert np.allclose(shares.sum(axis=1), 1)
    assert np.allclose(shares.max(axis=1) / shares.min(axis=1), 8)
    assert (zipf_shares(8, 1.0, 3, 0) == shares).all()
    assert (zipf_shares(8, 1.0, 3, 1) != shares).any()


def test_all_to_all_plans_are_those_that_the_exchange_makes() -> None:
    """Sent and received as two ranks of an exchange would tell each other, done by hand."""
    counts_WE = np.array([[1, 2, 3, 4], [5, 6, 7, 8], [0, 0, 1, 0], [2, 2, 2, 2]])
    plan = plan_all_to_all(counts_WE, 2)
    assert plan.sent_WP.tolist() == [[3, 7], [11, 15], [0, 1], [4, 4]]
    assert plan.received_WP.tolist() == [[3, 11], [7, 15], [0, 4], [1, 4]]
    assert plan.arrived.tolist() == [14, 22, 4, 5]
    assert plan.arrived.sum() == counts_WE.sum()


def test_an_all_to_all_takes_as_long_as_its_slowest_rank() -> None:
    subject = small("--moe.ep_size", "2", cluster=preset("H100", intra_bandwidth=1e6, intra_latency=0.5))
    row = subject.config.model.d_model * subject.bytes_per_value
    counts_WE = np.zeros((8, 8), dtype=int)
    counts_WE[0, 4:] = 10  # rank 0 sends 40 rows to rank 1
    counts_WE[2, :4] = 99  # rows that stay
    seconds = all_to_all_seconds(plan_all_to_all(counts_WE, 2), subject, Rates(link=1.0))
    assert seconds.tolist() == pytest.approx([0.5 + 40 * row / 1e6, 0.5, 0.5, 0.5])


def test_a_trip_takes_what_the_plan_gives_it_at_measured_links_too() -> None:
    """An even exchange among 16 ranks of two nodes, with the latency of four hops, or with one link for all."""
    subject = small("--moe.ep_size", "16", "--moe.num_experts", "16", cluster=preset("H100", nodes=2))
    row = subject.config.model.d_model * subject.bytes_per_value
    even = plan_all_to_all(np.full((16, 16), 50), 16)
    for rates in (Rates(), Rates(measured={"link_bandwidth": 1e9, "link_latency": 1e-3})):
        planned, _ = flow_seconds(subject, Flow("all_to_all", "expert", "tokens", 16 * 50 * row, 1), rates)
        assert all_to_all_seconds(even, subject, rates).tolist() == pytest.approx([planned])


def test_what_is_drawn_has_the_asked_shares_and_rows() -> None:
    shares = zipf_shares(8, 1.0, 1, 0)[0]
    counts = draw_counts(shares, 5_000, 2, 4, np.random.default_rng(0))
    assert (counts.sum(axis=1) == 10_000).all()
    assert np.allclose(counts.sum(axis=0) / 40_000, shares, atol=0.02)


def test_no_token_chooses_an_expert_twice() -> None:
    """So an expert gets at most T rows of a rank: E/K times the mean."""
    shares = zipf_shares(8, 3.0, 1, 0)[0]
    assert shares.max() > 0.8
    capped = capped_shares(shares, 4)
    assert capped.max() == pytest.approx(1 / 4)
    assert capped.sum() == pytest.approx(1)
    assert capped_shares(np.array([1.0, 0, 0, 0]), 2).tolist() == pytest.approx([1 / 2, 1 / 6, 1 / 6, 1 / 6])
    assert capped_shares(shares, 1).tolist() == shares.tolist()
    counts = draw_counts(shares, 50, 4, 16, np.random.default_rng(0))
    assert counts.max() == 50
    assert (counts.sum(axis=1) == 200).all()
    assert run(small("--moe.top_k", "4"), zipf=3.0).expert_load.max() <= 8 / 4


def test_capacity_and_the_experts_own_choice_limit_what_is_sent() -> None:
    capacity = ("--moe.dispatch", "capacity", "--moe.capacity_factor", "1.0")
    subject, rng = small(*capacity), np.random.default_rng(0)
    shares = zipf_shares(8, 2.0, 1, 0)[0]
    assert routed_counts(subject, shares, rng).max() == rows_per_expert(
        subject.config.moe, subject.tokens, training=True
    )
    choice = run(small(*capacity, "--moe.router", "expert_choice"), zipf=2.0, spread=0.0)
    assert choice.expert_load.tolist() == [1.0, 1.0]
    assert choice.uneven_s == pytest.approx(choice.even_s)


@pytest.mark.parametrize("nodes", [1, 2])
def test_an_even_load_drawn_takes_about_as_long_as_planned(nodes: int) -> None:
    cluster = preset("H100", nodes=nodes)
    settings = ("--moe.ep_size", str(8 * nodes), "--moe.num_experts", "16", "--data.seq_len", "8192")
    found = run(small(*settings, cluster=cluster), zipf=0.0, spread=0.0)
    assert found.even_s <= found.uneven_s < 1.05 * found.even_s


def test_uneven_loads_and_slow_ranks_cost_time_and_seeds_repeat() -> None:
    subject = small("--moe.ep_size", "8", cluster=preset("H100", nodes=4))
    even, uneven = run(subject, zipf=0.0, spread=0.0), run(subject, zipf=1.0)
    assert even.slowdowns_W.max() == 1.0
    assert even.straggling_s == pytest.approx(even.uneven_s)
    assert uneven.expert_load.mean() > 2 > even.expert_load.mean()
    assert uneven.uneven_s > even.uneven_s
    assert uneven.straggling_s > uneven.uneven_s
    assert run(subject, zipf=1.0).record() == uneven.record()
    assert run(subject, zipf=1.0, seed=1).record() != uneven.record()


def test_a_dense_model_has_slow_ranks_alone() -> None:
    found = run(small("--moe.enabled", "false"), spread=0.1)
    assert found.layers_drawn == 0
    assert found.uneven_s == pytest.approx(found.even_s)
    assert found.straggling_s > found.even_s


def test_16384_ranks_of_a_large_model_in_one_process() -> None:
    subject = small(
        "--moe.ep_size", "8", "--model.num_layers", "48", cluster=preset("H100", nodes=2048)
    )  # fmt: skip
    found = run(subject)
    assert found.params_W.shape == (16_384,)
    assert found.params_W.sum() == sum(subject.global_params().values())
    assert not torch.distributed.is_initialized()


def test_measured_routing_is_that_of_the_last_logged_step(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = [
        {"router/tokens_per_expert": [[1, 1, 1, 1], [1, 1, 1, 1]]},
        {"router/tokens_per_expert": [[1, 3, 0, 0], [2, 2, 2, 2]]},
        {"eval/loss": 1.0},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    shares = measured_shares(file, 4, 3)
    assert shares.tolist() == [[0.25, 0.75, 0, 0], [0.25] * 4, [0.25, 0.75, 0, 0]]
    with pytest.raises(ConfigError, match="is of 4 experts, the plan of 8"):
        measured_shares(file, 8, 3)
    file.write_text("{}\n")
    with pytest.raises(ConfigError, match="has no router/tokens_per_expert"):
        measured_shares(file, 4, 3)
    with pytest.raises(ConfigError, match="No such file"):
        measured_shares(tmp_path / "nothing", 4, 3)


@pytest.mark.parametrize(
    "line",
    [
        "5",
        '{"router/tokens_per_expert": [[1, 2], [3]]}',
        '{"router/tokens_per_expert": [[1, 2, 3, -4]]}',
        '{"router/tokens_per_expert": [[1, 2, 3, NaN]]}',
        '{"router/tokens_per_expert": [["a", 2, 3, 4]]}',
        '{"router/tokens_per_expert": 7}',
        '{"router/tokens_per_expert": [[0, 0, 0, 0]]}',
    ],
)
def test_what_is_no_routing_is_one_message(tmp_path: Path, line: str) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(ConfigError, match=r"no table of counts|has no router|has no tokens"):
        measured_shares(file, 4, 3)
