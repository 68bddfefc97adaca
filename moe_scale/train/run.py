"""What belongs to a run while it trains: where it stands, what watches over it, and what it writes to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from moe_scale.parallel.groups import ParallelGroups
from moe_scale.parallel.watchdog import Watchdog
from moe_scale.settings import to_dict
from moe_scale.telemetry.events import Events
from moe_scale.telemetry.progress import Progress
from moe_scale.telemetry.rank_log import RankLog
from moe_scale.telemetry.sinks import MetricsLogger
from moe_scale.telemetry.throughput import Throughput
from moe_scale.train import checkpoint, snapshot
from moe_scale.train.evaluation import OVERFITTING, STOPPING, Patience
from moe_scale.train.faults import Agreement, BadSteps, Deadline, Interruption, SpikeWatch
from moe_scale.train.optim import parameters_by_part
from moe_scale.train.recipe import Job
from moe_scale.train.signs import CollapseWatch, OverfittingWatch, RouterWatch


@dataclass(frozen=True)
class Surroundings:
    """What is there before a run is, and watches over it."""

    deadline: Deadline
    interruption: Interruption
    watchdog: Watchdog
    rank_log: RankLog


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
