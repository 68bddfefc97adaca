from __future__ import annotations

import pytest

from moe_scale.errors import ConfigError
from moe_scale.planner.cluster import PRESETS, preset


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_all_figures(name: str) -> None:
    cluster = preset(name)
    assert cluster.device_memory < cluster.host_memory or cluster.is_cpu
    assert cluster.memory_bandwidth > cluster.intra_bandwidth > cluster.inter_bandwidth > 0
    for precision in ("fp32", "bf16", "fp16"):
        assert cluster.peak(precision) > 1e10


def test_a_peak_is_the_one_that_the_mfu_of_a_run_is_computed_with() -> None:
    assert preset("H100").peak("bf16") == 989e12
    assert preset("h100").peak("fp32") == 494.5e12  # TF32


def test_single_figures_can_be_replaced() -> None:
    cluster = preset("H100", nodes=3, devices_per_node=4, inter_bandwidth=1e9, peak=5e14, host_memory=None)
    assert (cluster.world_size, cluster.inter_bandwidth, cluster.peak("bf16")) == (12, 1e9, 5e14)
    assert cluster.host_memory == PRESETS["H100"].host_memory


def test_a_cpu_has_a_peak_only_when_it_is_given() -> None:
    assert preset("CPU").placeholder
    assert not preset("CPU", peak=2e11).placeholder
    assert not preset("H100").placeholder


def test_an_unknown_preset_is_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'H1000'; choose one of A100-40, .*CPU"):
        preset("H1000")
