from __future__ import annotations

import pytest

from moe_scale.planner.cluster import Cluster, preset
from moe_scale.planner.plan import Wishes
from moe_scale.planner.search import Layout, Outcome, candidates, reasons, search
from moe_scale.planner.timing import Rates
from recipes.lm_16l import RECIPE
from tests.unit.planner.subjects import small


def found(cluster: Cluster | None = None, *settings: str) -> list[Outcome]:
    subject = small(*settings, cluster=cluster)
    outcomes = search(RECIPE, subject, Wishes(), Rates())
    assert {o.layout for o in outcomes} == set(candidates(subject))
    return outcomes


def test_fitting_layouts_come_first_and_fastest_first() -> None:
    outcomes = found()
    fits = [not o.why for o in outcomes]
    assert fits == sorted(fits, reverse=True)
    speeds = [o.plan.tokens_per_s for o in outcomes if not o.why and o.plan]
    assert len(speeds) > 50
    assert speeds == sorted(speeds, reverse=True)
    ranked = [(-o.plan.tokens_per_s, o.plan.device_bytes) for o in outcomes if not o.why and o.plan]
    assert ranked == sorted(ranked)  # of two as fast the smaller is first


def test_a_layout_does_not_change_the_sequences_of_a_step() -> None:
    outcomes = found()
    assert {o.plan.subject.plan.json["train_batch_size"] for o in outcomes if o.plan} == {
        small().plan.json["train_batch_size"]
    }


def test_what_a_run_would_refuse_fails_with_its_reason() -> None:
    outcomes = {o.layout: o.why for o in found()}
    assert "moe.ep_size: 2 at ZeRO stage 1" in outcomes[Layout(1, 2, 1, False, False)]
    assert "without effect at stage 0" in outcomes[Layout(0, 1, 1, False, True)]
    assert "micro-batch 64 does not divide 32 sequences" in outcomes[Layout(3, 1, 64, False, False)]
    assert outcomes[Layout(3, 8, 1, True, True)] == ""


def test_what_does_not_fit_says_what_it_needs() -> None:
    outcomes = found(preset("A100-80", device_memory=3e7, reserved_memory=1.0))
    tight = [o for o in outcomes if "of a device's 28.6 MiB" in o.why]
    assert tight
    assert all(o.plan and o.plan.device_bytes > 3e7 for o in tight)
    assert all(o.plan and o.plan.device_bytes <= 3e7 for o in outcomes if not o.why)
    assert sum(len(kind) for kind in reasons(outcomes).values()) == sum(bool(o.why) for o in outcomes)


def test_a_dense_model_has_one_ep_size() -> None:
    assert {o.layout.ep_size for o in found(None, "--moe.enabled", "false")} == {1}


@pytest.mark.parametrize("layout", [Layout(3, 2, 4, True, False)])
def test_a_layout_reads_as_a_sentence(layout: Layout) -> None:
    assert str(layout) == "ZeRO-3, ep 2, micro-batch 4, recomputed"
