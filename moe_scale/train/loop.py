"""The training loop of every recipe."""

from __future__ import annotations

import math
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_scale.errors import EXIT_BAD_CONFIG, ConfigError, DivergedError, Problem, format_problems
from moe_scale.moe.layer import update_selection_biases
from moe_scale.parallel import device as devices
from moe_scale.parallel import launch as launches
from moe_scale.parallel import zero
from moe_scale.parallel.collectives import sum_over_ranks
from moe_scale.parallel.groups import ParallelGroups
from moe_scale.parallel.launch import Launch
from moe_scale.settings import to_dict
from moe_scale.telemetry.progress import Progress
from moe_scale.telemetry.provenance import snapshot
from moe_scale.telemetry.records import keep_earlier_metrics
from moe_scale.telemetry.sinks import MetricsLogger
from moe_scale.telemetry.steps import StepMeter
from moe_scale.telemetry.throughput import Throughput, mfu, peak_flops
from moe_scale.train import checkpoint
from moe_scale.train.engine import build_engine
from moe_scale.train.optim import parameters_by_part
from moe_scale.train.recipe import Job


def train(job: Job) -> None:
    """Train ``job`` from its first or resumed step to its last. All ranks call it together."""
    config, launch, task = job.config, job.launch, job.task
    if job.device.is_cpu:
        devices.keep_freed_memory()
    launches.export(launch)
    zero.init_distributed()
    _agree_on_checkpoint(job)
    groups = zero.make_groups(config.moe.ep_size if config.moe.enabled else 1)
    _prepare_data(job)
    engine = build_engine(lambda: task.build_model(groups), config, job.plan, job.device)
    # Of what is drawn in training (noise, jitter, dropout), and different on every rank.
    torch.manual_seed((config.seed * 1_000_003 + launch.rank) % 2**63)

    state = RunState(step=0, tokens=0, scores={})
    if job.resume_from is not None:
        saved, data_state = checkpoint.load(engine, job.resume_from)
        state.step, state.tokens = saved["step"], saved["tokens"]
        task.batches().load_state_dict(data_state)
    with (
        _open_logger(job, state.step) as logger,
        _open_progress(job, state.step) as progress,
        _naming_this_rank(launch),
    ):
        _train_steps(job, engine, groups, state, logger, progress)
    summary = task.summarize(engine, state.scores, job.run_dir)
    if launch.is_main:
        _print_summary([*summary, ("tokens seen", f"{state.tokens:,}"), ("run folder", str(job.run_dir.resolve()))])
    task.batches().close()
    dist.barrier()
    engine.destroy()


@dataclass
class RunState:
    """Where a run stands: optimizer steps done, tokens seen over all ranks, and the last held-out scores."""

    step: int
    tokens: int
    scores: dict[str, Any]


def _train_steps(
    job: Job, engine: Any, groups: ParallelGroups, state: RunState, logger: MetricsLogger, progress: Progress
) -> None:
    config, task = job.config, job.task
    batches = task.batches()
    throughput = Throughput(window=config.telemetry.every)
    parts = parameters_by_part(engine.module)
    throughput.start()
    while state.step < config.max_steps:
        state.step += 1
        last = state.step == config.max_steps
        logged = state.step == 1 or state.step % config.telemetry.every == 0 or last
        record = {"lr": engine.get_lr()[0]} | _step(job, engine, groups, parts if logged else None)
        state.tokens += job.tokens_per_step
        throughput.step(job.tokens_per_step)
        if logged:
            record = {"step": state.step, "tokens": state.tokens} | record | _speed(job, throughput)
            logger.log(record)
            _stop_if_not_finite(record)
            progress.update(state.step, loss=record["lm_loss"], tokens_per_s=record["tokens_per_s"])
        with throughput.pause():
            if last or (config.eval.every and state.step % config.eval.every == 0):
                state.scores = task.evaluate(engine)
                logger.log({"step": state.step, "tokens": state.tokens} | state.scores)
                progress.message(f"step {state.step}: held-out loss {state.scores['eval/loss']:.4f}")
            if last or (config.save_every and state.step % config.save_every == 0):
                position = batches.state_dict()
                checkpoint.save(
                    engine, job.run_dir, step=state.step, tokens=state.tokens, data_state=position, layout=job.layout
                )


