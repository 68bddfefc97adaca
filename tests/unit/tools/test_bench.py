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
    rows = bench.run(arguments("--peers", *peers, "--output_dir", str(tmp_path), "--profile"))
    assert json.loads((tmp_path / "bench.json").read_text()) == rows
    assert len((tmp_path / "bench.md").read_text().splitlines()) == 2 + len(rows)
    for name in peers:
        assert "aten::" in (tmp_path / f"profile_{name}_4.txt").read_text()
    timed = {(row["name"], row["direction"]) for row in rows}
    assert {(name, direction) for name in peers for direction in ("forward", "backward", "both")} <= timed
    assert {("custom/" + part, "forward") for part in ("route", "plan", "gather", "experts", "combine")} <= timed
    for row in rows:
        assert row["median_ms"] > 0
        assert row["versions"]["torch"]
        assert (row["tokens"], row["num_experts"], row["dtype"]) == (64, 4, "fp32")
        if "/" not in row["name"]:
            assert row["tflops"] > 0
            assert row["ratio_to_dense"] > 0
            assert (row["peak_bytes"] is not None) == (row["direction"] == "both")


def test_several_expert_counts_are_several_shapes() -> None:
    rows = bench.run(arguments("--peers", "custom", "--num_experts", "2", "8"))
    assert {row["num_experts"] for row in rows} == {2, 8}
    assert all(row["ratio_to_dense"] is None for row in rows), "without the floor there is no ratio to it"


@pytest.mark.parametrize("name", ["deepspeed", "autoep"])
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
