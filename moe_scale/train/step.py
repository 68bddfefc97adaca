"""One optimizer step: its micro-batches, the check of what they gave, and the update."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_scale.errors import DivergedError
from moe_scale.moe.layer import update_selection_biases
from moe_scale.parallel import zero, zero_state
from moe_scale.parallel.collectives import sum_over_ranks
from moe_scale.parallel.groups import ParallelGroups
from moe_scale.telemetry.steps import StepMeter
from moe_scale.train.run import Run


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step gave, the same on all ranks but for the loss.

    Attributes:
        record: what it reports; empty unless it was to be logged.
        updated: whether the parameters were changed.
        spiked: whether the loss was far above those before.
        asked_to_stop: whether any rank was asked to save and stop.
    """

    record: dict[str, Any]
    updated: bool
    spiked: bool
    asked_to_stop: bool


def take_step(run: Run, *, logged: bool) -> StepOutcome:
    """One optimizer step over its micro-batches. A loss or gradient that is not a number changes nothing."""
    job, engine, step = run.job, run.engine, run.state.step
    meter, record = StepMeter(), {}
    loads: list[Tensor] = []
    losses: list[Tensor] = []
    asked_to_stop = updated = False
    for micro_step in range(job.plan.grad_accum):
        run.at("data")
        batch = next(job.task.batches())
        run.at("forward")
        output = job.task.forward(engine, batch)
        run.at("backward")
        engine.backward(output.loss)
        losses.append(output.loss.detach())
        if output.moe is not None:
            loads.append(output.moe.assignments_E.detach())
        if logged:
            meter.add(output)
        run.at("update")
        if micro_step < job.plan.grad_accum - 1:
            engine.step()
            continue
        # In fp16 an infinite gradient is usual, and DeepSpeed answers it by a lower loss scale.
        bad_gradient = job.plan.precision != "fp16" and not zero_state.gradients_are_finite(engine)
        bad_loss = not bool(torch.stack(losses).isfinite().all())
        wanted = bool(run.interruption.requested) or run.deadline.near(run.saver.write_s)
        bad_loss, bad_gradient, asked_to_stop = run.agreement.any(bad_loss, bad_gradient, wanted)
        if logged or bad_loss or bad_gradient:
            record = _grad_norms(engine, run.parts, job.plan.stage, run.groups)
        if bad_loss or bad_gradient:
            _update(zero_state.step_without_update, engine, step)
            run.tell([run.bad_steps.bad(step, _what_is_bad(bad_loss, record))], "skipped")
        else:
            _update(lambda e: e.step(), engine, step)
            updated = not zero.last_step_was_skipped(engine)
            if updated:
                run.bad_steps.good()
            else:
                run.events.add("skipped", text="fp16 gradients are infinite: a lower loss scale follows")
    moe = job.config.moe
    if moe.enabled and moe.router == "sigmoid" and updated:
        update_selection_biases(engine.module, sum_over_ranks(torch.stack(loads).sum(dim=0)), moe.bias_update_rate)
    spiked = False
    if job.config.faults.spike_factor:
        loss = run.agreement.mean(float(torch.stack(losses).mean()))
        spiked = updated and run.spikes.is_spike(loss)
    if logged:
        run.rank_log.step(step, float(torch.stack(losses).mean()))
        record |= {"skipped_steps": engine.skipped_steps}
        if job.plan.precision == "fp16":
            record["loss_scale"] = zero.loss_scale(engine)
        record = meter.record() | record
    return StepOutcome(record, updated, spiked, asked_to_stop)


def _update(update: Callable[[Any], Any], engine: Any, step: int) -> None:
    """The optimizer's step. A loss scale that cannot fall any further is a run that diverged."""
    try:
        update(engine)
    except Exception as error:
        if "loss scale already at minimum" not in str(error):
            raise
        raise DivergedError(
            f"gradients of step {step} are infinite at the lowest loss scale: train in bf16, or lower --optim.lr"
        ) from None


def _what_is_bad(bad_loss: bool, norms: dict[str, float]) -> str:
    parts = [name.removeprefix("grad_norm/") for name, norm in norms.items() if "/" in name and not math.isfinite(norm)]
    gradients = f"the gradient of {', '.join(parts)}" if parts else ""
    return " and ".join(filter(None, ["the loss" if bad_loss else "", gradients])) + " is not a number"


def _grad_norms(engine: Any, parts: dict[str, Any], stage: int, groups: ParallelGroups) -> dict[str, float]:
    """The global gradient norm and that of each part of the model, before clipping."""
    squares = zero.squared_grad_norms(engine, parts, stage, groups)
    norms = {f"grad_norm/{part}": math.sqrt(square) for part, square in squares.items()}
    return {"grad_norm": math.sqrt(sum(squares.values())), **norms}
