"""``moe-scale bench``: every peer runs, the rows say what they should, and peers of one seed compute the same."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from moe_scale.config import MoEConfig
from moe_scale.errors import ConfigError
from moe_scale.tools import bench
from moe_scale.tools.peers import PEERS, build_peer, peak_extra_bytes
from moe_scale.tools.verdict import judge

CONFIG = MoEConfig(num_experts=4, top_k=2, intermediate_size=16)
SMALL = [
    "--tokens",
    "64",
    "--d_model",
    "32",
    "--intermediate_size",
    "16",
    "--num_experts",
    "4",
    "--dtype",
    "fp32",
    "--rounds",
    "2",
    "--warmup",
    "1",
]


def arguments(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args([*SMALL, *flags])


def test_every_peer_has_its_rows(tmp_path: Path) -> None:
    peers = [name for name in PEERS if name != "triton"]  # which needs a GPU
    results = bench.run(arguments("--peers", *peers, "--output_dir", str(tmp_path), "--profile"))
    assert json.loads((tmp_path / "bench.json").read_text()) == results["rows"]
    assert json.loads((tmp_path / "verdict.json").read_text()) == results["verdict"]
    rows = results["rows"]
    assert len((tmp_path / "bench.md").read_text().splitlines()) == 2 + len(rows)
    for name in peers:
        assert "aten::" in (tmp_path / f"profile_{name}_4.txt").read_text()
    timed = {(row["name"], row["direction"]) for row in rows}
    assert {(name, direction) for name in peers for direction in ("forward", "backward", "both")} <= timed
    assert {("custom/" + part, "forward") for part in ("route", "plan", "statistics", "experts")} <= timed
    for row in rows:
        assert row["median_ms"] > 0
        assert row["versions"]["torch"]
        assert (row["tokens"], row["num_experts"], row["dtype"], row["emulated"]) == (64, 4, "fp32", False)
        if "/" not in row["name"]:
            assert row["tflops"] > 0
            assert row["ratio_to_dense"] > 0
            assert row["ratio_to_custom"] > 0
            assert row["ratio_to_fewest_experts"] == 1
            assert (row["peak_bytes"] is not None) == (row["direction"] == "both")
            if row["name"] == "custom" and row["direction"] == "both":
                weights = 4 * (4 * 32 + 4 * 3 * 16 * 32)
                assert row["peak_bytes"] - row["peak_bytes_without_weight_grads"] == weights
    assert [(found["what"], found["target"]) for found in results["verdict"]] == [
        ("time over that of the dense floor", 1.5),
        ("times faster than deepspeed", 1.5),
        ("times faster than hf-grouped", 1.5),
        ("peak memory over deepspeed's", 0.6),
        ("peak memory over deepspeed's, both without weight gradients", 0.6),
    ]


def test_several_expert_counts_are_several_shapes() -> None:
    results = bench.run(arguments("--peers", "custom", "--num_experts", "8", "2"))
    assert {row["num_experts"] for row in results["rows"]} == {2, 8}
    assert all(row.get("ratio_to_dense") is None for row in results["rows"]), "without the floor no ratio to it"
    (growth,) = results["verdict"]
    assert (growth["what"], growth["num_experts"], growth["target"]) == ("time over that of 2 experts", 8, 2.0)


def test_memory_of_a_layer_does_not_depend_on_its_turn() -> None:
    peaks = []
    for order in (["custom", "dense"], ["dense", "custom"]):
        rows = bench.run(arguments("--peers", *order))["rows"]
        peaks.append({row["name"]: row["peak_bytes"] for row in rows if row["direction"] == "both"})
    assert peaks[0] == peaks[1]


def test_verdict_by_hand() -> None:
    samples = {
        (4, "custom"): [3.0, 30.0, 2.0],
        (4, "dense"): [2.0, 20.0, 1.0],  # 1.5, 1.5 and 2 times
        (4, "deepspeed"): [6.0, 60.0, 6.0],  # 2, 2 and 3 times
        (16, "custom"): [9.0, 60.0, 4.0],  # 3, 2 and 2 times those of 4
    }
    found = judge(samples, {(4, "custom"): 80, (4, "deepspeed"): 100}, {4: 60})
    assert [(f.what, f.num_experts, f.ratio, f.reached) for f in found] == [
        ("time over that of the dense floor", 4, 1.5, True),
        ("times faster than deepspeed", 4, 2.0, True),
        ("peak memory over deepspeed's", 4, 0.8, False),
        ("peak memory over deepspeed's, both without weight gradients", 4, 0.5, True),
        ("time over that of 4 experts", 16, 2.0, True),
    ]
    assert str(found[0]) == "E=4: time over that of the dense floor 1.50   target at most 1.5: reached"
    assert str(found[2]).endswith("target at most 0.6: NOT reached")


def test_growth_is_between_the_fewest_experts_and_each_other_number() -> None:
    samples = {(size, "custom"): [float(size)] for size in (64, 8, 256)}
    assert [(f.num_experts, f.what, f.ratio) for f in judge(samples, {}, {})] == [
        (64, "time over that of 8 experts", 8.0),
        (256, "time over that of 8 experts", 32.0),
    ]


@pytest.mark.slow
def test_layer_is_no_slower_than_its_peers_and_holds_less() -> None:
    """Ratios of layers timed in turn, with room for a loaded machine; no absolute times."""
    shape = ["--tokens", "1024", "--d_model", "512", "--intermediate_size", "256", "--num_experts", "32"]
    results = bench.run(arguments(*shape, "--peers", "custom", "deepspeed", "hf-grouped", "--rounds", "9"))
    found = {finding["what"]: finding["ratio"] for finding in results["verdict"]}
    assert found["times faster than deepspeed"] > 0.9
    assert found["times faster than hf-grouped"] > 0.7
    assert found["peak memory over deepspeed's"] < 1
    assert found["peak memory over deepspeed's, both without weight gradients"] < 0.9


@pytest.mark.parametrize("name", ["deepspeed", "autoep", "hf-grouped", "hf-eager"])
def test_peers_of_one_seed_compute_the_same(name: str) -> None:
    x_BSD = torch.randn(1, 24, 32, generator=torch.Generator().manual_seed(0))
    expected = build_peer("custom", CONFIG, 32)(x_BSD)
    torch.testing.assert_close(build_peer(name, CONFIG, 32)(x_BSD), expected, rtol=1e-5, atol=1e-5)


def test_peak_memory_is_what_a_step_allocates() -> None:
    size = 1 << 20
    peak = peak_extra_bytes(lambda: torch.ones(size) + torch.ones(size), torch.device("cpu"))
    assert peak == pytest.approx(3 * 4 * size, rel=0.01), "two terms and their sum, 4 bytes each"


def test_triton_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match=r"moe\.kernels: triton"):
        bench.run(arguments("--peers", "dense", "triton"))


def test_unknown_peer_is_named() -> None:
    with pytest.raises(ValueError, match="no peer called 'nobody'"):
        build_peer("nobody", CONFIG, 32)
