"""Tokens per second, and the share of the hardware's peak that they amount to."""

from __future__ import annotations

import contextlib
import math
import re
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator


class Throughput:
    """Speed over the last ``window`` steps, without the time spent in :meth:`pause`.

    The clock runs from the first :meth:`start` (or the construction) to each :meth:`step`. The first step, which
    loads, compiles and warms up, counts only until there is a second one. Device work is asynchronous: seconds are
    true over a window, since a loop that reads its loss waits for the device, but not for one step alone.

    Args:
        window: steps that are averaged over.
        clock: seconds that only rise; for tests.
    """

    def __init__(self, window: int = 20, *, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._window: deque[tuple[int, float]] = deque(maxlen=window)
        self._steps = 0
        self._paused = 0.0
        self._pauses = 0
        self._began = clock()

    def start(self) -> None:
        """Restart the clock of the current step: what came before it is not counted."""
        self._began = self._clock()
        self._paused = 0.0

    def step(self, tokens: int) -> None:
        """End a step of ``tokens`` tokens (over all ranks or one: the results are in the same unit)."""
        now = self._clock()
        if self._steps == 1:
            self._window.clear()
        self._window.append((tokens, now - self._began - self._paused))
        self._steps += 1
        self._began, self._paused = now, 0.0

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Time inside is not counted: evaluation, saving. May be nested."""
        began = self._clock()
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1
            if not self._pauses:
                self._paused += self._clock() - began

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second over the window; NaN before the first step."""
        seconds = sum(s for _, s in self._window)
        return sum(t for t, _ in self._window) / seconds if seconds > 0 else math.nan

    @property
    def step_time_s(self) -> float:
        """Seconds a step, the median of the window; NaN before the first step."""
        return statistics.median(s for _, s in self._window) if self._window else math.nan


# Dense peaks in TFLOP/s; a data sheet that prints the figure with structured sparsity is halved. Sources: NVIDIA's data
# sheets of V100, T4, A100, A800, A30, A40, A10, A10G, L4, L40, L40S, RTX A6000, H100, H800, H200, GH200, HGX B200/B300
# and GB200/GB300 NVL72 (per GPU); its whitepapers of GA102, Ada and RTX Blackwell (GeForce, with fp32 accumulation, as
# in training); AMD's data sheets of Instinct MI200, MI300 and MI350. A card of the MI250 is two devices of half of it.
# "fp32" is the vector rate. The first entry whose words are all in the device's name wins: a variant before its family.
_PEAK_TFLOPS: tuple[tuple[str, dict[str, float]], ...] = (
    ("GB300", {"bf16": 2500, "fp16": 2500, "fp8": 5000, "tf32": 1250, "fp32": 80}),
    ("B300", {"bf16": 2250, "fp16": 2250, "fp8": 4500, "tf32": 1125, "fp32": 75}),
    ("GB200", {"bf16": 2500, "fp16": 2500, "fp8": 5000, "tf32": 1250, "fp32": 80}),
    ("B200", {"bf16": 2250, "fp16": 2250, "fp8": 4500, "tf32": 1125, "fp32": 75}),
    ("H200 NVL", {"bf16": 835.5, "fp16": 835.5, "fp8": 1671, "tf32": 417.5, "fp32": 60}),
    ("H200", {"bf16": 989, "fp16": 989, "fp8": 1979, "tf32": 494.5, "fp32": 67}),
    ("GH200", {"bf16": 989, "fp16": 989, "fp8": 1979, "tf32": 494.5, "fp32": 67}),
    ("H100 PCIe", {"bf16": 756, "fp16": 756, "fp8": 1513, "tf32": 378, "fp32": 51}),
    ("H100 NVL", {"bf16": 835.5, "fp16": 835.5, "fp8": 1671, "tf32": 417.5, "fp32": 60}),
    ("H100", {"bf16": 989, "fp16": 989, "fp8": 1979, "tf32": 494.5, "fp32": 67}),
    ("H800", {"bf16": 989, "fp16": 989, "fp8": 1979, "tf32": 494.5, "fp32": 67}),
    ("A100", {"bf16": 312, "fp16": 312, "tf32": 156, "fp32": 19.5}),
    ("A800", {"bf16": 312, "fp16": 312, "tf32": 156, "fp32": 19.5}),
    ("A30", {"bf16": 165, "fp16": 165, "tf32": 82, "fp32": 10.3}),
    ("A40", {"bf16": 149.7, "fp16": 149.7, "tf32": 74.8, "fp32": 37.4}),
    ("A10", {"bf16": 125, "fp16": 125, "tf32": 62.5, "fp32": 31.2}),
    ("A10G", {"bf16": 70, "fp16": 70, "tf32": 35, "fp32": 35}),
    ("RTX A6000", {"bf16": 154.8, "fp16": 154.8, "tf32": 77.4, "fp32": 38.7}),
    ("L40S", {"bf16": 362, "fp16": 362, "fp8": 733, "tf32": 183, "fp32": 91.6}),
    ("L40", {"bf16": 181, "fp16": 181, "fp8": 362, "tf32": 90.5, "fp32": 90.5}),
    ("L4", {"bf16": 121, "fp16": 121, "fp8": 242.5, "tf32": 60, "fp32": 30.3}),
    ("RTX 5090", {"bf16": 209.5, "fp16": 209.5, "fp8": 419, "tf32": 104.8, "fp32": 104.8}),
    ("RTX 4090", {"bf16": 165.2, "fp16": 165.2, "fp8": 330.3, "tf32": 82.6, "fp32": 82.6}),
    ("RTX 3090", {"bf16": 71, "fp16": 71, "tf32": 35.6, "fp32": 35.6}),
    ("V100 PCIe", {"fp16": 112, "fp32": 14}),
    ("V100", {"fp16": 125, "fp32": 15.7}),
    ("T4", {"fp16": 65, "fp32": 8.1}),
    ("MI355X", {"bf16": 2516.6, "fp16": 2516.6, "fp8": 5033.2, "fp32": 157.3}),
    ("MI350X", {"bf16": 2306.9, "fp16": 2306.9, "fp8": 4613.7, "fp32": 144.2}),
    ("MI325X", {"bf16": 1307, "fp16": 1307, "fp8": 2615, "tf32": 653.7, "fp32": 163.4}),
    ("MI300X", {"bf16": 1307, "fp16": 1307, "fp8": 2615, "tf32": 653.7, "fp32": 163.4}),
    ("MI300A", {"bf16": 980.6, "fp16": 980.6, "fp8": 1961.2, "tf32": 490.3, "fp32": 122.6}),
    ("MI250X", {"bf16": 191.5, "fp16": 191.5, "fp32": 23.9}),
    ("MI250", {"bf16": 181, "fp16": 181, "fp32": 22.6}),
    ("MI210", {"bf16": 181, "fp16": 181, "fp32": 22.6}),
)

_DTYPE_NAMES = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "float32": "fp32",
    "float": "fp32",
    "float8": "fp8",
}

