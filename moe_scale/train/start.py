"""What all ranks do together before the first step: agree on the checkpoint, prepare the data, open the logs."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from moe_scale.checkpoint import folder as folders
from moe_scale.checkpoint.index import Index
from moe_scale.errors import EXIT_BAD_CONFIG, ConfigError, Problem, StoppedError, format_problems
from moe_scale.parallel import device as devices
from moe_scale.parallel.launch import Launch
from moe_scale.settings import to_dict
from moe_scale.telemetry.events import Events
from moe_scale.telemetry.progress import Progress
from moe_scale.telemetry.provenance import snapshot
from moe_scale.telemetry.rank_log import RankLog
from moe_scale.telemetry.records import keep_earlier_metrics
from moe_scale.telemetry.sinks import MetricsLogger
from moe_scale.train import checkpoint
from moe_scale.train.evaluation import RESTORED
from moe_scale.train.finished import has_all_steps, how_finished, remove_mark
from moe_scale.train.lock import alone_in
from moe_scale.train.preflight import Preflight
from moe_scale.train.recipe import Job

if TYPE_CHECKING:
    from moe_scale.train.run import Run


@contextmanager
def own_folder(job: Job) -> Iterator[None]:
    """Keep other starts out of the run's folder, and tidy what runs that were killed left in it. All ranks together;
    rank 0 holds the lock for all of them.

    Raises:
        ConfigError: on all ranks, if another start has the folder.
    """
    with ExitStack() as held:
        with stopping_together():
            if job.launch.is_main:
                held.enter_context(alone_in(job.run_dir, "another start", "wait for its end, or choose another folder"))
                try:
                    folders.sweep(job.run_dir)
                except OSError as error:
                    raise ConfigError(_cannot_be_written(job, error)) from None
        yield


def _cannot_be_written(job: Job, error: OSError) -> Problem:
    return Problem("output_dir", f"{job.run_dir} cannot be written: {error.strerror}")


def tell_if_finished(job: Job, resumed: tuple[Path, Index] | None) -> bool:
    """Whether nothing is left to do for a run that continues from this checkpoint; rank 0 then says so."""
    told = [how_finished(job.config, job.run_dir, resumed[1]) if resumed and job.launch.is_main else ""]
    dist.broadcast_object_list(told)
    if told[0] and job.launch.is_main:
        print(told[0], flush=True)
    return bool(told[0])


def agree_on_checkpoint(job: Job) -> tuple[Path, Index] | None:
    """The checkpoint that all ranks continue from, every byte of it compared with its checksum.

    With ``resume auto`` damaged ones are passed over, and renamed once an intact one is found.

    Raises:
        ConfigError: if the ranks find different ones, or none is intact.
    """
    found = checkpoint.candidates(job.run_dir)[0] if job.config.resume != "never" else []
    _require_same_everywhere(job, [path for path, _ in found])
    damaged: list[Problem] = []
    for path, index in found:
        problems = checkpoint.check_together(path, index)
        if not problems:
            if job.launch.is_main:
                _set_aside_newer(job, path, damaged)
            dist.barrier()
            return path, index
        damaged += problems
        if job.config.resume == "must":
            break
    if damaged:
        raise ConfigError(damaged)
    return None


def prepare_data(job: Job) -> None:
    """Make the data ready once a host, then open it on every rank; a problem on one rank stops all of them."""
    launch, task = job.launch, job.task
    with stopping_together():
        if launch.is_host_main:
            task.prepare(_say_once_who_waits(launch) if launch.is_main else lambda _: None)
    with stopping_together():
        task.open(micro_batch=job.plan.micro_batch, rank=launch.rank, world_size=launch.world_size)


def _say_once_who_waits(launch: Launch) -> Callable[[str], None]:
    """A printer of the preparation's lines, which are only there if something is to be done."""
    waiting = "one process a host prepares the data; the other ranks wait" if launch.world_size > 1 else ""

    def say(line: str) -> None:
        nonlocal waiting
        if waiting:
            print(waiting)
            waiting = ""
        print(line, flush=True)

    return say


@contextmanager
def stopping_together() -> Iterator[None]:
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
        raise ConfigError(problems)


