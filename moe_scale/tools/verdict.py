"""What ``moe-scale bench`` was asked to find out: this project's layer against its targets.

Every ratio is between layers that were timed in turn in one process, and is the median over the rounds of the ratio
within a round, so that a machine whose speed drifts between rounds does not show in it.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

Samples = Mapping[tuple[int, str], Sequence[float]]
"""Seconds of forward and backward together, one a round, of (number of experts, layer)."""

OVER_DENSE, OVER_PEERS, GROWTH, MEMORY = 1.5, 1.5, 2.0, 0.6
RIVALS = ("deepspeed", "hf-grouped")


class Finding(NamedTuple):
    """One ratio and its target."""

    what: str
    num_experts: int
    ratio: float
    target: float
    kind: Literal["at most", "at least"]

    @property
    def reached(self) -> bool:
        return self.ratio <= self.target if self.kind == "at most" else self.ratio >= self.target

    def __str__(self) -> str:
        outcome = "reached" if self.reached else "NOT reached"
        return f"E={self.num_experts}: {self.what} {self.ratio:.2f}   target {self.kind} {self.target:g}: {outcome}"


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median over the rounds of ``above / below``."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def judge(samples: Samples, peaks: Mapping[tuple[int, str], int], weight_grads: Mapping[int, int]) -> list[Finding]:
    """All ratios that the layers timed allow.

    Args:
        peaks: most bytes held in a step, of (number of experts, layer).
        weight_grads: bytes of this layer's weight gradients, of each number of experts: every layer has to leave them
            behind, so that memory is judged with and without them.
    """
    findings = []
    sizes = sorted({num_experts for num_experts, name in samples if name == "custom"})
    for size in sizes:
        ours = samples[size, "custom"]
        if (size, "dense") in samples:
            ratio = median_ratio(ours, samples[size, "dense"])
            findings.append(Finding("time over that of the dense floor", size, ratio, OVER_DENSE, "at most"))
        for rival in RIVALS:
            if (size, rival) in samples:
                ratio = median_ratio(samples[size, rival], ours)
                findings.append(Finding(f"times faster than {rival}", size, ratio, OVER_PEERS, "at least"))
        if (size, "deepspeed") in peaks:
            mine, theirs, grads = peaks[size, "custom"], peaks[size, "deepspeed"], weight_grads[size]
            findings.append(Finding("peak memory over deepspeed's", size, mine / theirs, MEMORY, "at most"))
            what = "peak memory over deepspeed's, both without weight gradients"
            findings.append(Finding(what, size, (mine - grads) / (theirs - grads), MEMORY, "at most"))
    for size in sizes[1:]:
        ratio = median_ratio(samples[size, "custom"], samples[sizes[0], "custom"])
        findings.append(Finding(f"time over that of {sizes[0]} experts", size, ratio, GROWTH, "at most"))
    return findings
