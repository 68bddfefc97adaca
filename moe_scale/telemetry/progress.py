"""What a person watches while a run trains: one live line on a terminal, plain lines in a log file."""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, TextIO

PLAIN_INTERVAL_S = 10.0
"""Seconds between two lines where standard output is no terminal."""

RATE_WINDOW = 50
"""Updates that the time left is estimated from."""


class Progress:
    """Shows step, loss, tokens/s and the time left. Usable as a context manager.

    On a terminal that is one line, redrawn in place. Elsewhere (Slurm logs, CI, pipes) the first step, the last one and
    at most one line every :data:`PLAIN_INTERVAL_S` seconds in between are printed, without a carriage return.

    Args:
        total_steps: optimizer steps of the whole run.
        enabled: False on every rank but the first; then nothing is printed.
        start_step: steps that were done before this start, on a resume.
        stream: where to print; standard output unless given.
        clock: seconds that only rise; for tests.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        enabled: bool,
        start_step: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.total_steps = total_steps
        self.enabled = enabled
        self._stream = stream or sys.stdout
        self._clock = clock
        self._last: tuple[int, float] | None = None
        self._seconds_per_step: deque[float] = deque(maxlen=RATE_WINDOW)
        self._printed_at = -math.inf
        self._unprinted = ""
        self._bar: Any = None
        self._task: Any = None
        if enabled and self._stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
            self._bar = _live_bar(self._stream)
            self._task = self._bar.add_task("", total=total_steps, completed=start_step, status="")
            self._bar.start()

    def update(self, step: int, *, loss: float, tokens_per_s: float, extra: Mapping[str, str] | None = None) -> None:
        """Show that ``step`` steps of ``total_steps`` are done.

        Args:
            step: steps done, this one included.
            loss: of this step, nats per token.
            tokens_per_s: over all ranks.
            extra: more to show, by name.
        """
        if not self.enabled:
            return
        now = self._clock()
        if self._last is not None and step > self._last[0]:
            self._seconds_per_step.append((now - self._last[1]) / (step - self._last[0]))
        self._last = (step, now)
        speed = f"{tokens_per_s:,.0f}" if math.isfinite(tokens_per_s) else "-"
        parts = [f"loss {loss:.4f}", f"{speed} tokens/s", f"{format_seconds(self.seconds_left)} left"]
        parts += [f"{name} {value}" for name, value in (extra or {}).items()]
        if self._bar:
            self._bar.update(self._task, completed=step, status="  ".join(parts))
            return
        line = f"step {step}/{self.total_steps}  " + "  ".join(parts)
        if step >= self.total_steps or now - self._printed_at >= PLAIN_INTERVAL_S:
            self._print(line)
            self._printed_at = now
            self._unprinted = ""
        else:
            self._unprinted = line

    @property
    def seconds_left(self) -> float | None:
        """Seconds to the last step at the median rate of recent updates; None before there is one.

        The median, because a step that waited for an evaluation or a checkpoint would pull a mean up for a long time.
        """
        if self._last is None or not self._seconds_per_step:
            return None
        return max(0, self.total_steps - self._last[0]) * statistics.median(self._seconds_per_step)

    def message(self, text: str) -> None:
        """Print a line of its own, above the live line where there is one."""
        if not self.enabled:
            return
        if self._bar:
            self._bar.console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)
        else:
            self._print(text)

    def close(self) -> None:
        """Print the last step if it was held back, and leave the live line as it stands. May be called twice."""
        if self._bar:
            self._bar.stop()
        elif self._unprinted:
            self._print(self._unprinted)
        self._unprinted = ""
        self._bar = None
        self.enabled = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


def format_seconds(seconds: float | None) -> str:
    """Seconds as ``1:23:45``; ``-:--:--`` where there is no estimate."""
    if seconds is None or not math.isfinite(seconds):
        return "-:--:--"
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"


def _live_bar(stream: TextIO) -> Any:
    from rich import progress
    from rich.console import Console

    return progress.Progress(
        progress.MofNCompleteColumn(),
        progress.BarColumn(bar_width=24),
        progress.TextColumn("{task.fields[status]}", markup=False),
        console=Console(file=stream),
        refresh_per_second=4,
    )
