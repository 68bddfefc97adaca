"""One rank that calibrates and trains in turn: ``planner_time.py CASES.json``, ``{name: command line}``.

Rounds of the calibration and steps of the run alternate, so that a machine whose speed drifts slows both alike, and of
both the best is taken: what other processes take away is no property of a plan. Written to ``CASES.times.json``: the
measured steps, and the planned ones.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moe_scale.parallel import device as devices
from moe_scale.parallel import launch as launches
from moe_scale.parallel import zero
from moe_scale.planner.plan import make_plan
from moe_scale.planner.timing import Rates
from moe_scale.telemetry.quiet import quiet
from moe_scale.tools.calibrate import Calibration, this_machine
from moe_scale.train.engine import build_engine
from moe_scale.train.recipe import Job, prepare_job
from moe_scale.train.start import prepare_data
from recipes.lm_16l import RECIPE
from tests.ranks import REPO

WARMUP, ROUNDS = 2, 5


def run_case(argv: list[str]) -> dict[str, float]:
    job = prepare_job(RECIPE, argv)
    launches.export(job.launch)
    devices.keep_freed_memory()
    zero.init_distributed()
    prepare_data(job)
    groups = zero.make_groups(job.config.moe.ep_size if job.config.moe.enabled else 1)
    engine = build_engine(lambda: job.task.build_model(groups), job.config, job.plan, job.device)
    subject = this_machine(REPO / "recipes" / "lm_16l.py", argv)
    calibration = Calibration(subject, groups)
    steps, rounds = [], []
    for number in range(WARMUP + ROUNDS):
        began = time.perf_counter()
        train_step(job, engine)
        seconds = time.perf_counter() - began
        rates = calibration.measure(rounds=1, warmup=0)
        if number >= WARMUP:
            steps.append(seconds)
            rounds.append(rates)
    in_seconds = ("micro", "update", "link_latency")
    rates = {name: (min if name in in_seconds else max)(each[name] for each in rounds) for name in rounds[0]}
    calibration.close()
    job.task.batches().close()
    engine.destroy()
    return {"measured": min(steps), "planned": make_plan(subject, rates=Rates(measured=rates)).step_s}


def train_step(job: Job, engine: Any) -> None:
    for _ in range(job.plan.grad_accum):
        engine.backward(job.task.forward(engine, next(job.task.batches())).loss)
        engine.step()


if __name__ == "__main__":
    quiet()
    listed = Path(sys.argv[1])
    results = {name: run_case(argv) for name, argv in json.loads(listed.read_text()).items()}
    if dist.get_rank() == 0:
        listed.with_suffix(".times.json").write_text(json.dumps(results))
    dist.destroy_process_group()
