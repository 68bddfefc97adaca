"""The training loop of every recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_scale.checkpoint.index import Index
from moe_scale.checkpoint.reader import Reader
from moe_scale.config import duration_seconds
from moe_scale.parallel import device as devices
from moe_scale.parallel import launch as launches
from moe_scale.parallel import zero
from moe_scale.parallel.watchdog import Watchdog
from moe_scale.telemetry.throughput import Throughput, mfu, peak_flops
from moe_scale.train import checkpoint, preflight, snapshot
from moe_scale.train.ending import end
from moe_scale.train.engine import build_engine
from moe_scale.train.evaluation import BEST, EVALUATED, OVERFITTING, evaluate, score, settle_best
from moe_scale.train.faults import Deadline, Interruption, PreemptedError
from moe_scale.train.finished import has_all_steps
from moe_scale.train.preflight import Preflight, RankFacts
from moe_scale.train.recipe import Job
from moe_scale.train.run import Run, RunState, Surroundings
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
from moe_scale.train.step import take_step


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


def _train_steps(run: Run) -> None:
    job, state, config = run.job, run.state, run.job.config
    run.throughput.start()
    while state.step < config.max_steps:
        state.step += 1
        last = state.step == config.max_steps
        logged = state.step == 1 or state.step % config.telemetry.every == 0 or last
        learning_rate = run.engine.get_lr()[0]
        outcome = take_step(run, logged=logged)
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
