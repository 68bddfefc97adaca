"""The training loop of every recipe."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_scale.checkpoint.index import Index
from moe_scale.checkpoint.reader import Reader
from moe_scale.config import duration_seconds
from moe_scale.errors import DivergedError
from moe_scale.moe.layer import update_selection_biases
from moe_scale.parallel import device as devices
from moe_scale.parallel import launch as launches
from moe_scale.parallel import zero, zero_state
from moe_scale.parallel.collectives import sum_over_ranks
from moe_scale.parallel.groups import ParallelGroups
from moe_scale.parallel.watchdog import Watchdog
from moe_scale.settings import to_dict
from moe_scale.telemetry.events import Events
from moe_scale.telemetry.progress import Progress
from moe_scale.telemetry.rank_log import RankLog
from moe_scale.telemetry.sinks import MetricsLogger
from moe_scale.telemetry.steps import StepMeter
from moe_scale.telemetry.throughput import Throughput, mfu, peak_flops
from moe_scale.train import checkpoint, preflight, snapshot
from moe_scale.train.ending import end
from moe_scale.train.engine import build_engine
from moe_scale.train.evaluation import BEST, EVALUATED, OVERFITTING, STOPPING, Patience, evaluate, score, settle_best
from moe_scale.train.faults import (
    Agreement,
    BadSteps,
    Deadline,
    Interruption,
    PreemptedError,
    SpikeWatch,
)
from moe_scale.train.finished import has_all_steps
from moe_scale.train.optim import parameters_by_part
from moe_scale.train.preflight import Preflight, RankFacts
from moe_scale.train.recipe import Job
from moe_scale.train.signs import CollapseWatch, OverfittingWatch, RouterWatch
from moe_scale.train.start import (
    agree_on_checkpoint,
    leaving_together,
    naming_this_rank,
    open_events,
    open_logger,
    open_progress,
    open_rank_log,
    own_folder,
    prepare_data,
    stopping_together,
    tell_if_finished,
)


def train(job: Job) -> None:
    """Train ``job`` from its first or resumed step to its last, and end it; or say that it has finished. All ranks
    call it together.

    Raises:
        ConfigError: if the data, the checkpoint or the folder cannot be used.
        DivergedError: if the loss is beyond help.
        PreemptedError: when the run was asked to stop, and is saved.
        checkpoint.NotSavedError: when the last checkpoint, or a file of the end, could not be written.
    """
    deadline = Deadline(duration_seconds(job.config.max_time))
    if job.device.is_cpu:
        devices.keep_freed_memory()
    launches.export(job.launch)
    zero.init_distributed()
    # The watchdog has the last word when a rank is lost, whatever signals a launcher sends to the others meanwhile.
    with Interruption() as interruption, Watchdog(hang_s=60 * job.config.faults.hang_minutes) as watchdog:
        watchdog.at(0, "checking the hosts", timed=False)
        facts = preflight.check_environment(job)
        with own_folder(job):
            watchdog.at(0, "checking the checkpoint", timed=False)
            resumed = agree_on_checkpoint(job)
            if not tell_if_finished(job, resumed):
                _train(job, facts, resumed, deadline, interruption, watchdog)


def _train(
    job: Job,
    facts: list[RankFacts],
    resumed: tuple[Path, Index] | None,
    deadline: Deadline,
    interruption: Interruption,
    watchdog: Watchdog,
) -> None:
    """What is left of a run, in a folder that no other start touches."""
    watchdog.at(0, "preparing the data", timed=False)
    prepare_data(job)
    with open_rank_log(job) as rank_log:
        watchdog.last_words = rank_log.last_words
        run, hosts = _set_up(job, facts, resumed, Surroundings(deadline, interruption, watchdog, rank_log))
        interruption.listen()
        with (
            leaving_together(),
            open_logger(job, hosts, run.state.step if resumed else None) as run.logger,
            open_events(run, resumed=resumed is not None) as run.events,
            open_progress(job, resumed) as run.progress,
            naming_this_rank(job.launch, rank_log),
            run.saver,
        ):
            watchdog.last_words = run.last_words
            if resumed and has_all_steps(job.config, resumed[1]):
                _evaluate_last_step(run)
            else:
                if job.config.eval.at_start and not run.state.step:
                    score(run)
                _train_steps(run)
            end(run)
    job.task.batches().close()
    dist.barrier()
    run.engine.destroy()


@dataclass(frozen=True)
class Surroundings:
    """What is there before a run is, and watches over it."""

    deadline: Deadline
    interruption: Interruption
    watchdog: Watchdog
    rank_log: RankLog


def _set_up(
    job: Job, facts: list[RankFacts], resumed: tuple[Path, Index] | None, around: Surroundings
) -> tuple[Run, Preflight]:
    """Model and engine, at the state of the checkpoint if there is one; and what was found out on the way."""
    config, task, watchdog = job.config, job.task, around.watchdog
    groups = zero.make_groups(config.moe.ep_size if config.moe.enabled else 1)
    watchdog.at(0, "measuring the links")
    hosts = preflight.complete(facts, task.data_fingerprint, groups)
    if job.launch.world_size > 1:
        preflight.tell(job, hosts)
    watchdog.at(0, "building the model", timed=False)
    engine = build_engine(lambda: task.build_model(groups), config, job.plan, job.device)
    state = RunState(resumed[1].step, resumed[1].tokens, resumed[1].scores) if resumed else RunState(0, 0, {})
    # Of what is drawn in training (noise, jitter, dropout), and different on every rank.
    torch.manual_seed(((config.seed + state.step) * 1_000_003 + job.launch.rank) % 2**63)
    watchdog.at(state.step, "loading the checkpoint")
    with stopping_together():
        if resumed is not None:
            task.batches().load_state_dict(checkpoint.load(engine, *resumed))
    return Run(job, engine, groups, state, around), hosts


@dataclass
class RunState:
    """Where a run stands.

    Attributes:
        step: optimizer steps done.
        tokens: seen over all ranks.
        scores: the last held-out scores; as ``best`` the best so far, and of which score; as ``stopping`` how long
            it has got no better; as ``overfitting`` what its watch had seen when the run was saved.
    """

    step: int
    tokens: int
    scores: dict[str, Any]


class Run:
    """What the steps of a run share."""

    logger: MetricsLogger
    events: Events
    progress: Progress
    new_best: dict[str, Any] | None = None
    """The score of a checkpoint that is being written as the best so far."""
    not_saved = ""
    """Why the last checkpoint is not there; empty when it is."""

    def __init__(self, job: Job, engine: Any, groups: ParallelGroups, state: RunState, around: Surroundings):
        config = job.config
        self.job, self.engine, self.groups, self.state = job, engine, groups, state
        self.deadline, self.interruption = around.deadline, around.interruption
        self.watchdog, self.rank_log = around.watchdog, around.rank_log
        job.task.progressed = around.watchdog.progressed
        self.parts = parameters_by_part(engine.module)
        self.throughput = Throughput(window=config.telemetry.every)
        self.agreement = Agreement()
        self.bad_steps = BadSteps(config.faults)
        self.spikes = SpikeWatch(config.faults)
        self.collapse = CollapseWatch(config.faults, job.task.sparse_layers, config.moe.top_k)
        self.routers = RouterWatch(config.faults, job.task.sparse_layers, config.moe.router)
        self.overfitting = OverfittingWatch(config.faults, state.scores.get(OVERFITTING))
        self.patience: Patience | None = None
        if metric := config.early_stopping.metric:
            self.patience = Patience(config.early_stopping, job.task.scores[metric], state.scores.get(STOPPING))
        facts = {"kind": job.task.model_kind, "settings": to_dict(config), "layout": job.layout}
        self.saver = checkpoint.Saver(
            job.run_dir, config.checkpoint, facts, config.optim.name, snapshot.held_bytes(engine)
        )

    def at(self, phase: str) -> None:
        """Say what this rank is about to do."""
        self.watchdog.at(self.state.step, phase)
        self.rank_log.at(phase)

    def last_words(self, text: str) -> None:
        """Write down why this process is about to be ended."""
        self.rank_log.last_words(text)
        self.events.add("stopped", text=text.partition("\n")[0])

    def tell(self, lines: Iterable[str], event: str = "warning", **facts: Any) -> None:
        """Print lines above the progress bar, on rank 0, and write each down as an event of that kind."""
        for line in lines:
            self.progress.message(line)
            self.events.add(event, text=line.removeprefix("warning: "), **facts)

    def tell_of_saves(self) -> None:
        """What has become of the checkpoints since the last call."""
        self.tell(self.saver.news())
        for step, seconds in self.saver.written():
            self.events.add("saved", step=step, seconds=round(seconds, 3))


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


def _train_steps(run: Run) -> None:
    job, state, config = run.job, run.state, run.job.config
    run.throughput.start()
    while state.step < config.max_steps:
        state.step += 1
        last = state.step == config.max_steps
        logged = state.step == 1 or state.step % config.telemetry.every == 0 or last
        learning_rate = run.engine.get_lr()[0]
        outcome = _step(run, logged=logged)
        tokens = job.task.tokens_in_step(job.tokens_per_step)
        state.tokens += tokens
        run.throughput.step(tokens)
        if logged:
            _log(run, {"lr": learning_rate} | outcome.record)
        run.bad_steps.end_if_too_many()
        with run.throughput.pause():
            if outcome.spiked and _roll_back(run):
                continue
            leaving = last or outcome.asked_to_stop
            # Who is asked to stop has little time, and evaluates when it has gone on.
            is_best = (last or (_due(config.eval.every, state.step) and not leaving)) and evaluate(run)
            if run.patience is not None and not leaving and run.agreement.any(run.patience.is_over)[0]:
                last = leaving = True
            if leaving or is_best or _due(config.checkpoint.every, state.step):
                _save(run, best=is_best)
            if leaving:
                run.saver.wait()
            run.tell_of_saves()
        if leaving and run.agreement.any(bool(run.saver.failure))[0]:
            run.not_saved = f"step {state.step} was not saved: {run.saver.failure}"
            if not last:
                raise checkpoint.NotSavedError(run.not_saved)
        if outcome.asked_to_stop and not last:
            raise PreemptedError(f"stopped and saved after step {state.step}; --resume auto continues")
        if last:
            return


def _evaluate_last_step(run: Run) -> None:
    """For a start that finds every step done: the evaluation that a run makes at its last one, unless it is there."""
    if run.state.scores.get(EVALUATED) != run.state.step and evaluate(run):
        _save(run, best=True)
        run.saver.wait()
        run.tell_of_saves()


def _step(run: Run, *, logged: bool) -> StepOutcome:
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


def _due(every: int, step: int) -> bool:
    return bool(every) and step % every == 0


def _log(run: Run, record: dict[str, Any]) -> None:
    state = run.state
    done = {"step": state.step, "tokens": state.tokens, "flops": state.tokens * run.job.task.flops_per_token}
    record = done | record | _speed(run.job, run.throughput)
    run.logger.log(record)
    run.progress.update(state.step, loss=record["lm_loss"], tokens_per_s=record["tokens_per_s"])
    run.overfitting.trained(record["lm_loss"])
    run.tell(run.collapse.look(record) + run.routers.look(record))


def _save(run: Run, *, best: bool) -> None:
    state = run.state
    run.at("save")
    if not best:
        settle_best(run)
    scores = state.scores | {OVERFITTING: run.overfitting.state()} | ({BEST: run.new_best} if best else {})
    moment = checkpoint.Moment(state.step, state.tokens, scores)
    run.saver.save(run.engine, moment, run.job.task.batches().state_dict(), best=best)


def _roll_back(run: Run) -> bool:
    """After a spike: back to the newest checkpoint, and on with the data after the spike. False if there is none."""
    state = run.state
    run.saver.wait()
    run.at("going back")
    found = checkpoint.newest_intact(run.job.run_dir)
    if found is None:
        run.tell([f"warning: the loss spiked at step {state.step}, and there is no checkpoint yet to go back to"])
        run.spikes.accept()
        return False
    path, index = found
    run.spikes.rolled_back(state.step)
    snapshot.put(run.engine, Reader(path, index), step=index.step)
    told = f"warning: the loss spiked at step {state.step}: back to {path.name}, and past the data since then"
    run.tell([told], "went back", to=index.step)
    state.step = index.step  # not the tokens: the data goes on from here
    run.logger.truncate_after(index.step)
    return True


def _what_is_bad(bad_loss: bool, norms: dict[str, float]) -> str:
    parts = [name.removeprefix("grad_norm/") for name, norm in norms.items() if "/" in name and not math.isfinite(norm)]
    gradients = f"the gradient of {', '.join(parts)}" if parts else ""
    return " and ".join(filter(None, ["the loss" if bad_loss else "", gradients])) + " is not a number"


def _grad_norms(engine: Any, parts: dict[str, Any], stage: int, groups: ParallelGroups) -> dict[str, float]:
    """The global gradient norm and that of each part of the model, before clipping."""
    squares = zero.squared_grad_norms(engine, parts, stage, groups)
    norms = {f"grad_norm/{part}": math.sqrt(square) for part, square in squares.items()}
    return {"grad_norm": math.sqrt(sum(squares.values())), **norms}


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
