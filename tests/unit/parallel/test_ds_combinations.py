"""What of a DeepSpeed JSON does not combine is told before anything starts, and what does combine is let through."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from moe_scale.config import LMConfig, MoEConfig
from moe_scale.errors import Problem
from moe_scale.parallel.device import Device
from moe_scale.parallel.ds_combinations import (
    gradient_problems,
    hierarchical_problems,
    master_problems,
    offload_problems,
    parallelism_problems,
    quantization_problems,
    zenflow_problems,
)
from moe_scale.parallel.launch import Launch

CPU = Device("cpu", "some CPU", bf16=True, fp16=True)
GPU = Device("cuda", "some GPU", bf16=True, fp16=True)


def launch(world_size: int, per_node: int = 8) -> Launch:
    return Launch(0, world_size, 0, min(world_size, per_node), "env")


def places(problems: list[Problem]) -> list[str]:
    """Where the problems are, without the words that all of them begin with."""
    return [problem.where.removeprefix("deepspeed_config: zero_optimization.") for problem in problems]


@pytest.mark.parametrize(
    ("zero", "where"),
    [
        ({"stage": 3, "cpu_offload": True}, "cpu_offload"),
        ({"stage": 3, "cpu_offload_params": True}, "cpu_offload_params"),
        ({"stage": 0, "offload_optimizer": {"device": "cpu"}}, "offload_optimizer"),
        ({"stage": 2, "offload_param": {"device": "cpu"}}, "offload_param"),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, "offload_param.device"),
        ({"stage": 0, "offload_optimizer": {"device": "none"}, "offload_param": {}}, None),
        ({"stage": 1, "offload_optimizer": {"device": "cpu"}}, None),
        ({"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/nvme"}}, "offload_optimizer.device"),
    ],
)
def test_offload(zero: dict[str, Any], where: str | None) -> None:
    assert places(offload_problems(zero, zero["stage"])) == ([where] if where else [])


@pytest.mark.parametrize(
    ("size", "world_size", "per_node", "what"),
    [
        (8, 32, 8, None),
        (4, 32, 8, None),
        (16, 32, 8, None),  # two nodes of one fast network
        (0, 32, 8, None),
        (1, 7, 8, None),
        (3, 32, 8, "3 does not divide the 32 ranks of this run; choose a divisor of 8"),
        (64, 32, 8, "64 does not divide the 32 ranks"),  # DeepSpeed would take it for 32
        (2, 1, 1, "2 does not divide the 1 rank of this run; remove it"),
        (8, 48, 12, "8 would cut nodes of 12 ranks; choose a divisor or a multiple of 12"),
        (6, 24, 8, "6 would cut nodes of 8 ranks"),
    ],
)
def test_hierarchical_partitions(size: int, world_size: int, per_node: int, what: str | None) -> None:
    found = hierarchical_problems({"zero_hpz_partition_size": size}, 3, launch(world_size, per_node))
    assert places(found) == (["zero_hpz_partition_size"] if what else [])
    assert (what or "") in "".join(map(str, found))


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize(
    "setting", ["zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_nontrainable_weights"]
)
def test_what_has_no_effect_below_stage_3(setting: str, stage: int) -> None:
    zero = {setting: 2 if "size" in setting else True}
    (found,) = hierarchical_problems(zero, stage, launch(8)) + quantization_problems(zero, stage, GPU)
    assert str(found).endswith(f"{setting}: without effect at stage {stage}; needs stage 3")


def test_quantized_communication() -> None:
    weights, gradients = {"zero_quantized_weights": True}, {"zero_quantized_gradients": True}
    assert quantization_problems(weights, 3, GPU) == []
    (on_cpu,) = quantization_problems(weights, 3, CPU)
    assert "need a GPU, not some CPU" in on_cpu.what
    for device in (CPU, GPU):
        (found,) = quantization_problems(gradients, 3, device)
        assert "bf16 as if it were fp16" in found.what
    assert quantization_problems(dict.fromkeys((*weights, *gradients), False), 0, CPU) == []


def test_ranks_that_ep_size_does_not_divide() -> None:
    def problems(ranks: int, moe: MoEConfig) -> list[str]:
        return [str(problem) for problem in parallelism_problems(LMConfig(moe=moe), {}, launch(ranks))]

    moe = MoEConfig(num_experts=8, ep_size=4)
    for ranks in (1, 2, 6):
        (found,) = problems(ranks, moe)
        assert found.startswith(f"moe.ep_size: 4 does not divide the {ranks} rank")
        assert found.endswith("start a multiple of 4 ranks or lower moe.ep_size")
    for ranks in (4, 8):
        assert problems(ranks, moe) == []
    assert problems(3, replace(moe, enabled=False)) == []


def test_hierarchical_partitions_with_autoep() -> None:
    config = LMConfig(moe=MoEConfig(num_experts=8, backend="autoep"))
    (found,) = parallelism_problems(config, {"zero_hpz_partition_size": 2}, launch(4))
    assert "does not combine with moe.backend = autoep" in str(found)


def test_hierarchical_partitions_with_expert_parallelism() -> None:
    spread = LMConfig(moe=MoEConfig(num_experts=8, ep_size=2))
    (found,) = parallelism_problems(spread, {"zero_hpz_partition_size": 2}, launch(4))
    assert "does not combine with moe.ep_size = 2" in str(found)
    assert parallelism_problems(spread, {"zero_hpz_partition_size": 0}, launch(4)) == []
    assert parallelism_problems(LMConfig(), {"zero_hpz_partition_size": 2}, launch(4)) == []


@pytest.mark.parametrize(
    ("raw", "where"),
    [
        ({"gradient_predivide_factor": 2}, ["gradient_predivide_factor"]),
        (
            {"gradient_predivide_factor": 2, "zero_optimization": {"reduce_scatter": False}},
            ["gradient_predivide_factor"],
        ),
        ({"prescale_gradients": True}, ["prescale_gradients"]),
        ({"gradient_predivide_factor": 1.0, "prescale_gradients": False}, []),
    ],
)
def test_gradients_that_zero_3_would_scale_wrongly(raw: dict[str, Any], where: list[str]) -> None:
    found = gradient_problems(raw, 3)
    assert [problem.where.removeprefix("deepspeed_config: ") for problem in found] == where
    assert gradient_problems(raw, 2) == []


@pytest.mark.parametrize(
    ("raw", "where"),
    [
        ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, ["bf16.bf16_master_weights_and_grads"]),
        ({"fp16": {"enabled": True, "fp16_master_weights_and_grads": True}}, ["fp16.fp16_master_weights_and_grads"]),
        ({"bf16": {"enabled": True, "bf16_optimizer_states": True}}, ["bf16.bf16_optimizer_states"]),
        ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": False}, "fp16": 1}, []),
    ],
)
def test_masters_of_16_bits_are_refused(raw: dict[str, Any], where: list[str]) -> None:
    assert [problem.where.removeprefix("deepspeed_config: ") for problem in master_problems(raw)] == where


def test_zenflow_is_refused() -> None:
    assert places(zenflow_problems({"zenflow": {"topk_ratio": 0.1}})) == ["zenflow"]
    assert zenflow_problems({}) == []
