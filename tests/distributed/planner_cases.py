"""One rank whose memory and collectives are counted: ``planner_cases.py CASES.json``, ``[[name, command line], ...]``.

Each case trains ``lm_16l`` for three steps. The first ones make the optimizer's state and DeepSpeed's trace of the
modules; of the third one every collective is counted where it is called, and what the rank holds of the model before
and after its update. Written to ``CASES.<rank>.json``.
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe_scale.parallel import launch as launches
from moe_scale.parallel import zero
from moe_scale.telemetry.quiet import quiet
from moe_scale.train.engine import build_engine
from moe_scale.train.recipe import prepare_job
from moe_scale.train.start import prepare_data
from recipes.lm_16l import RECIPE

STEPS = 3
COLLECTIVES = {
    "_allgather_base_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "allreduce_": ("all_reduce", 0),
    "alltoall_base_": ("all_to_all", 1),
}
"""Operators of torch.distributed, and which of their arguments is the larger buffer: what a plan counts."""


class Kept:
    """Bytes that a forward pass keeps for its backward pass, parameters left out."""

    def __init__(self, model: torch.nn.Module):
        self.model = model
        self.found: dict[int, int] = {}
        self._alive: list[Tensor] = []

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if all(storage.data_ptr() != p.untyped_storage().data_ptr() for p in self.model.parameters()):
            self.found[storage.data_ptr()] = storage.nbytes()
            self._alive.append(tensor)  # lest its address is given to another
        return tensor

    def __enter__(self) -> Kept:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *_: Any) -> None:
        self._hooks.__exit__()
        self._alive.clear()


class CollectiveCounter(TorchDispatchMode):
    """Bytes and calls by collective and size of the group, counted at the operators that start the communication."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = defaultdict(int)
        self.calls: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.__name__.split(".")[0]
            assert name in COLLECTIVES, f"{name} is not counted"
            kind, place = COLLECTIVES[name]
            tensors = args[place] if isinstance(args[place], list | tuple) else [args[place]]
            group = next(a for a in args if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type()))
            size = dist.ProcessGroup.unbox(group).size()
            for tensor in tensors:
                small = tensor.nbytes <= 8 and kind == "all_reduce"
                key = f"{kind}{' of a number' if small else ''}/{size}"
                self.bytes[key] += tensor.nbytes
                self.calls[key] += 1
        return func(*args, **(kwargs or {}))


def held() -> int:
    """Bytes of all storages that tensors made since :func:`forget_all_so_far` refer to, once nothing lets go any more.

    A thread of gloo's keeps the tensors of a collective a moment longer than the collective takes.
    """
    smallest, same = _held(), 0
    while same < 3:
        time.sleep(0.05)
        now = _held()
        same = same + 1 if now >= smallest else 0
        smallest = min(smallest, now)
    return smallest


def _held() -> int:
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    found.pop(0, None)
    return sum(found.values())


def forget_all_so_far() -> None:
    """Leave all that exists now out of the count, and out of the way of the garbage collector, which takes seconds."""
    gc.collect()
    gc.freeze()


def run_case(argv: list[str]) -> dict[str, Any]:
    job = prepare_job(RECIPE, argv)
    launches.export(job.launch)
    zero.init_distributed()
    groups = zero.make_groups(job.config.moe.ep_size if job.config.moe.enabled else 1)
    prepare_data(job)
    batches = [next(job.task.batches()) for _ in range(STEPS * job.plan.grad_accum)]
    forget_all_so_far()
    engine = build_engine(lambda: job.task.build_model(groups), job.config, job.plan, job.device)
    counter, counts, at_update, kept = CollectiveCounter(), [], 0, Kept(engine.module)
    looks_at_kept = not job.config.model.activation_checkpointing  # which has hooks of its own
    masked = False
    for step in range(STEPS):
        last = step == STEPS - 1
        for micro_step in range(job.plan.grad_accum):
            batch = batches.pop()
            with counter if last else torch.enable_grad():
                with kept if last and looks_at_kept and micro_step == 0 else contextlib.nullcontext():
                    output = job.task.forward(engine, batch)
                    masked |= last and micro_step == 0 and bool((batch.document_ids_BS != 0).any())
                engine.backward(output.loss)
                if last and output.moe is not None:
                    counts.append(output.moe.assignments_E.tolist())
                del output
                if last and micro_step == job.plan.grad_accum - 1:
                    at_update = held()
                engine.step()
                if last and micro_step == 0:
                    between_micro_batches = held()
    result = {
        "held_at_update": at_update,
        "held_between_micro_batches": between_micro_batches if job.plan.grad_accum > 1 else None,
        "held_between_steps": held(),
        "bytes": dict(counter.bytes),
        "calls": dict(counter.calls),
        "counts": counts,
        "kept": sum(kept.found.values()),
        "masked": masked,
        "ep_members": [] if groups.expert is None else dist.get_process_group_ranks(groups.expert),
        "edp_members": [] if groups.expert_data is None else dist.get_process_group_ranks(groups.expert_data),
    }
    job.task.batches().close()
    engine.destroy()
    return result


if __name__ == "__main__":
    quiet()
    listed = Path(sys.argv[1])
    results = {name: run_case(argv) for name, argv in json.loads(listed.read_text())}
    listed.with_suffix(f".{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
