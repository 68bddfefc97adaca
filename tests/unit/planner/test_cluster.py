from __future__ import annotations

import pytest

from moe_scale.errors import ConfigError
from moe_scale.planner.cluster import PRESETS, preset
from moe_scale.planner.plan import make_plan
from tests.unit.planner.subjects import small


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_all_figures(name: str) -> None:
    cluster = preset(name)
    assert cluster.device_memory < cluster.host_memory or cluster.is_cpu
    assert cluster.memory_bandwidth > cluster.intra_bandwidth > cluster.inter_bandwidth > 0
    for precision in ("fp32", "bf16", "fp16"):
        assert cluster.peak(precision) > 1e10


def test_memories_are_those_that_drivers_report() -> None:
    reported = {name: round(cluster.device_memory / 2**30, 1) for name, cluster in PRESETS.items() if name != "CPU"}
    assert reported == {
        "A100-40": 39.4,
        "A100-80": 79.2,
        "H100": 79.2,
        "H200": 139.8,
        "B200": 178.0,
        "MI300X": 192.0,
    }


def test_a_cpu_has_its_hosts_memory_alone() -> None:
    assert preset("CPU", host_memory=5e9).device_memory == 5e9
    with pytest.raises(ConfigError, match="give --host_memory_gb"):
        preset("CPU", device_memory=5e9)


def test_the_ranks_of_a_cpu_share_its_memory() -> None:
    one = make_plan(small(cluster=preset("CPU")))
    two = make_plan(small(cluster=preset("CPU", devices_per_node=2)))
    assert one.fits
    needed = two.device_bytes + two.host_bytes
    held = preset("CPU", devices_per_node=2, host_memory=1.5 * needed)
    assert "of a host's" in "".join(make_plan(small(cluster=held)).problems)
    held = preset("CPU", devices_per_node=2, host_memory=2.1 * needed)
    assert make_plan(small(cluster=held)).fits


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
