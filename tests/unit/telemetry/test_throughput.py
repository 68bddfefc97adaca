"""Speed over a window, and the table of peaks."""

from __future__ import annotations

import contextlib
import math

import pytest

from moe_scale.telemetry.throughput import Throughput, mfu, peak_flops


class Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def test_nothing_is_known_before_the_first_step():
    meter = Throughput()
    assert math.isnan(meter.tokens_per_s)
    assert math.isnan(meter.step_time_s)


def test_tokens_over_seconds_of_the_window():
    clock = Clock()
    meter = Throughput(window=3, clock=clock)
    for seconds, tokens in [(90.0, 1), (1.0, 100), (1.0, 100), (2.0, 100), (3.0, 300)]:
        clock.advance(seconds)
        meter.step(tokens)
    assert meter.tokens_per_s == pytest.approx(500 / 6)  # the last three: 1 + 2 + 3 seconds
    assert meter.step_time_s == 2.0


def test_the_first_step_counts_only_until_there_is_another():
    clock = Clock()
    meter = Throughput(clock=clock)
    clock.advance(10.0)
    meter.step(100)
    assert meter.tokens_per_s == 10.0
    clock.advance(1.0)
    meter.step(100)
    assert meter.tokens_per_s == 100.0


def test_pauses_are_not_counted_wherever_they_fall():
    clock = Clock()
    meter = Throughput(clock=clock)
    clock.advance(1.0)
    meter.step(10)
    with meter.pause():  # between two steps
        clock.advance(100.0)
        with meter.pause():  # saving, as part of an evaluation
            clock.advance(50.0)
    clock.advance(1.0)
    with contextlib.suppress(RuntimeError), meter.pause():  # within a step, and left by an error
        clock.advance(7.0)
        raise RuntimeError
    clock.advance(1.0)
    meter.step(10)
    assert meter.step_time_s == 2.0
    assert meter.tokens_per_s == 5.0


def test_start_leaves_out_what_came_before():
    clock = Clock()
    meter = Throughput(clock=clock)
    clock.advance(1000.0)
    meter.start()
    clock.advance(2.0)
    meter.step(10)
    assert meter.tokens_per_s == 5.0


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100 80GB PCIe", "tf32", 156),
        ("NVIDIA H100 80GB HBM3", "torch.bfloat16", 989),
        ("NVIDIA H100 80GB HBM3", "float32", 67),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H100 NVL", "bf16", 835.5),
        ("NVIDIA H200", "bf16", 989),
        ("NVIDIA H200", "fp8", 1979),
        ("NVIDIA GH200 480GB", "bf16", 989),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA GB200", "bf16", 2500),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA L40", "bf16", 181),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA A10", "bf16", 125),
        ("NVIDIA A10G", "bf16", 70),
        ("NVIDIA GeForce RTX 4090", "fp16", 165.2),
        ("NVIDIA GeForce RTX 3090", "fp32", 35.6),
        ("NVIDIA RTX A6000", "bf16", 154.8),
        ("Tesla V100-SXM2-32GB", "fp16", 125),
        ("Tesla V100-PCIE-16GB", "fp16", 112),
        ("Tesla T4", "half", 65),
        ("AMD Instinct MI300X", "bf16", 1307),
        ("AMD Instinct MI250X", "bf16", 191.5),
    ],
)
def test_known_devices_under_the_names_that_drivers_give_them(name, dtype, tflops):
    assert peak_flops(name, dtype) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("Intel(R) Xeon(R) Platinum 8480", "bf16"),
        ("", "bf16"),
        ("Tesla V100-SXM2-32GB", "bf16"),  # it has no bf16 units
        ("NVIDIA A100-SXM4-80GB", "fp8"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16"),  # a seventh of the chip
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16"),
        ("NVIDIA GeForce RTX 4090 D", "bf16"),
        ("NVIDIA L400", "bf16"),
        ("NVIDIA A100-SXM4-80GB", "int3"),
    ],
)
def test_unknown_is_none_and_never_a_guess(name, dtype):
    assert peak_flops(name, dtype) is None


def test_mfu():
    # 1e9 active parameters at 6 FLOPs each and 26,000 tokens/s: 156 of 312 TFLOP/s.
    assert mfu(6e9, 26_000, 312e12) == pytest.approx(0.5)
    assert mfu(6e9, 26_000, None) is None
