"""The rules of model states against sums done by hand; against real ranks: ``tests/distributed/test_planner.py``."""

from __future__ import annotations

import pytest

from moe_scale.planner.cluster import preset
from moe_scale.planner.memory import model_states, sub_groups
from tests.unit.planner.subjects import small

BUCKET = "zero_optimization.reduce_bucket_size=1000"


def numel(subject) -> int:
    return sum(p.numel for p in subject.parameters)


def test_zero_shards_what_its_stage_says() -> None:
    """In bf16: 2 bytes of weights, 2 of gradients, 4 of master weights and 8 of moments (arXiv 1910.02054)."""
    total = numel(small())
    everything, ranks = 0.01 * 16 * total, 8
    accum = "gradient_accumulation_steps=1"
    expected = {
        0: (2 * total, 2 * total, 12 * total),
        1: (2 * total, None, 12 * total / ranks),
        2: (2 * total, None, 12 * total / ranks),
        3: (2 * total / ranks, 2 * total / ranks, 12 * total / ranks),
    }
    for stage, (weights, gradients, optimizer) in expected.items():
        states = model_states(small(ds=[f"zero_optimization.stage={stage}", accum, BUCKET]))
        assert abs(states.weights - weights) < everything, stage
        assert abs(states.master + states.moments - optimizer) < everything, stage
        if gradients is not None:
            assert abs(states.gradients_at_update - gradients) < everything, stage
        else:  # whole parameters that the part touches
            assert 2 * total / ranks <= states.gradients_at_update < 2 * total


def test_8_bit_moments_take_two_bytes_and_scales() -> None:
    plain = model_states(small())
    small_moments = model_states(small("--optim.name", "adamw8bit"))
    assert 2.0 < 8 * small_moments.moments / plain.moments < 2.4


def test_micro_batches_of_bf16_are_added_up_in_fp32() -> None:
    one, several = (model_states(small(ds=[f"gradient_accumulation_steps={n}"])) for n in (1, 4))
    assert several.gradients == 2 * one.gradients


def test_offloading_moves_the_optimizer_to_the_host() -> None:
    states = model_states(small(ds=['zero_optimization.offload_optimizer={"device":"cpu"}', BUCKET]))
    assert {"master", "moments", "host_gradients"} <= states.on(host=True).keys()
    assert states.on(host=False).keys() == {"weights", "whole", "bucket"}


def test_stage_1_keeps_all_gradients_until_the_last_micro_batch() -> None:
    def in_passes(stage: int, *ds: str) -> float:
        """Bytes a parameter, on the device."""
        subject = small(ds=[f"zero_optimization.stage={stage}", BUCKET, *ds])
        return model_states(subject).on(host=False, moment="in passes")["gradients_in_passes"] / numel(subject)

    offload, part = 'zero_optimization.offload_optimizer={"device":"cpu"}', 4 / 8
    accumulating = "gradient_accumulation_steps=4"  # in fp32
    assert in_passes(1, offload, accumulating) == pytest.approx(4 + part, rel=0.01)
    assert in_passes(2, offload, accumulating) == pytest.approx(part, rel=0.01)
    assert in_passes(1, "gradient_accumulation_steps=1", "zero_optimization.overlap_comm=false") > 2
    assert in_passes(2, "gradient_accumulation_steps=1", "zero_optimization.overlap_comm=false") < 1


def test_small_parameters_are_whole_unless_the_shard_is_the_whole() -> None:
    def threshold(value: int, **cluster: int) -> int:
        found = small(
            ds=[f"zero_optimization.stage3_param_persistence_threshold={value}"], cluster=preset("A100-80", **cluster)
        )
        return model_states(found).whole

    assert threshold(0) == 0
    assert 0 < threshold(64) < threshold(10**6)
    assert threshold(10**6, devices_per_node=1) == 0


def test_sub_groups_are_closed_when_they_are_full() -> None:
    subject = small(ds=["zero_optimization.sub_group_size=1000"])
    assert len(sub_groups(subject)) > 2
    assert [p for group in sub_groups(subject) for p in group] == sorted(subject.parameters, key=lambda p: p.group)
