from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_scale.errors import ConfigError
from moe_scale.models.counts import training_flops_per_token
from moe_scale.planner.cluster import preset
from moe_scale.planner.plan import Plan, Wishes, make_plan, shapes_for
from moe_scale.planner.timing import Rates, calibration_problems, flops, layout_of, read_rates
from moe_scale.planner.traffic import Flow, neighbours, on_links, step_traffic
from tests.unit.planner.subjects import small

WISHES = Wishes(masked=False)
SLOW = preset("CPU", devices_per_node=2, intra_bandwidth=1e6)
RATES = {"attention": 1e11, "sparse": 2e11, "head": 4e11, "micro": 2e-9, "update": 1e-9}


def plan(*settings: str, cluster=None, wishes: Wishes = WISHES, rates: Rates | None = None, ds=()) -> Plan:
    return make_plan(small(*settings, cluster=cluster, ds=ds), wishes, rates)


@pytest.mark.parametrize(
    "settings",
    [[], ["--moe.enabled", "false"], ["--moe.every", "2", "--moe.residual", "true"], ["--moe.router", "noisy"]],
    ids=" ".join,
)
def test_flops_by_part_add_up_to_those_of_the_mfu(settings: list[str]) -> None:
    subject = small(*settings)
    config = subject.config
    found = sum(flops(subject, shapes_for(subject, WISHES)).values())
    expected = subject.tokens * training_flops_per_token(config.model, config.moe, config.data.seq_len)
    mix = 3 * 2 * subject.tokens * config.model.d_model * 2 * config.moe.residual  # two scores of Residual MoE
    assert found == pytest.approx(expected, abs=mix + 1)


def test_recomputing_costs_a_third_more_of_the_layers() -> None:
    once, again = (
        flops(s, shapes_for(s, WISHES)) for s in (small(), small("--model.activation_checkpointing", "true"))
    )
    assert again["experts"] == pytest.approx(once["experts"] * 4 / 3)
    assert again["head"] == once["head"]


def test_mfu_and_budget_follow_from_the_step() -> None:
    found = plan(wishes=Wishes(tokens=1e9, price=2.0))
    record = found.record()
    assert found.mfu == pytest.approx(
        found.flops_per_token * found.subject.tokens_per_step / found.step_s / 8 / (312e12)
    )
    assert record["budget"]["device_hours"] == pytest.approx(1e9 / found.tokens_per_s / 3600 * 8)
    assert record["budget"]["cost"] == pytest.approx(2 * record["budget"]["device_hours"])
    assert record["time"]["step_s"] == pytest.approx(sum(p["seconds"] for p in record["time"]["parts"].values()))
    json.dumps(record)


def test_slower_links_and_more_nodes_cost_time() -> None:
    ds = ["zero_optimization.stage3_max_reuse_distance=0", "zero_optimization.overlap_comm=false"]
    fast = plan("--moe.ep_size", "8", ds=ds)
    slow = plan("--moe.ep_size", "8", cluster=preset("A100-80", intra_bandwidth=1e8), ds=ds)
    assert slow.step_s > 2 * fast.step_s
    assert slow.bound == "intra"


def test_an_uneven_load_makes_experts_slower() -> None:
    even, uneven = (
        {p.name: p.seconds for p in plan("--moe.ep_size", "2", cluster=SLOW, wishes=Wishes(imbalance=x)).parts}
        for x in (1.0, 3.0)
    )
    tokens = "all_to_all: tokens, forward (expert)"
    assert uneven[tokens] == pytest.approx(3 * even[tokens], rel=0.01)
    alone = [plan(cluster=SLOW, wishes=Wishes(imbalance=x)).step_s for x in (1.0, 3.0)]
    assert alone[0] == alone[1]
    assert uneven["experts"] == pytest.approx(3 * even["experts"])
    assert uneven["head"] == even["head"]


def test_overlapped_communication_hides_behind_compute() -> None:
    ds = ["zero_optimization.stage3_max_reuse_distance=0", "zero_optimization.stage3_param_persistence_threshold=0"]
    hidden = plan(ds=ds)
    shown = plan(ds=[*ds, "zero_optimization.overlap_comm=false"])
    assert hidden.step_s < shown.step_s
    assert sum(p.busy for p in hidden.parts) == pytest.approx(sum(p.busy for p in shown.parts))


def test_nothing_is_sent_by_one_rank() -> None:
    assert step_traffic(small(cluster=preset("H100", devices_per_node=1))) == []


def test_loads_of_all_ranks_are_added_up_where_they_count() -> None:
    def loads(*settings: str) -> list[float]:
        return [f.payload for f in step_traffic(small(*settings)) if "loads" in f.purpose]

    assert loads() == []
    assert loads("--moe.aux_loss_scope", "global") == [2 * 4 * 8 * 8]  # layers, micro-batches, experts, int64
    assert loads("--moe.router", "sigmoid") == [2 * 8 * 4]
    assert loads("--moe.aux_loss_scope", "global", "--moe.enabled", "false") == []


