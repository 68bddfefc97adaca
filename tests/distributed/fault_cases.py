"""One rank that trains ``lm_16l`` several times, with what goes wrong on the way: ``fault_cases.py CASES.json``.

A case is a command line and the faults of the run; how each one ended is written beside the list, a file a rank.
Many runs share one start, because importing torch and DeepSpeed costs more than training a tiny model.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_scale.errors import ConfigError, StoppedError
from moe_scale.parallel import zero_state
from moe_scale.telemetry.quiet import quiet
from moe_scale.train import loop, snapshot
from moe_scale.train import step as train_step
from moe_scale.train.language_model import LanguageModelTask
from moe_scale.train.recipe import exit_codes, prepare_job
from recipes.lm_16l import RECIPE


class FaultyTask(LanguageModelTask):
    """The task of ``lm_16l`` with faults: ``{"what": ..., "step": ..., "rank": ..., "micro_step": 0}`` each, once.

    At the step ``summary`` a run ends as one that is killed when nothing but its end is left.
    """

    faults: list[dict[str, Any]]
    seen_step = micro_step = 0

    def forward(self, engine: Any, batch: Any) -> Any:
        step = engine.global_steps + 1
        self.micro_step = self.micro_step + 1 if step == self.seen_step else 0
        self.seen_step = step
        due = [f for f in self.faults if (f["step"], f.get("micro_step", 0)) == (step, self.micro_step)]
        due = [f for f in due if f.get("rank", self.rank) == self.rank]
        for fault in due:
            self.faults.remove(fault)
            self._before(fault, engine)
        output = super().forward(engine, batch)
        for fault in due:
            if "loss" in fault:
                output = output._replace(loss=output.loss * float(fault["loss"]))
        return output

    def summarize(self, *of_the_run: Any) -> list[tuple[str, str]]:
        if any(fault.get("step") == "summary" for fault in self.faults):
            raise StoppedError("killed")  # on all ranks at once: the runs of this process go on
        return super().summarize(*of_the_run)

    def _before(self, fault: dict[str, Any], engine: Any) -> None:
        if "signal" in fault:
            os.kill(os.getpid(), getattr(signal, fault["signal"]))
        if "sleep" in fault:
            time.sleep(fault["sleep"])
        if "hold_lock" in fault:
            ctypes.PyDLL(None).sleep(fault["hold_lock"])  # no other thread of Python runs meanwhile
        if "raise" in fault:
            raise RuntimeError(fault["raise"])
        if "fill" in fault:
            with contextlib.suppress(OSError), open(fault["fill"], "wb", buffering=0) as file:
                while file.write(bytes(1 << 16)):
                    pass
        if "delete" in fault:
            os.unlink(fault["delete"])
        if "gradient" in fault:
            parameter = next(p for name, p in engine.module.named_parameters() if fault["parameter"] in name)
            hook = parameter.register_hook(lambda gradient: (hook.remove(), gradient * float(fault["gradient"]))[1])


def state_of(engine: Any) -> list[torch.Tensor]:
    """Weights, moments, what the forward pass reads, and the schedule."""
    pieces = [piece.values.clone() for piece in snapshot.take(engine)]
    parameters = [getattr(p, "ds_tensor", p).detach().clone() for p in engine.module.parameters()]
    return [*pieces, *parameters, torch.tensor([engine.lr_scheduler.last_epoch, *engine.get_lr()])]


def watched_skip(changed: list[str]) -> Any:
    """``step_without_update`` that notes what it changed, and whether the gradients alone would have told."""
    skip = zero_state.step_without_update

    def watched(engine: Any) -> None:
        changed.append(f"gradients finite: {zero_state.gradients_are_finite(engine)}")
        before = state_of(engine)
        skip(engine)
        equal = [torch.equal(mine, other) for mine, other in zip(state_of(engine), before, strict=True)]
        changed.append(f"unchanged: {all(equal)}")

    return watched


def run_case(argv: list[str], faults: list[dict[str, Any]]) -> dict[str, Any]:
    changed: list[str] = []
    FaultyTask.faults = [dict(fault) for fault in faults]
    train_step.zero_state = type("Watched", (), {**vars(zero_state), "step_without_update": watched_skip(changed)})
    outcome = ""
    try:
        loop.train(prepare_job(dataclasses.replace(RECIPE, task=FaultyTask), argv))
    except (StoppedError, ConfigError) as error:
        outcome = f"{type(error).__name__}: {error}"
    return {"outcome": outcome, "skips": changed}


if __name__ == "__main__":
    quiet()
    listed = Path(sys.argv[1])
    cases = json.loads(listed.read_text())
    if len(cases) == 1:  # as a recipe does
        with exit_codes():
            FaultyTask.faults = cases[0]["faults"]
            loop.train(prepare_job(dataclasses.replace(RECIPE, task=FaultyTask), cases[0]["argv"]))
            dist.destroy_process_group()
    else:
        results = [run_case(case["argv"], case["faults"]) for case in cases]
        listed.with_suffix(f".{dist.get_rank()}.json").write_text(json.dumps(results))
        dist.destroy_process_group()
