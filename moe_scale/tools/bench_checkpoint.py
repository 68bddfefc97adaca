"""``moe-scale bench-checkpoint``: how fast a recipe's checkpoints are written and read, and how long a step waits.

The figures stand beside the disk's own rate, of one plain file of the same size, measured in the same minute.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.table import Table

from moe_scale.checkpoint import folder as folders
from moe_scale.checkpoint.index import read_index
from moe_scale.errors import ConfigError, Problem
from moe_scale.parallel import launch as launches
from moe_scale.parallel import zero
from moe_scale.parallel.device import accelerator
from moe_scale.settings import to_dict
from moe_scale.telemetry.provenance import package_versions, source_state
from moe_scale.telemetry.terminal import Console
from moe_scale.tools.arguments import positive
from moe_scale.tools.compare import load_recipe
from moe_scale.train import checkpoint
from moe_scale.train.engine import build_engine
from moe_scale.train.recipe import Job, prepare_job
from moe_scale.train.start import prepare_data

Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The tool's own flags; whatever else is given goes to the recipe."""
    parser.add_argument("recipe", help="file of the recipe, as recipes/lm_16l.py")
    parser.add_argument(
        "--rounds", type=positive, default=3, help="checkpoints that are written and read [%(default)s]"
    )
    parser.add_argument("--steps", type=positive, default=5, help="training steps that are timed [%(default)s]")
    parser.add_argument("--output_dir", default="runs/bench-checkpoint", help="on the disk in question [%(default)s]")


def run(arguments: argparse.Namespace, recipe_argv: list[str]) -> Row:
    """Time everything, print a table, and write ``bench_checkpoint.json``. Runs under any launcher."""
    recipe = load_recipe(Path(arguments.recipe))
    folder = Path(arguments.output_dir)
    if folders.checkpoints_of(folder).exists():
        raise ConfigError(Problem("--output_dir", f"{folder} holds checkpoints already", "name a new folder"))
    job = prepare_job(recipe, [*recipe_argv, "--output_dir", str(folder), "--resume", "never"])
    launches.export(job.launch)
    zero.init_distributed()
    groups = zero.make_groups(job.config.moe.ep_size if job.config.moe.enabled else 1)
    prepare_data(job)
    engine = build_engine(lambda: job.task.build_model(groups), job.config, job.plan, job.device)
    row = _measure(job, engine, steps=arguments.steps, rounds=arguments.rounds)
    if job.launch.is_main:
        (job.run_dir / "bench_checkpoint.json").write_text(json.dumps(row, indent=1) + "\n")
        _show(row)
        print(f"wrote {job.run_dir / 'bench_checkpoint.json'}")
    dist.barrier()
    engine.destroy()
    dist.destroy_process_group()
    return row


def _measure(job: Job, engine: Any, *, steps: int, rounds: int) -> Row:
    facts = {"kind": job.task.model_kind, "settings": to_dict(job.config), "layout": job.layout}
    saver = checkpoint.Saver(job.run_dir, job.config.checkpoint, facts, job.config.optim.name)
    _train_step(job, engine)  # the first step makes the moments
    step_s = [_seconds(_train_step, job, engine) for _ in range(steps)]
    stalls, writes, reads, during, bare_writes, bare_reads = [], [], [], [], [], []
    size = 0
    for number in range(1, rounds + 1):
        moment = checkpoint.Moment(number, 0, {})
        accelerator().synchronize()  # what is still queued of the step before is not the save's
        saver.save(engine, moment, job.task.batches().state_dict())
        stalls.append(saver.stall_s)
        if job.config.checkpoint.background:
            during.append(_seconds(_train_step, job, engine))
        saver.wait()
        if saver.failure:
            raise checkpoint.NotSavedError(saver.failure)
        writes.append(saver.write_s)
        path = folders.checkpoints_of(job.run_dir) / folders.name_of(number)
        size = sum(file.stat().st_size for file in path.iterdir())
        if job.launch.is_main:
            _forget(path.iterdir())
        dist.barrier()
        reads.append(_seconds(_load, engine, path))
        if job.launch.is_main:
            bare = job.run_dir / "bare"
            bare_writes.append(_seconds(_write_bare, bare, size))
            _forget([bare])
            bare_reads.append(_seconds(bare.read_bytes))
            bare.unlink()
        dist.barrier()
    if job.launch.is_main:
        shutil.rmtree(folders.checkpoints_of(job.run_dir))

    def rate(seconds: list[float]) -> float:
        return size / 1e9 / statistics.median(seconds) if seconds else 0.0

    return {
        "bytes": size,
        "step_s": statistics.median(step_s),
        "step_while_writing_s": statistics.median(during) if during else None,
        "stall_s": statistics.median(stalls),
        "save_s": statistics.median(writes),
        "save_gb_per_s": rate(writes),
        "load_s": statistics.median(reads),
        "load_gb_per_s": rate(reads),
        "disk_write_gb_per_s": rate(bare_writes),
        "disk_read_gb_per_s": rate(bare_reads),
        "background": job.config.checkpoint.background,
        "rounds": rounds,
        "layout": job.layout,
        "device": job.device.name,
        "load_average": os.getloadavg()[0],
        "versions": package_versions(),
        "source": source_state(Path(__file__).resolve().parents[1])[0],
    }


def _train_step(job: Job, engine: Any) -> None:
    for _ in range(job.plan.grad_accum):
        engine.backward(job.task.forward(engine, next(job.task.batches())).loss)
        engine.step()


def _load(engine: Any, path: Path) -> None:
    index = read_index(path)
    assert not checkpoint.check_together(path, index)
    checkpoint.load(engine, path, index)


def _write_bare(path: Path, size: int) -> None:
    block = os.urandom(1 << 24)
    with open(path, "wb", buffering=0) as file:
        for start in range(0, size, len(block)):
            file.write(block[: size - start])
        os.fsync(file.fileno())


def _forget(paths: Any) -> None:
    """Ask the system to drop the files' pages, so that reading them means the disk."""
    for path in paths:
        if hasattr(os, "posix_fadvise"):
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def _seconds(work: Callable[..., Any], *arguments: Any) -> float:
    accelerator().synchronize()
    start = time.perf_counter()
    work(*arguments)
    accelerator().synchronize()
    return time.perf_counter() - start


def _show(row: Row) -> None:
    table = Table("", "seconds", "GB/s", "disk's own GB/s")
    rates = ("save_gb_per_s", "disk_write_gb_per_s"), ("load_gb_per_s", "disk_read_gb_per_s")
    for name, (mine, disk) in zip(("save", "load"), rates, strict=True):
        table.add_row(name, f"{row[f'{name}_s']:.2f}", f"{row[mine]:.2f}", f"{row[disk]:.2f}")
    table.add_row("a training step waits for a save", f"{row['stall_s']:.3f}", "", "")
    table.add_row("a training step", f"{row['step_s']:.3f}", "", "")
    if row["step_while_writing_s"]:
        table.add_row("a training step while one is written", f"{row['step_while_writing_s']:.3f}", "", "")
    Console(width=100).print(f"{row['bytes'] / 1e6:,.0f} MB, {row['layout']}", table)