def open_logger(job: Job, found: Preflight, resumed_at: int | None) -> MetricsLogger:
    """The metrics of this start; a resumed run continues its file, any other begins one.

    Args:
        found: what the ranks run on, for the record.
        resumed_at: the step of the checkpoint; None for a run that begins.

    Raises:
        ConfigError: if the run's folder cannot be written.
    """
    settings = to_dict(job.config)
    with stopping_together():
        if job.launch.is_main:
            try:
                remove_mark(job.run_dir)
                if resumed_at is None:
                    keep_earlier_metrics(job.run_dir)
                snapshot(
                    job.run_dir,
                    settings=settings,
                    deepspeed=job.plan.json,
                    argv=job.argv,
                    device=job.device.name,
                    hosts=found.record(),
                    recipe=job.name,
                    sparse_layers=job.task.sparse_layers,
                )
                job.task.keep_beside(job.run_dir)
            except OSError as error:
                raise ConfigError(_cannot_be_written(job, error)) from None
    logger = MetricsLogger(
        job.run_dir,
        job.config.telemetry,
        run_config=settings,
        run_name=job.run_dir.name,
        enabled=job.launch.is_main,
        layers=job.task.sparse_layers,
    )
    # What an earlier start said of its end does not hold for this one.
    logger.truncate_after(-1 if resumed_at is None else resumed_at, without=RESTORED)
    return logger


def open_events(run: Run, *, resumed: bool) -> Events:
    """What happens to the run, beside its metrics; this start is the first of it."""
    events = Events(run.job.run_dir, lambda: run.state.step, enabled=run.job.launch.is_main)
    events.add("start", resumed=resumed, ranks=run.job.launch.world_size)
    return events


@contextmanager
def open_rank_log(job: Job) -> Iterator[RankLog]:
    """This rank's own log, in the run's folder.

    Raises:
        ConfigError: on all ranks, if any cannot write its file.
    """
    rank_log = RankLog(job.run_dir, job.launch.rank, enabled=job.config.telemetry.rank_logs)
    with stopping_together():
        try:
            rank_log.open()
        except OSError as error:
            what = f"{rank_log.path} cannot be written: {error.strerror}"
            raise ConfigError(Problem("output_dir", what, this_host_only=True)) from None
    with rank_log:
        yield rank_log


def open_progress(job: Job, resumed: tuple[Path, Index] | None) -> Progress:
    """The progress bar, after the lines that introduce the run."""
    progress = Progress(job.config.max_steps, enabled=job.launch.is_main, start_step=resumed[1].step if resumed else 0)
    _announce(job, progress, resumed)
    return progress


@contextmanager
def leaving_together() -> Iterator[None]:
    """Hold each rank of a run that is stopped until all have closed their files.

    A launcher kills all ranks as soon as one has left.
    """
    try:
        yield
    except StoppedError:
        dist.barrier()
        raise


@contextmanager
def naming_this_rank(launch: Launch, rank_log: RankLog) -> Iterator[None]:
    """Let a rank whose data fails in the middle of a run say so itself: the others know nothing of it."""
    try:
        yield
    except ConfigError as error:
        text = f"rank {launch.rank} on {socket.gethostname()}: {format_problems(error.problems)}"
        rank_log.last_words(text)
        print(text, file=sys.stderr, flush=True)
        raise SystemExit(EXIT_BAD_CONFIG) from None


def _set_aside_newer(job: Job, path: Path, damaged: list[Problem]) -> None:
    """Rename the damaged checkpoints after the one that is continued from, lest they are taken for it later."""
    for problem in damaged:
        print(f"warning: a damaged checkpoint is passed over: {problem}", flush=True)
    for newer in folders.complete(job.run_dir):
        if folders.step_of(newer) > folders.step_of(path):
            aside = folders.set_aside(newer, "damaged")
            print(f"warning: {newer.name} is damaged and now called {aside.name}; {path.name} is taken", flush=True)


def _require_same_everywhere(job: Job, paths: list[Path]) -> None:
    """Stop all ranks unless they all found the checkpoints that rank 0 found: their folders may not be one."""
    mine = ", ".join(path.name for path in paths) or "none"
    found: list[str] = [""] * job.launch.world_size
    dist.all_gather_object(found, mine)
    with stopping_together():
        if mine != found[0]:
            host = socket.gethostname()
            raise ConfigError(
                Problem(
                    "output_dir",
                    f"host {host} finds the checkpoints {mine} in {job.run_dir}, rank 0 finds {found[0]}",
                    "choose a folder that all hosts share",
                )
            )


def _announce(job: Job, progress: Progress, resumed: tuple[Path, Index] | None) -> None:
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
    for remark in [*config.remarks(), *job.remarks]:
        progress.message(f"note: {remark}")
    if resumed is not None:
        path, index = resumed
        layout = ", ".join(f"{name} {value}" for name, value in index.layout.items())
        progress.message(f"continuing from {path} ({layout})")
        if has_all_steps(config, index):
            progress.message("its last step is done; what is left is the end of the run")
    elif job.device.is_cpu and plan.precision == "fp32" and devices.has_fast_bf16_cpu():
        progress.message("this CPU multiplies bf16 about 6 times faster than fp32: enable bf16 in the DeepSpeed JSON")
