"""Plans of model states: counts, sums done by hand, what holds a model; ranks: ``tests/distributed/test_states.py``.

Bytes of a parameter (arXiv 1910.02054): 2 of weights and 2 of gradients in bf16, 4 of master weights, 8 of moments.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from moe_scale.errors import ConfigError
from moe_scale.models import classifier_counts, multimodal_counts, seq2seq_counts, switch_counts
from moe_scale.planner.cluster import PRESETS, Cluster, preset
from moe_scale.planner.gathering import _follow, follow, most_gathered, most_held
from moe_scale.planner.model import Parameter, Sharding, Variants, read_subject
from moe_scale.planner.plan import FRAGMENTATION
from moe_scale.planner.states import Held, StatesPlan, fewest, held_by, plan_states, sharding_of, shardings, sizes
from moe_scale.train.recipe import Recipe
from recipes import classifier, multimodal, switch, translation
from tests.unit.planner.subjects import small, small_multimodal

NO_BUCKET = ("zero_optimization.reduce_bucket_size=1000", "zero_optimization.overlap_comm=true")
ALL_SHARDED = "zero_optimization.stage3_param_persistence_threshold=0"
DEVICE, HOST = Sharding(3, 8, False), Sharding(3, 8, True)


def plan_of(*settings: str, ds: Sequence[str] = (), cluster: Cluster | None = None) -> StatesPlan:
    return plan_states(multimodal.RECIPE, small_multimodal(*settings, ds=ds, cluster=cluster))


def counted(found: Any) -> int:
    return found if isinstance(found, int) else found.total


@pytest.mark.parametrize("scale", ["cpu", "1gpu", "1node", "multinode"])
@pytest.mark.parametrize(
    ("recipe", "counts"),
    [
        (multimodal.RECIPE, multimodal_counts),
        (classifier.RECIPE, classifier_counts),
        (switch.RECIPE, switch_counts),
        (translation.RECIPE, seq2seq_counts),
    ],
    ids=lambda value: value.name if isinstance(value, Recipe) else "",
)
def test_parameters_are_those_that_the_settings_give(recipe: Recipe, counts: Any, scale: str) -> None:
    cluster = preset("CPU") if scale == "cpu" else preset("H100", nodes=2 if scale == "multinode" else 1)
    subject = read_subject(recipe, ["--scale", scale], cluster)
    config = subject.config
    assert sum(subject.global_params().values()) == counted(counts.num_params(config.model, config.moe))
    active = counted(counts.num_active_params(config.model, config.moe))
    assert sum(subject.global_params(active=True).values()) == active
    assert not subject.is_decoder
    assert subject.tokens == subject.plan.micro_batch * recipe.task(config).tokens_per_sequence


def test_all_stages_are_tried_with_and_without_offload() -> None:
    plan = plan_of("--moe.ep_size", "4")
    assert [o.sharding for o in plan.outcomes] == [
        Sharding(0, 1, False), Sharding(1, 1, False), Sharding(1, 1, True), Sharding(2, 1, False),
        Sharding(2, 1, True), Sharding(3, 4, False), Sharding(3, 4, True),
    ]  # fmt: skip
    assert plan.own.sharding == Sharding(3, 4, False)
    assert plan.own.held
    assert plan.own.held.states == held_by(plan.subject).states
    for outcome in plan.outcomes:
        assert outcome.held
        assert sharding_of(outcome.held.subject) == outcome.sharding
        assert not outcome.why


def test_bytes_of_a_rank_are_those_of_the_paper() -> None:
    plan = plan_of("--moe.ep_size", "1", ds=[*NO_BUCKET, ALL_SHARDED, "gradient_accumulation_steps=1"])
    total, ranks = sum(plan.subject.global_params().values()), 8
    largest = max(p.numel for p in plan.subject.parameters)
    held = {(o.sharding.stage, o.sharding.offload): o.held for o in plan.outcomes}

    def a_parameter(size: float) -> float:
        """Bytes of all of them as bytes of one."""
        return size / total

    for (stage, offload), found in held.items():
        assert isinstance(found, Held)
        weights = 2 / ranks if stage == 3 else 2
        optimizer = 12 / ranks if stage else 12
        gradients = 2 / ranks if stage == 3 else 0  # a flat buffer; those of other stages come and go
        device = weights + gradients * (not offload) + optimizer * (not offload)
        staging = 2 * largest / total if offload and stage < 3 else 0
        assert a_parameter(found.between_steps) == pytest.approx(device + staging, abs=0.05), (stage, offload)
        assert (found.host_bytes > 12 / ranks * total) == offload
    assert a_parameter(held[0, False].in_passes) == pytest.approx(2 + 12 + 2, abs=0.05)
    assert a_parameter(held[0, False].at_update) == pytest.approx(2 + 12 + 2 + 4, abs=0.05)  # gradients in fp32
    assert a_parameter(held[3, False].at_update) == pytest.approx(16 / ranks + 4 / ranks, abs=0.3)
    whole = held[3, False].in_passes - held[3, False].between_steps
    assert whole == 2 * total  # a small model is gathered as a whole


def test_what_is_left_is_what_fits() -> None:
    """To the byte: less memory by what is left, and nothing is left."""
    held = plan_of().own.held
    assert held
    assert held.room > 0
    memory = preset("A100-80").device_memory
    for change, fits in ((-1e6, False), (1e6, True)):
        tight = plan_of(cluster=preset("A100-80", device_memory=memory - held.room * (1 + FRAGMENTATION) + change))
        assert tight.own.held
        assert (tight.own.held.room > 0) == fits
        assert (not tight.own.why) == fits
        assert fits or "of a device's" in tight.own.why


def test_the_host_can_be_too_small_for_an_offloaded_optimizer() -> None:
    plan = plan_of(cluster=preset("A100-80", host_memory=1e6))
    why = {o.sharding: o.why for o in plan.outcomes}
    assert why[DEVICE] == ""
    assert "of a host's 1.0 MiB" in why[HOST]


def test_ranks_of_a_cpu_share_its_memory() -> None:
    cluster = preset("CPU", devices_per_node=2)
    held = plan_of("--moe.ep_size", "1", cluster=cluster).own.held
    assert held
    share = cluster.host_memory / 2 - cluster.reserved_memory
    assert held.room == pytest.approx(share / (1 + FRAGMENTATION) - held.in_passes)
    none = plan_of("--moe.ep_size", "1", cluster=preset("CPU", host_memory=6e8))
    assert none.own.held
    assert none.own.held.room < 0
    assert "of a host's" in none.own.why


def test_the_fewest_devices_are_found() -> None:
    """Memory for what is gathered and a fifth of the rest: eight of 1, 2, 4 and 8 devices with ZeRO-3."""
    total = sum(small_multimodal().global_params().values())
    kind = preset("H200", device_memory=(1 + FRAGMENTATION) * (2 + 16 / 5) * total, reserved_memory=1.0)
    plan = plan_of(ds=[*NO_BUCKET, ALL_SHARDED, "gradient_accumulation_steps=1"], cluster=kind)
    assert set(plan.machines) == {name for name in PRESETS if name != "CPU"}
    assert plan.machines["H200"][Sharding(0, 1, False)] is None
    eight = plan.machines["H200"][DEVICE]
    assert eight
    assert eight.subject.world_size == 8
    assert eight.room >= 0
    four = replace(kind, devices_per_node=4)
    too_few, _ = Variants(multimodal.RECIPE, plan.subject).make(Sharding(3, 4, False), cluster=four)
    assert too_few
    assert held_by(too_few).problems
    whole = plan.machines["A100-40"][Sharding(0, 1, False)]
    assert whole
    assert whole.subject.world_size == 1


def test_sizes_go_up_to_a_node_and_on_by_nodes() -> None:
    found = [(c.nodes, c.devices_per_node) for c in sizes(preset("H100", devices_per_node=6))]
    assert found[:6] == [(1, 1), (1, 2), (1, 4), (1, 6), (2, 6), (4, 6)]
    assert found[-1] == (64, 6)


def test_experts_are_spread_over_as_many_ranks_as_there_are() -> None:
    subject = small_multimodal("--moe.ep_size", "8")
    held = fewest(Variants(multimodal.RECIPE, subject), DEVICE, preset("H100"))
    assert held
    assert held.subject.world_size == 1
    assert held.subject.ep_size == 1
    assert sum(held.subject.global_params().values()) == sum(subject.global_params().values())


def test_a_dense_model_is_planned_too() -> None:
    plan = plan_of("--moe.enabled", "false")
    assert {o.sharding.ep_size for o in plan.outcomes} == {1}
    by_part = plan.subject.global_params()
    assert "experts" not in by_part
    assert by_part == plan.subject.global_params(active=True)


def test_an_offloaded_run_has_its_own_place_in_the_table() -> None:
    plan = plan_of(ds=['zero_optimization.offload_optimizer={"device": "cpu"}'])
    assert plan.own.sharding.offload
    assert [o.sharding.offload for o in plan.outcomes].count(False) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--lora.rank", "4"], "lora.rank: 4: what DeepSpeed holds of weights that are frozen"),
        (["--moe.backend", "autoep"], "modelled for the custom backend alone"),
        (["--deepspeed_override", 'zero_optimization.offload_param={"device": "cpu"}'], "offload_param"),
        (["--deepspeed_override", "zero_optimization.zero_hpz_partition_size=8"], "zero_hpz_partition_size"),
    ],
)
def test_what_is_not_modelled_is_refused(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small_multimodal("--moe.ep_size", "1", *settings)


def test_a_variant_that_no_run_could_be_says_why() -> None:
    variants = Variants(multimodal.RECIPE, small_multimodal())
    assert variants.make(Sharding(1, 8, False))[1] == "moe.ep_size: 8 at ZeRO stage 1 with moe.backend = custom"
    assert "without effect at stage 0" in variants.make(Sharding(0, 1, True))[1]
    assert "micro-batch 3 does not divide" in variants.make(DEVICE, micro_batch=3)[1]
    assert all(variants.make(sharding)[0] for sharding in shardings(variants.subject))


@pytest.mark.parametrize("limit", [0, 10_000, 10**9])
@pytest.mark.parametrize("ep_size", [1, 2])
def test_no_decoder_gathers_more_than_any_model_may(limit: int, ep_size: int) -> None:
    names = ("max_reuse_distance", "max_live_parameters", "prefetch_bucket_size")
    ds = [f"zero_optimization.stage3_{name}={limit}" for name in names]
    subject = small("--moe.ep_size", str(ep_size), "--model.num_layers", "6", ds=[*ds, ALL_SHARDED])
    assert 0 < follow(subject).peak_numel <= most_gathered(subject)


def test_no_order_of_modules_gathers_more_than_the_bound() -> None:
    at_the_bound = 0
    for seed in range(400):
        draw = random.Random(seed)
        modules = [
            [Parameter(f"{n}.{m}", (draw.choice([1, 5, 20, 100]),), "ffn", False, 0) for m in range(draw.randint(0, 3))]
            for n in range(draw.randint(1, 25))
        ]
        backward = [module for module in reversed(modules) for _ in range(draw.choice([1, 1, 2]))]
        prefetch, reuse, live = (draw.choice([0, 10, 50, 200, 1000, 5000]) for _ in range(3))
        names = {p.name for module in modules for p in module}
        found = _follow(modules + backward, len(modules), names, prefetch, reuse, live).peak_numel
        bound = most_held([sum(p.numel for p in module) for module in modules], reuse, live)
        assert found <= bound, seed
        at_the_bound += found == bound
    assert at_the_bound > 20
