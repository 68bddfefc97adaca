"""The training loop of every recipe."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_scale.errors import ConfigError, DivergedError, Problem
from moe_scale.moe.layer import update_selection_biases
from moe_scale.parallel import device as devices
from moe_scale.parallel import launch as launches
from moe_scale.parallel import zero
from moe_scale.parallel.collectives import sum_over_ranks
from moe_scale.parallel.groups import ParallelGroups
from moe_scale.settings import to_dict
from moe_scale.telemetry.progress import Progress
from moe_scale.telemetry.provenance import snapshot
from moe_scale.telemetry.sinks import MetricsLogger
from moe_scale.telemetry.steps import StepMeter
from moe_scale.telemetry.throughput import Throughput, mfu, peak_flops
from moe_scale.train import checkpoint
from moe_scale.train.engine import build_engine
from moe_scale.train.optim import parameters_by_part
from moe_scale.train.recipe import Job


def train(job: Job) -> None:
    """Train ``job`` from its first or resumed step to its last. All ranks call it together."""
    config, plan, launch, task = job.config, job.plan, job.launch, job.task
    run_dir = Path(config.output_dir).expanduser()
    if job.device.is_cpu:
        devices.keep_freed_memory()
    launches.export(launch)
    zero.init_distributed()
    groups = zero.make_groups(config.moe.ep_size if config.moe.enabled else 1)
    _prepare_data(job)
    engine = build_engine(lambda: task.build_model(groups), config, plan, job.device)

    step = tokens = 0
    batches = task.batches()
    if job.resume_from is not None:
        saved, data_state = checkpoint.load(engine, job.resume_from)
        step, tokens = saved["step"], saved["tokens"]
        batches.load_state_dict(data_state)

    settings = to_dict(config)
    logger = MetricsLogger(
        run_dir,
        config.telemetry,
        run_config=settings,
        run_name=run_dir.name,
        enabled=launch.is_main,
        layers=task.sparse_layers,
    )
    if launch.is_main:
        snapshot(run_dir, settings=settings, deepspeed=plan.json, argv=job.argv)
    logger.truncate_after(step if job.resume_from else -1)

    throughput = Throughput(window=config.telemetry.every)
    parts = parameters_by_part(engine.module)
    scores: dict[str, Any] = {}
    balances = config.moe.enabled and config.moe.router == "sigmoid"
    tokens_per_step = plan.micro_batch * plan.grad_accum * launch.world_size * task.tokens_per_sequence
    with logger, Progress(config.max_steps, enabled=launch.is_main, start_step=step) as progress:
        _announce(job, progress, tokens_per_step)
        throughput.start()
        while step < config.max_steps:
            step += 1
            last_step = step == config.max_steps
            logged = step == 1 or step % config.telemetry.every == 0 or last_step
            meter, grad_norms, lr = StepMeter(), {}, engine.get_lr()[0]
            loads: list[Tensor] = []
            for micro_step in range(plan.grad_accum):
                output = task.forward(engine, next(batches))
                engine.backward(output.loss)
                if output.moe is not None:
                    loads.append(output.moe.assignments_E.detach())
                if logged:
                    meter.add(output)
                    if micro_step == plan.grad_accum - 1:
                        grad_norms = _grad_norms(engine, parts, plan.stage, groups)
                engine.step()
            if balances:
                update_selection_biases(
                    engine.module, sum_over_ranks(torch.stack(loads).sum(dim=0)), config.moe.bias_update_rate
                )
            tokens += tokens_per_step
            if logged:
                record = {"step": step, "tokens": tokens, "lr": lr} | meter.record() | grad_norms
                _stop_if_not_finite(record)
                throughput.step(tokens_per_step)
                record |= _speed(job, throughput)
                logger.log(record)
                progress.update(step, loss=record["lm_loss"], tokens_per_s=record["tokens_per_s"])
            else:
                throughput.step(tokens_per_step)
            with throughput.pause():
                if last_step or (config.eval.every and step % config.eval.every == 0):
                    scores = task.evaluate(engine)
                    logger.log({"step": step, "tokens": tokens} | scores)
                    progress.message(f"step {step}: held-out loss {scores['eval/loss']:.4f}")
                if last_step or (config.save_every and step % config.save_every == 0):
                    checkpoint.save(
                        engine, run_dir, step=step, tokens=tokens, data_state=batches.state_dict(), layout=job.layout
                    )
    summary = task.summarize(engine, scores, run_dir)
    if launch.is_main:
        _print_summary([*summary, ("tokens seen", f"{tokens:,}"), ("run folder", str(run_dir.resolve()))])
    dist.barrier()
    engine.destroy()


def _prepare_data(job: Job) -> None:
    """Make the data ready once a host, then open it on every rank; a problem on one rank stops all of them."""
    launch, task = job.launch, job.task
    with _stopping_together():
        if launch.is_host_main:
            task.prepare(print if launch.is_main else lambda _: None)
    with _stopping_together():
        task.open(micro_batch=job.plan.micro_batch, rank=launch.rank, world_size=launch.world_size)


@contextmanager
def _stopping_together() -> Iterator[None]:
    """Raise a :class:`ConfigError` of any rank on all of them, instead of leaving the others to wait for it."""
    mine: list[Problem] = []
    try:
        yield
    except ConfigError as error:
        mine = error.problems
    everyones: list[list[Problem] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, mine)
    problems = list(dict.fromkeys(p for theirs in everyones for p in theirs or []))
    if problems:
        dist.destroy_process_group()
        raise ConfigError(problems)


def _announce(job: Job, progress: Progress, tokens_per_step: int) -> None:
    config, plan = job.config, job.plan
    moe = (
        f"{config.moe.num_experts} experts top-{config.moe.top_k}, {config.moe.backend}"
        if config.moe.enabled
        else "dense"
    )
    progress.message(
        f"{job.name} at scale {config.scale}: {moe}, ep_size {config.moe.ep_size}; ZeRO-{plan.stage}, "
        f"{plan.precision}, {job.launch.world_size} x {job.device.name}; {tokens_per_step:,} tokens a step"
    )
    for remark in config.remarks():
        progress.message(f"note: {remark}")
    if job.resume_from is not None:
        progress.message(f"continuing from {job.resume_from}")
    elif job.device.is_cpu and plan.precision == "fp32" and devices.has_fast_bf16_cpu():
        progress.message("this CPU multiplies bf16 about 6 times faster than fp32: enable bf16 in the DeepSpeed JSON")


def _grad_norms(engine: Any, parts: dict[str, Any], stage: int, groups: ParallelGroups) -> dict[str, float]:
    """The global gradient norm and that of each part of the model, before clipping."""
    squares = zero.squared_grad_norms(engine, parts, stage, groups)
    norms = {f"grad_norm/{part}": math.sqrt(square) for part, square in squares.items()}
    return {"grad_norm": math.sqrt(sum(squares.values())), **norms}


def _stop_if_not_finite(record: dict[str, Any]) -> None:
    # An fp16 overflow shows in the gradients alone, and DeepSpeed skips that step by itself.
    if not math.isfinite(record["loss"]):
        raise DivergedError(
            f"the loss is {record['loss']} at step {record['step']}: lower --optim.lr or raise --optim.warmup_steps"
        )


def _speed(job: Job, throughput: Throughput) -> dict[str, Any]:
    tokens_per_s = throughput.tokens_per_s
    share = mfu(
        job.task.flops_per_token, tokens_per_s / job.launch.world_size, peak_flops(job.device.name, job.plan.precision)
    )
    return {
        "tokens_per_s": tokens_per_s,
        "step_time_s": throughput.step_time_s,
        "memory_bytes": devices.peak_memory_bytes(job.device),
        **({} if share is None else {"mfu": share}),
    }


def _print_summary(lines: list[tuple[str, str]]) -> None:
    width = max(len(label) for label, _ in lines)
    print()
    for label, text in lines:
        indented = text.replace("\n", "\n" + " " * (width + 2))
        print(f"{label:<{width}}  {indented}")
