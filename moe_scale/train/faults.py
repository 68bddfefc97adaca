"""What a run does when it is interrupted, and when its loss or its routing goes wrong."""

from __future__ import annotations

import collections
import os
import signal
import socket
import statistics
import threading
import time
from typing import Any

import torch
import torch.distributed as dist

from moe_scale.config import FaultConfig
from moe_scale.errors import DivergedError, StoppedError
from moe_scale.parallel.collectives import host_group

EXIT_PREEMPTED = 75
"""Exit code of a run that was asked to stop and has saved: start it again with ``--resume auto``."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
SAME_REQUEST_S = 1.0
"""Launchers send a signal several times over; what comes within so many seconds is one request."""


class PreemptedError(StoppedError):
    """The run was asked to stop, and its state is saved."""

    exit_code = EXIT_PREEMPTED


class Interruption:
    """Whether a signal asks this rank to save and stop. A second one, later, ends the process at once.

    A context manager that listens from :meth:`listen` to its end.

    Signals are read from a pipe by a thread: Python runs a handler only when the main thread returns to it, and that
    one may be waiting in a collective.
    """

    def __init__(self) -> None:
        self.requested = ""
        """Name of the signal that came; empty before."""
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)

        self._handlers: dict[int, Any] = {}
        self._wakeup = -1

    def __enter__(self) -> Interruption:
        return self

    def listen(self) -> None:
        """From here on a signal is a request; before, it ends the process."""
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._read, name="signals", daemon=True).start()

    def __exit__(self, *_: object) -> None:
        if not self._handlers:
            self._reader.close()
            self._writer.close()
            return
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._writer.close()  # ends the thread

    def _read(self) -> None:
        first = 0.0
        while numbers := self._reader.recv(64):
            for number in numbers:
                if number not in SIGNALS:
                    continue
                if not self.requested:
                    first, self.requested = time.monotonic(), signal.Signals(number).name
                elif time.monotonic() - first > SAME_REQUEST_S:
                    os._exit(128 + number)
        self._reader.close()


class Agreement:
    """Makes what one rank sees known to all, once a step, over the hosts' network, so that no device waits for it."""

    def __init__(self) -> None:
        self._alone, self._group = dist.get_world_size() == 1, host_group()

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set on any rank; all ranks together."""
        if self._alone:
            return list(flags)
        found = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self._group)
        return [bool(flag) for flag in found.tolist()]

    def mean(self, value: float) -> float:
        """The mean over ranks; all ranks together."""
        if self._alone:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(total, group=self._group)
        return float(total) / dist.get_world_size()


class Deadline:
    """When a run has to save so that it is done before its time is up.

    Args:
        seconds: that the run may take from now on; None for as long as it likes.
    """

    def __init__(self, seconds: float | None):
        self.end = None if seconds is None else time.monotonic() + seconds
        self._longest = 0.0  # of all steps: the next one may have an evaluation too
        self._last: float | None = None

    def near(self, save_s: float) -> bool:
        """Whether another step may be one too many. Call it once a step.

        Args:
            save_s: seconds that a checkpoint takes.
        """
        now = time.monotonic()
        if self._last is not None:  # what came before the first step is no measure of a step
            self._longest = max(self._longest, now - self._last)
        self._last = now
        return self.end is not None and now + 2 * self._longest + 2 * save_s >= self.end


class BadSteps:
    """Counts the steps that were skipped because their loss or gradient was not a number."""

    def __init__(self, config: FaultConfig):
        self.config = config
        self.in_a_row = 0
        self._last = ""

    def good(self) -> None:
        self.in_a_row = 0

    def bad(self, step: int, what: str) -> str:
        """Count a step. Returns what to tell."""
        self.in_a_row += 1
        self._last = f"{what} at step {step}"
        return f"warning: step {step} was skipped: {what}"

    def end_if_too_many(self) -> None:
        """Call it when the step is logged.

        Raises:
            DivergedError: when there were too many in a row.
        """
        if self.in_a_row >= self.config.max_bad_steps:
            raise DivergedError(
                f"{self._last}; steps skipped in a row: {self.in_a_row} (faults.max_bad_steps). Lower --optim.lr, "
                "raise --optim.warmup_steps, or look at the data; the last checkpoint is from before"
            )


class SpikeWatch:
    """Notices a loss far above those of the last 50 steps (``faults.spike_factor``)."""

    def __init__(self, config: FaultConfig):
        self.config = config
        self.rollbacks = 0
        self._last = 0.0
        self._losses: collections.deque[float] = collections.deque(maxlen=50)

    def is_spike(self, loss: float) -> bool:
        """Whether the loss is a spike; one that is not joins those to compare with."""
        self._last = loss
        if len(self._losses) >= 10 and loss > self.config.spike_factor * statistics.fmean(self._losses):
            return True
        self._losses.append(loss)
        return False

    def accept(self) -> None:
        """Take the last loss, a spike, for what the loss is now: there is nothing to go back to."""
        self._losses.append(self._last)

    def rolled_back(self, step: int) -> None:
        """Count a return to a checkpoint.

        Raises:
            DivergedError: when there were too many.
        """
        self.rollbacks += 1
        if self.rollbacks > self.config.max_rollbacks:
            raise DivergedError(
                f"the loss spiked at step {step}, after {self.config.max_rollbacks} returns to a checkpoint "
                "(faults.max_rollbacks): lower --optim.lr, or look at the data"
            )
