"""Train a sweep's trials: each a process of its own, several at once if asked for, and stopped by a signal."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import psutil

from moe_scale.parallel import device as devices
from moe_scale.tools.launch_run import ranks_below
from moe_scale.tools.sweep_plan import Plan, Planned
from moe_scale.tools.sweep_report import is_finished, last_score
from moe_scale.train.faults import EXIT_PREEMPTED, PreemptedError
from moe_scale.train.lock import alone_in

ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
POLL_S = 0.1
LAST_LINES = 8
OF_A_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class Running:
    """A started trial."""

    planned: Planned
    process: subprocess.Popen
    began: float
    log_start: int
    slot: int


def command(recipe: str, argv: Sequence[str], run_dir: Path, ranks: int) -> list[str]:
    """What trains a trial: the recipe in this Python, or as ranks of ``torchrun``."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return [*launcher, recipe, *argv, "--output_dir", str(run_dir), "--resume", "auto"]


def trial_command(plan: Plan, planned: Planned, folder: Path) -> list[str]:
    """:func:`command` of a planned trial."""
    return command(plan.recipe, planned.argv, planned.folder(folder), plan.ranks)


def train_trials(plan: Plan, folder: Path, parallel: int, lock: int | None) -> bool:
    """Train what is not finished, in order. Returns whether all are finished.

    Args:
        plan: of the sweep.
        folder: of the sweep.
        parallel: trials at once.
        lock: what :func:`locked` gave.

    Raises:
        PreemptedError: when SIGTERM or SIGUSR1 asked to stop, and all running trials have ended.
        KeyboardInterrupt: the same for SIGINT.
    """
    waiting = []
    for planned in plan.trials:
        if is_finished(planned, plan.metric, folder):
            print(f"{_place(plan, planned)} {_score(plan, planned, folder)}, trained before", flush=True)
        else:
            waiting.append(planned)
    with _Asked(Path(plan.recipe)) as asked:
        running = asked.running
        while (waiting and not asked.by) or running:
            while waiting and not asked.by and len(running) < parallel:
                slot = min(set(range(parallel)) - {trial.slot for trial in running})
                planned = waiting.pop(0)
                if parallel == 1:
                    print(_place(plan, planned), end=" ", flush=True)
                running.append(_start(plan, planned, folder, slot, parallel, lock))
                if asked.by:  # it came while the trial was started, and has not reached it
                    asked.hand_on(running[-1])
            time.sleep(POLL_S)
            for trial in [trial for trial in running if trial.process.poll() is not None]:
                running.remove(trial)
                outcome = _end(plan, trial, folder, asked=bool(asked.by))
                print(outcome if parallel == 1 else f"{_place(plan, trial.planned)} {outcome}", flush=True)
    finished = [is_finished(planned, plan.metric, folder) for planned in plan.trials]
    if asked.by:
        done = f"{sum(finished)} of {len(finished)} trials are done"
        _stop(asked.by, f"stopped by {asked.by.name}: {done}; the same command goes on")
    return all(finished)


def _stop(by: signal.Signals, text: str) -> NoReturn:
    """End as a recipe does that the same signal stopped."""
    if by == signal.SIGINT:
        print(text, file=sys.stderr)
        raise KeyboardInterrupt
    raise PreemptedError(text)


class _Asked:
    """Hands signals that ask to stop on to the running trials, which save and leave; a second one ends them at once.

    Trials have sessions of their own: a Ctrl-C reaches this process alone, and becomes the SIGTERM that they know.
    """

    def __init__(self, recipe: Path):
        self.recipe = recipe
        self.by: signal.Signals | None = None
        self.running: list[Running] = []

    def __enter__(self) -> _Asked:
        self._before = {number: signal.signal(number, self._hear) for number in ASKING}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        for trial in self.running:  # only where something unforeseen ends the sweep
            self.hand_on(trial)
            trial.process.wait()

    def _hear(self, number: int, _: object) -> None:
        self.by = self.by or signal.Signals(number)
        for trial in self.running:
            self.hand_on(trial)

    def hand_on(self, trial: Running) -> None:
        # To the ranks themselves: torchrun would kill them after 30 seconds.
        processes: list[Any] = [*ranks_below(trial.process.pid, self.recipe)] or [trial.process]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                process.send_signal(signal.SIGTERM)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int | None]:
    """Keep other sweeps out of the folder; as :func:`alone_in`. What it yields is handed to the trials, so that the
    lock holds while any of them lives."""
    with alone_in(folder, "another sweep, or by a trial that one left behind") as lock:
        yield lock


def environment(folder: Path, slot: int, ranks: int, parallel: int) -> dict[str, str]:
    """The variables of a trial: of no launcher, and with GPUs of its own where several trials run at once."""
    environ = {name: value for name, value in os.environ.items() if name not in OF_A_LAUNCHER}
    environ |= {"PYTHONUNBUFFERED": "1"}
    environ.setdefault("WANDB_RUN_GROUP", folder.name)
    if parallel > 1 and not devices.detect().is_cpu:
        mine = visible_gpus()[slot * ranks : (slot + 1) * ranks]
        environ["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
    return environ


def visible_gpus() -> list[str]:
    """Names of this machine's GPUs, as ``CUDA_VISIBLE_DEVICES`` has or takes them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(n) for n in range(devices.accelerator().device_count())]


def _start(plan: Plan, planned: Planned, folder: Path, slot: int, parallel: int, lock: int | None) -> Running:
    planned.failure(folder).unlink(missing_ok=True)
    with planned.log(folder).open("ab") as log:
        log_start = log.tell()
        process = subprocess.Popen(
            trial_command(plan, planned, folder),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment(folder, slot, plan.ranks, parallel),
            start_new_session=True,
            pass_fds=() if lock is None else (lock,),
        )
    return Running(planned, process, time.monotonic(), log_start, slot)


def _end(plan: Plan, trial: Running, folder: Path, *, asked: bool) -> str:
    """What to tell of a trial that ended; a failure is written down, too."""
    planned, seconds, code = trial.planned, time.monotonic() - trial.began, trial.process.returncode
    took = f"{seconds:,.0f} s"
    if code == 0 and is_finished(planned, plan.metric, folder):
        return f"{_score(plan, planned, folder)}, {took}"
    if asked or code == EXIT_PREEMPTED:
        return f"stopped after {took}; the next start goes on"
    how = f"exit code {code}" if code >= 0 else f"signal {-code}"
    with planned.log(folder).open("rb") as log:
        log.seek(trial.log_start)
        lines = [line.rstrip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    last = [f"    {line}" for line in lines[-LAST_LINES:]]
    planned.failure(folder).write_text("\n".join([f"failed with {how} after {took}", *last]) + "\n")
    return "\n".join([f"FAILED with {how} after {took}; the end of {planned.log(folder)}:", *last])


def _score(plan: Plan, planned: Planned, folder: Path) -> str:
    value = last_score(planned, plan.metric, folder)
    return f"{plan.metric} {'is not a number' if value is None else f'{value:.4f}'}"


def _place(plan: Plan, planned: Planned) -> str:
    return f"[{plan.trials.index(planned) + 1}/{len(plan.trials)}] {planned.trial.name}:"
