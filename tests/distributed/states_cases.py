"""One rank that counts what it holds of a model: ``states_cases.py CASES.json``, of ``[name, recipe, argv, trained]``.

A model that is trained takes three steps of made-up images and texts; another one is built and sharded, no more. What
each case found goes to ``CASES.<rank>.json``.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_scale.config import MultimodalConfig
from moe_scale.data.images.batches import ImageTextBatch
from moe_scale.parallel import device as devices
from moe_scale.parallel import launch as launches
from moe_scale.parallel import zero
from moe_scale.telemetry.quiet import quiet
from moe_scale.train.engine import build_engine
from moe_scale.train.recipe import read_run
from tests.distributed.planner_cases import forget_all_so_far, held

STEPS, ROWS, LENGTH = 3, 4, 6


def made_up(config: MultimodalConfig) -> ImageTextBatch:
    """Images and texts that all differ, of this rank."""
    draw = torch.Generator().manual_seed(dist.get_rank())
    size = config.model.image_size
    return ImageTextBatch(
        torch.randn(ROWS, 3, size, size, generator=draw),
        torch.randint(5, config.model.vocab_size, (ROWS, LENGTH), generator=draw),
        torch.ones(ROWS, LENGTH, dtype=torch.bool),
        None,
        None,
        torch.arange(ROWS) + ROWS * dist.get_rank(),
        torch.ones(ROWS, dtype=torch.bool),
    )


def resident() -> int:
    """Bytes of this process that are in memory, once what was freed has gone back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def run_case(recipe: str, argv: list[str], trained: bool) -> dict[str, Any]:
    task_of = importlib.import_module(f"recipes.{recipe}").RECIPE
    config, plan, problems = read_run(task_of, argv, launches.detect(), devices.detect())
    assert not problems, problems
    groups = zero.make_groups(config.moe.ep_size if config.moe.enabled else 1)
    task = task_of.task(config)
    batch = made_up(config) if trained else None
    forget_all_so_far()
    before = resident()
    if batch is None:
        with torch.device(devices.current()), zero.sharded_construction(plan.json, enabled=plan.stage == 3):
            model = task.build_model(groups)
        shards = [parameter.ds_tensor for parameter in model.parameters()]
        return {"shards": sum(s.nbytes for s in shards), "held": held(), "resident": resident() - before}
    engine = build_engine(lambda: task.build_model(groups), config, plan, devices.detect())
    for step in range(STEPS):
        for micro_step in range(plan.grad_accum):
            engine.backward(task.forward(engine, batch).loss)
            if step == STEPS - 1 and micro_step == plan.grad_accum - 1:
                at_update = held()
            engine.step()
            if step == STEPS - 1 and micro_step == 0:
                in_passes = held()
    found = {"at_update": at_update, "in_passes": in_passes, "between_steps": held()}
    engine.destroy()
    return found


if __name__ == "__main__":
    quiet()
    listed = Path(sys.argv[1])
    zero.init_distributed()
    results = {name: run_case(recipe, argv, trained) for name, recipe, argv, trained in json.loads(listed.read_text())}
    listed.with_suffix(f".{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
