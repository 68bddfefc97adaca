"""``benchmarks/gpu.sh`` without a GPU: its commands exist, and a part that fails does not stop the rest."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import tarfile
from pathlib import Path

import pytest

from moe_scale.moe.backends import support
from moe_scale.parallel import device as devices
from moe_scale.parallel import launch as launches
from moe_scale.tools import bench, compare
from moe_scale.train.recipe import prepare_job

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"


def listed(tmp_path: Path) -> list[list[str]]:
    shown = subprocess.run([SCRIPT, tmp_path, "--list"], capture_output=True, text=True, check=True)
    return [shlex.split(line) for line in shown.stdout.splitlines()]


def of_tool(commands: list[list[str]], tool: str) -> list[list[str]]:
    return [words[words.index(tool) + 1 :] for words in commands if words[1:4] == ["-m", "moe_scale.cli", tool]]


def test_bash_reads_it() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True)


def test_the_bench_knows_its_flags(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    runs = [parser.parse_args(words) for words in of_tool(listed(tmp_path), "bench")]
    assert {"dense", "custom", "triton", "hf-grouped", "deepspeed", "autoep"} == {p for run in runs for p in run.peers}
    for run in runs:
        assert "dense" in run.peers, "every figure stands beside the floor of its own process"
        assert (run.tokens, run.d_model, run.intermediate_size, run.num_experts) == (32768, 1024, 512, [64])


def test_the_comparison_passes_every_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "detect", lambda: launches.Launch(0, 1, 0, 1, "env"))
    monkeypatch.setattr(devices, "detect", lambda: devices.Device("cuda", "NVIDIA H100", bf16=True, fp16=True))
    monkeypatch.setattr(support, "find_spec", lambda name: name)
    monkeypatch.chdir(ROOT)
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    (words,) = of_tool(listed(tmp_path), "compare")
    arguments, rest = parser.parse_known_args(words)
    recipe = compare.load_recipe(Path(arguments.recipe))
    for variant in arguments.variants:
        flags = [*rest, *compare.VARIANTS[variant], "--output_dir", str(tmp_path / variant)]
        assert prepare_job(recipe, flags).config.moe.kernels == ("triton" if variant == "triton" else "auto")


def test_the_tests_that_it_runs_exist(tmp_path: Path) -> None:
    (words,) = [words for words in listed(tmp_path) if words[1:3] == ["-m", "pytest"]]
    assert words[words.index("-m", 3) + 1] == "gpu"
    assert "pytest.mark.gpu" in (ROOT / words[5] / "test_gpu.py").read_text()


def test_a_part_that_fails_is_reported_and_the_next_one_runs(tmp_path: Path) -> None:
    subprocess.run([SCRIPT, tmp_path / "out"], env=os.environ | {"PYTHON": "false"}, capture_output=True, check=True)
    report = (tmp_path / "out" / "report.md").read_text()
    parts = ["machine", "bench-kernels", "tests", "bench-deepspeed", "bench-autoep", "compare"]
    assert [line.split(" | ")[:2] for line in report.splitlines()[6:]] == [[f"| {part}", "1"] for part in parts]
    with tarfile.open(tmp_path / "out" / "raw.tgz") as raw:
        assert {f"./{part}.log" for part in parts} <= set(raw.getnames())
