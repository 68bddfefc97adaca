"""The layouts that a run could have on a cluster, the fitting ones by speed, and why the others fail.

Varied are the ZeRO stage, ``moe.ep_size``, the micro-batch (at the same sequences a step, so that training stays the
same up to the router's losses), activation checkpointing and an offloaded optimizer. Every candidate passes the checks
that a run passes, and its costs are those of :func:`moe_scale.planner.plan.make_plan`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from moe_scale.config import divisors
from moe_scale.planner.model import Sharding, Subject, Variants
from moe_scale.planner.plan import Plan, Wishes, make_plan
from moe_scale.planner.timing import Rates
from moe_scale.train.recipe import Recipe

MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Layout:
    """One candidate."""

    stage: int
    ep_size: int
    micro_batch: int
    checkpointing: bool
    offload: bool

    def __str__(self) -> str:
        extras = [", recomputed" if self.checkpointing else "", ", offloaded" if self.offload else ""]
        return f"ZeRO-{self.stage}, ep {self.ep_size}, micro-batch {self.micro_batch}" + "".join(extras)


@dataclass(frozen=True)
class Outcome:
    """What became of a candidate: its plan, and why it fails, empty for one that fits."""

    layout: Layout
    plan: Plan | None
    why: str

    def record(self) -> dict[str, Any]:
        """As plain values."""
        plan = self.plan
        figures = (
            {}
            if plan is None
            else {
                "tokens_per_s": plan.tokens_per_s,
                "step_s": plan.step_s,
                "mfu": plan.mfu,
                "device_bytes": plan.device_bytes,
                "bound": plan.bound,
            }
        )
        return {**vars(self.layout), **figures, "fits": not self.why, "why": self.why}


def candidates(subject: Subject) -> Iterator[Layout]:
    """Everything to be tried, in a fixed order."""
    moe = subject.config.moe
    ep_sizes = [size for size in divisors(moe.num_experts) if size <= subject.world_size] if moe.enabled else [1]
    yield from itertools.starmap(
        Layout, itertools.product(range(4), ep_sizes, MICRO_BATCHES, (False, True), (False, True))
    )


def search(recipe: Recipe, subject: Subject, wishes: Wishes, rates: Rates) -> list[Outcome]:
    """Plan every candidate. The fitting ones come first, the fastest of them before the others, then the smaller."""
    variants = Variants(recipe, subject)
    outcomes = [_try(variants, layout, wishes, rates) for layout in candidates(subject)]
    return sorted(outcomes, key=_order)


def _order(outcome: Outcome) -> tuple[bool, float, float]:
    plan = outcome.plan
    return bool(outcome.why), -plan.tokens_per_s if plan else 0.0, plan.device_bytes if plan else 0.0


def reasons(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """The failed candidates by the kind of their reason: its text without the figures."""
    found: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.why:
            found.setdefault(re.sub(r"[\d,.]+", "#", outcome.why), []).append(outcome)
    return found


def flags(layout: Layout) -> list[str]:
    """The settings that make a layout, as on a recipe's command line."""
    recomputed = str(layout.checkpointing).lower()
    return ["--moe.ep_size", str(layout.ep_size), "--model.activation_checkpointing", recomputed]


def _try(variants: Variants, layout: Layout, wishes: Wishes, rates: Rates) -> Outcome:
    subject, why = variants.make(
        Sharding(layout.stage, layout.ep_size, layout.offload),
        micro_batch=layout.micro_batch,
        checkpointing=layout.checkpointing,
    )
    if subject is None:
        return Outcome(layout, None, why)
    plan = make_plan(subject, wishes, rates)
    return Outcome(layout, plan, "; ".join(plan.problems))