def test_what_crosses_nodes_is_what_the_group_spans() -> None:
    subject = small("--moe.ep_size", "4", cluster=preset("H100", nodes=2))
    all_to_all = on_links(subject, Flow("all_to_all", "expert", "", 400.0, 1))
    assert (all_to_all.intra, all_to_all.inter) == (300.0, 0.0)  # four ranks of one node; a quarter stays
    wide = small("--moe.ep_size", "8", cluster=preset("H100", nodes=2, devices_per_node=4))
    spread = on_links(wide, Flow("all_to_all", "expert", "", 800.0, 1))
    assert (spread.intra, spread.inter) == (300.0, 400.0)
    gather = on_links(subject, Flow("all_gather", "world", "", 1600.0, 1))
    assert gather.intra == 1500.0
    assert gather.inter == 1500 / 8  # a link of each of eight rings
    experts = on_links(subject, Flow("all_gather", "expert-data", "", 400.0, 1))
    assert experts.inter == 150.0  # two of its four ranks are here: two rings
    both = on_links(subject, Flow("all_reduce", "world", "", 1600.0, 1))
    assert (both.intra, both.inter) == (2 * gather.intra, 2 * gather.inter)


def test_a_group_that_straddles_nodes_waits_for_its_worst_member() -> None:
    """Six neighbours on nodes of eight: ranks 6 and 7 have four of their group elsewhere."""
    settings = ("--moe.num_experts", "6", "--moe.ep_size", "6")
    subject = small(*settings, cluster=preset("H100", nodes=3))
    sent = on_links(subject, Flow("all_to_all", "expert", "", 600.0, 1))
    assert (sent.intra, sent.inter) == (500.0, 400.0)
    assert neighbours(24, 8, 6, "expert") == (2, 6)
    assert neighbours(24, 8, 6, "expert-data") == (1, 2)
    assert neighbours(24, 8, 6, "world") == (8, 8)
    ring = on_links(subject, Flow("all_gather", "expert-data", "", 400.0, 1))
    assert (ring.intra, ring.inter) == (300.0, 300.0)


def test_measured_rates_replace_the_assumed_ones(tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    layout = layout_of(small(cluster=preset("CPU")))
    file.write_text(json.dumps({"rates": RATES, "device": "a CPU", "layout": layout}))
    rates = read_rates(str(file))
    assert "a CPU" in rates.source
    assert calibration_problems(small(cluster=preset("CPU")), rates) == []
    found = plan(cluster=preset("CPU"), rates=rates)
    seconds = {part.name: part.seconds for part in found.parts}
    count = flops(found.subject, shapes_for(found.subject, WISHES))
    micro = found.subject.plan.grad_accum
    assert seconds["sparse"] == pytest.approx(micro * (count["experts"] + count["router"]) / 2e11)
    numel = sum(p.numel for p in found.subject.parameters)
    assert seconds["gradients"] == pytest.approx(micro * numel * 2e-9)
    assert seconds["optimizer"] == pytest.approx(numel * 1e-9)
    assert found.bound == "measured"
    assert found.mfu is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("{", "it is no calibration"),
        ("[1]", "it is no calibration"),
        ('{"rates": {"attention": 1}}', "lacks a positive head, micro, update"),
        (json.dumps({"rates": RATES | {"sparse": -1}}), "lacks a positive rate"),
    ],
)
def test_a_file_that_is_no_calibration_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "calibration.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_rates(str(file))


def test_a_calibration_of_other_blocks_is_refused() -> None:
    rates = Rates(measured={"attention": 1e11, "dense": 1e11, "head": 1e11, "micro": 1e-9, "update": 1e-9})
    with pytest.raises(ConfigError, match="no rate of sparse blocks"):
        plan(rates=rates)


@pytest.mark.parametrize(
    ("ds", "settings", "cluster", "differs"),
    [
        (["zero_optimization.stage=1"], [], "CPU", "zero_stage 3, planned 1"),
        (["bf16.enabled=false"], [], "CPU", "precision bf16, planned fp32"),
        (['zero_optimization.offload_optimizer={"device":"cpu"}'], [], "CPU", "offload_optimizer False, planned True"),
        (["train_micro_batch_size_per_gpu=1"], [], "CPU", "micro_batch 8, planned 1"),
        ([], ["--data.seq_len", "64"], "CPU", "seq_len 32, planned 64"),
        ([], [], "H100", "device CPU, planned NVIDIA H100"),
    ],
)
def test_a_calibration_of_another_layout_is_refused(ds, settings, cluster: str, differs: str) -> None:
    rates = Rates(measured=RATES, measured_for=layout_of(small(cluster=preset("CPU"))))
    subject = small(*settings, ds=ds, cluster=preset(cluster, devices_per_node=1))
    assert differs in "; ".join(map(str, calibration_problems(subject, rates)))


def test_ranks_of_a_calibration_count_where_their_links_were_measured() -> None:
    measured_for = layout_of(small(cluster=preset("CPU", devices_per_node=2)))
    one, linked = (Rates(measured=m, measured_for=measured_for) for m in (RATES, RATES | {"link_bandwidth": 1e9}))
    four = small(cluster=preset("CPU", devices_per_node=4))
    assert calibration_problems(four, one) == []
    assert "ranks 2, planned 4" in "; ".join(map(str, calibration_problems(four, linked)))
