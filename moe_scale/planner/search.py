"""The layouts that a run could have on a cluster, the fitting ones by speed, and why the others fail.

Varied are the ZeRO stage, ``moe.ep_size``, the micro-batch (at the same sequences a step, so that training stays the
same up to the router's losses), activation checkpointing and an offloaded optimizer. Every candidate passes the checks
that a run passes, and its costs are those of :func:`moe_scale.planner.plan.make_plan`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moe_scale.config import divisors
from moe_scale.moe.backends.support import unsupported
from moe_scale.parallel.ds_json import plan as check_deepspeed
from moe_scale.parallel.launch import Launch
from moe_scale.planner.model import Parameter, Subject, model_parameters
from moe_scale.planner.plan import Plan, Wishes, make_plan
from moe_scale.planner.timing import Rates
from moe_scale.train.optim import optimizer_problems
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
    parameters: dict[int, tuple[Parameter, ...]] = {subject.ep_size: subject.parameters}
    outcomes = [_try(recipe, subject, layout, wishes, rates, parameters) for layout in candidates(subject)]
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


def overrides(layout: Layout, subject: Subject) -> tuple[str, ...]:
    """The changes of the DeepSpeed JSON that make a layout."""
    sequences = subject.plan.micro_batch * subject.plan.grad_accum
    changes = [
        f"zero_optimization.stage={layout.stage}",
        f"train_micro_batch_size_per_gpu={layout.micro_batch}",
        f"gradient_accumulation_steps={sequences // layout.micro_batch}",
    ]
    if layout.offload:
        changes.append('zero_optimization.offload_optimizer={"device": "cpu"}')
    elif subject.offloads("optimizer"):
        changes.append("zero_optimization.offload_optimizer=null")
    return tuple(changes)


def flags(layout: Layout) -> list[str]:
    """The settings that make a layout, as on a recipe's command line."""
    recomputed = str(layout.checkpointing).lower()
    return ["--moe.ep_size", str(layout.ep_size), "--model.activation_checkpointing", recomputed]


def _try(
    recipe: Recipe,
    subject: Subject,
    layout: Layout,
    wishes: Wishes,
    rates: Rates,
    parameters: dict[int, tuple[Parameter, ...]],
) -> Outcome:
    cluster, config = subject.cluster, subject.config
    sequences = subject.plan.micro_batch * subject.plan.grad_accum
    if sequences % layout.micro_batch:
        return Outcome(layout, None, f"micro-batch {layout.micro_batch} does not divide {sequences} sequences a rank")
    config = replace(
        config,
        deepspeed_override=(*config.deepspeed_override, *overrides(layout, subject)),
        moe=replace(config.moe, ep_size=layout.ep_size),
        model=replace(config.model, activation_checkpointing=layout.checkpointing),
    )
    launch = Launch(0, cluster.world_size, 0, cluster.devices_per_node, "none")
    plan, problems = check_deepspeed(config, launch, cluster.device)
    problems += unsupported(config.moe, zero_stage=plan.stage, on_cpu=cluster.is_cpu)
    problems += optimizer_problems(config.optim, offload=plan.offload)
    if problems:
        return Outcome(layout, None, "; ".join(f"{p.where}: {p.what}" for p in problems))
    if layout.ep_size not in parameters:
        parameters[layout.ep_size] = model_parameters(recipe, config, cluster.world_size)
    found = make_plan(Subject(subject.recipe, config, plan, cluster, parameters[layout.ep_size]), wishes, rates)
    return Outcome(layout, found, "; ".join(found.problems))
