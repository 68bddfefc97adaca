from __future__ import annotations

import pytest

from moe_scale.errors import ConfigError
from moe_scale.models.counts import num_active_params, num_params
from moe_scale.planner.cluster import preset
from tests.unit.planner.subjects import small


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["--moe.ep_size", "4"],
        ["--moe.enabled", "false"],
        ["--moe.shared_intermediate_size", "16", "--moe.every", "2"],
        ["--moe.residual", "true", "--moe.router", "noisy", "--moe.ep_size", "8"],
        ["--moe.expert_bias", "true", "--moe.activation", "gelu", "--model.attention_gate", "none"],
        ["--moe.router", "hash"],
    ],
    ids=" ".join,
)
def test_parameters_are_those_that_the_settings_give(settings: list[str]) -> None:
    subject = small(*settings)
    config = subject.config
    assert sum(subject.global_params().values()) == num_params(config.model, config.moe).total
    assert sum(subject.global_params(active=True).values()) == num_active_params(config.model, config.moe).total


def test_with_expert_parallelism_a_rank_has_its_share_of_the_experts() -> None:
    whole, spread = small(), small("--moe.ep_size", "4")
    experts = [(p.numel, q) for p, q in zip(whole.parameters, spread.parameters, strict=True) if p.part == "experts"]
    assert experts
    for numel, part in experts:
        assert part.expert_parallel
        assert part.numel * 4 == numel
        assert spread.shard_ranks(part) == 2
    assert not any(p.expert_parallel for p in spread.parameters if p.part != "experts")


def test_the_widest_ep_size_is_chosen_as_in_a_run() -> None:
    assert small("--moe.ep_size", "0").ep_size == 8
    assert small("--moe.ep_size", "0", cluster=preset("H100", nodes=2, devices_per_node=4)).ep_size == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--moe.ep_size", "3"], "does not divide moe.num_experts = 8"),
        (["--moe.ep_size", "8", "--deepspeed_override", "zero_optimization.stage=1"], "8 at ZeRO stage 1"),
        (["--moe.backend", "deepspeed"], "modelled for the custom backend alone"),
        (["--no_such_thing", "1"], "no such setting"),
        (["--deepspeed_override", "zero_optimization.zero_hpz_partition_size=8"], "zero_hpz_partition_size: 8: its"),
        (["--deepspeed_override", "zero_optimization.zero_quantized_weights=true"], "quantized_weights: True: its"),
        (["--deepspeed_override", "zero_optimization.zero_quantized_gradients=true"], "zero_quantized_gradients"),
        (["--deepspeed_override", 'zero_optimization.offload_param={"device": "cpu"}'], "offload_param: the time"),
    ],
)
def test_what_a_run_would_refuse_is_refused(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small(*settings)