def _step(job: Job, engine: Any, groups: ParallelGroups, parts: dict[str, Any] | None) -> dict[str, Any]:
    """One optimizer step over its micro-batches; with ``parts`` also what it reports."""
    meter, record = StepMeter(), {}
    loads: list[Tensor] = []
    for micro_step in range(job.plan.grad_accum):
        output = job.task.forward(engine, next(job.task.batches()))
        engine.backward(output.loss)
        if output.moe is not None:
            loads.append(output.moe.assignments_E.detach())
        if parts is not None:
            meter.add(output)
            if micro_step == job.plan.grad_accum - 1:
                record = _grad_norms(engine, parts, job.plan.stage, groups)
        engine.step()
    moe = job.config.moe
    if moe.enabled and moe.router == "sigmoid" and not zero.last_step_was_skipped(engine):
        update_selection_biases(engine.module, sum_over_ranks(torch.stack(loads).sum(dim=0)), moe.bias_update_rate)
    if parts is None:
        return {}
    if job.plan.precision == "fp16":
        record |= {"loss_scale": zero.loss_scale(engine), "skipped_steps": engine.skipped_steps}
    return meter.record() | record


def _agree_on_checkpoint(job: Job) -> None:
    """Stop all ranks unless they all found the checkpoint that rank 0 found: their folders may not be one."""
    mine = job.resume_from.name if job.resume_from else "none"
    found: list[str] = [""] * job.launch.world_size
    dist.all_gather_object(found, mine)
    with _stopping_together():
        if mine != found[0]:
            host = socket.gethostname()
            raise ConfigError(
                Problem(
                    "output_dir",
                    f"host {host} finds the checkpoint {mine} in {job.run_dir}, rank 0 finds {found[0]}",
                    "choose a folder that all hosts share",
                )
            )


def _open_logger(job: Job, step: int) -> MetricsLogger:
    """The metrics of this start; a resumed run continues its file, any other begins one."""
    settings = to_dict(job.config)
    if job.launch.is_main:
        if job.resume_from is None:
            keep_earlier_metrics(job.run_dir)
        snapshot(job.run_dir, settings=settings, deepspeed=job.plan.json, argv=job.argv, device=job.device.name)
    logger = MetricsLogger(
        job.run_dir,
        job.config.telemetry,
        run_config=settings,
        run_name=job.run_dir.name,
        enabled=job.launch.is_main,
        layers=job.task.sparse_layers,
    )
    logger.truncate_after(step if job.resume_from else -1)
    return logger


def _open_progress(job: Job, step: int) -> Progress:
    progress = Progress(job.config.max_steps, enabled=job.launch.is_main, start_step=step)
    _announce(job, progress)
    return progress


@contextmanager
def _naming_this_rank(launch: Launch) -> Iterator[None]:
    """Let a rank whose data fails in the middle of a run say so itself: the others know nothing of it."""
    try:
        yield
    except ConfigError as error:
        host = socket.gethostname()
        print(f"rank {launch.rank} on {host}: {format_problems(error.problems)}", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_BAD_CONFIG) from None


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


def _announce(job: Job, progress: Progress) -> None:
    config, plan = job.config, job.plan
    moe = (
        f"{config.moe.num_experts} experts top-{config.moe.top_k}, {config.moe.backend}"
        if config.moe.enabled
        else "dense"
    )
    progress.message(
        f"{job.name} at scale {config.scale}: {moe}, ep_size {config.moe.ep_size}; ZeRO-{plan.stage}, "
        f"{plan.precision}, {job.launch.world_size} x {job.device.name}; {job.tokens_per_step:,} tokens a step"
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
    # fp32 products run as TF32 where the device has it.
    peak = peak_flops(job.device.name, {"fp32": "tf32"}.get(job.plan.precision, job.plan.precision))
    share = mfu(job.task.flops_per_token, tokens_per_s / job.launch.world_size, peak)
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