# Parts of a chip or cut-down relatives that share the name but not the figures.
_NOT_THE_SAME = re.compile(r"\b(mig|laptop|max-q|mobile)\b|rtx 4090 d\b|rtx 5090 d\b", re.IGNORECASE)


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Dense peak of one device in FLOP/s, or None for a device or type that the table does not have.

    Args:
        device_name: as the driver names it, such as ``NVIDIA H100 80GB HBM3``.
        dtype: ``bf16``, ``fp16``, ``fp8``, ``tf32`` or ``fp32``, or torch's name of one.
    """
    dtype = dtype.lower().removeprefix("torch.")
    dtype = _DTYPE_NAMES.get(dtype, dtype)
    if _NOT_THE_SAME.search(device_name):
        return None
    words = set(re.findall(r"[a-z0-9]+", device_name.lower()))
    for name, peaks in _PEAK_TFLOPS:
        if words.issuperset(name.lower().split()):
            return peaks[dtype] * 1e12 if dtype in peaks else None
    return None


def mfu(flops_per_token: float, tokens_per_s_per_device: float, peak: float | None) -> float | None:
    """Model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B): FLOPs that the model needs over FLOPs that the
    device could have done, 0 to 1. Recomputation is not counted as work. None without a ``peak``.

    Args:
        flops_per_token: forward and backward FLOPs a token, of the active parameters.
        tokens_per_s_per_device: tokens per second of one device.
        peak: FLOP/s of one device, from :func:`peak_flops`.
    """
    return flops_per_token * tokens_per_s_per_device / peak if peak else None
