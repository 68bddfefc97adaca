"""A log file for every rank: ``<run_dir>/logs/rank_00003.log``.

What a person watches comes from rank 0 alone. Here is what the others would have said: where each rank runs, how long
it spent in which part of a step, the warnings of libraries, and the stack trace of what ended it.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections import defaultdict
from pathlib import Path
from types import TracebackType

from moe_scale.errors import ConfigError, StoppedError

log = logging.getLogger("moe_scale.rank")
log.propagate = False  # of no interest on a console
log.addHandler(logging.NullHandler())  # nor is it when no file is open
log.setLevel(logging.INFO)

CLOSED = ("DeepSpeed", "transformers")
"""Loggers that keep their records from the root's handlers, the second from when it is imported."""


class RankLog:
    """Adds up the time of a rank's phases and writes it down. A context manager, once it is open.

    Times are the host's: on an accelerator a phase ends when its work is handed over, and the phase that waits for a
    result has the time of all that it waits for.

    Args:
        run_dir: folder of the run.
        rank: of this process.
        enabled: False writes nothing.
    """

    def __init__(self, run_dir: Path, rank: int, *, enabled: bool = True):
        self.path = run_dir / "logs" / f"rank_{rank:05d}.log"
        self.rank = rank
        self.enabled = enabled
        self._handlers: list[tuple[logging.Logger, logging.Handler]] = []
        self._seconds: dict[str, float] = defaultdict(float)
        self._phase, self._since = "start", time.monotonic()

    def open(self) -> None:
        """Begin the file, or go on with that of an earlier start.

        Raises:
            OSError: when it cannot be written.
        """
        if not self.enabled:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = self._file()
        root = logging.getLogger()
        self._handlers = [(logger, file) for logger in (log, root, *map(logging.getLogger, CLOSED))]
        self._handlers.append((root, _Unheard(file)))
        for logger, handler in self._handlers:
            logger.addHandler(handler)
        logging.captureWarnings(True)
        log.info("rank %d on %s, process %d", self.rank, socket.gethostname(), os.getpid())

    def close(self) -> None:
        """Close the file. May be called twice."""
        if self._handlers:
            logging.captureWarnings(False)
        for logger, handler in self._handlers:
            logger.removeHandler(handler)
            handler.close()
        self._handlers = []

    def at(self, phase: str) -> None:
        """Say what this rank is about to do; the time since the last call belongs to the phase before."""
        now = time.monotonic()
        self._seconds[self._phase] += now - self._since
        self._phase, self._since = phase, now

    def step(self, step: int, loss: float) -> None:
        """Write a line about the steps since the last one: this rank's own loss, and seconds by phase."""
        self.at(self._phase)
        phases = ", ".join(f"{phase} {seconds:.3f}" for phase, seconds in self._seconds.items())
        log.info("step %d: loss %.6f here; seconds since the last line: %s", step, loss, phases)
        self._seconds.clear()

    def last_words(self, text: str) -> None:
        """Write down why the process is about to be ended, even if an error has closed the log."""
        if self.enabled and not self._handlers:
            log.addHandler(self._file())
        log.error("%s", text)

    def _file(self) -> logging.FileHandler:
        handler = logging.FileHandler(self.path, encoding="utf-8")
        formatter = logging.Formatter("%(asctime)s.%(msecs)03dZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
        formatter.converter = time.gmtime
        handler.setFormatter(formatter)
        handler.addFilter(_first_time)
        return handler

    def __enter__(self) -> RankLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            log.info("end")
        elif isinstance(error, StoppedError | ConfigError):  # which all ranks raise together
            log.info("%s", error)
        elif isinstance(error, SystemExit):  # what there was to say is said
            log.info("leaves with exit code %s", error.code)
        else:
            log.error("ended by %s", kind.__name__ if kind else "", exc_info=error)
        self.close()


def _first_time(record: logging.LogRecord) -> bool:
    """Whether a record comes for the first time; it may by its logger and by the root."""
    first = not getattr(record, "is_in_rank_log", False)
    record.is_in_rank_log = True
    return first


class _Unheard(logging.Handler):
    """Shows what Python would have shown on standard error, had the file not been there to hear it."""

    def __init__(self, file: logging.Handler):
        super().__init__(logging.WARNING)
        self._ours = (self, file)

    def emit(self, record: logging.LogRecord) -> None:
        logger: logging.Logger | None = logging.getLogger(record.name)
        while logger:
            if any(h not in self._ours and not isinstance(h, logging.NullHandler) for h in logger.handlers):
                return
            logger = logger.parent
        if logging.lastResort:
            logging.lastResort.handle(record)
