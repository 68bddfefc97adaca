"""Errors that a user can act on, and how a process ends with one.

A :class:`ConfigError` carries every problem found, not only the first. Each problem says *where* (the dotted
setting or the file), *what* is wrong, and *what would be right*. :func:`exit_on_config_error` turns it into one
message, no stack trace and exit code 2; of several ranks only the first one prints.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

EXIT_BAD_CONFIG = 2
"""Exit code of every process that refuses its input, as ``argparse`` uses it."""

GRACE_SECONDS = 5.0
"""How long silent ranks wait before they leave."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with the input.

    Attributes:
        where: dotted path of the setting (``moe.top_k``) or the file that is at fault.
        what: what is wrong, with the value that was given.
        allowed: what would be right.
        this_host_only: the problem may exist on one machine alone (a missing file, say), so a rank of that
            machine has to report it even when rank 0 sees nothing wrong.
    """

    where: str
    what: str
    allowed: str = ""
    this_host_only: bool = False

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" + (f"; {self.allowed}" if self.allowed else "")


class ConfigError(Exception):
    """The input cannot be run as it stands. ``problems`` lists everything that was found."""

    def __init__(self, problems: Problem | Iterable[Problem]):
        self.problems = [problems] if isinstance(problems, Problem) else list(problems)
        super().__init__(self.problems)  # as an argument, so that the error survives pickling between processes

    def __str__(self) -> str:
        return "\n".join(map(str, self.problems))


class StoppedError(Exception):
    """A run ends before its last step, by what all ranks know. Raised on all of them at once, with what to tell."""

    exit_code = 1


class DivergedError(StoppedError):
    """The loss is beyond help."""


def raise_if(problems: list[Problem]) -> None:
    """Raise :class:`ConfigError` with all of ``problems`` unless there are none."""
    if problems:
        raise ConfigError(problems)


def format_problems(problems: list[Problem], host: str | None = None) -> str:
    """The message a user reads: a count, then one line a problem."""
    noun = "problem" if len(problems) == 1 else "problems"
    on_host = f" on host {host}" if host else ""
    return "\n".join([f"error: {len(problems)} {noun} with the settings{on_host}", *(f"  - {p}" for p in problems)])


@contextlib.contextmanager
def exit_on_config_error() -> Iterator[None]:
    """Turn a :class:`ConfigError` into one message on stderr and exit code 2, on every rank.

    Ranks read the same settings, so rank 0 speaks for all of them. Problems that belong to one host are
    printed by the first rank of each host that has them, with the host's name.
    """
    try:
        yield
    except ConfigError as error:
        if _env_int("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK") == 0:
            print(format_problems(error.problems), file=sys.stderr, flush=True)
        else:
            local = [p for p in error.problems if p.this_host_only]
            if local and _env_int("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK") == 0:
                print(format_problems(local, socket.gethostname()), file=sys.stderr, flush=True)
            # A launcher kills all ranks as soon as one has left; give the one that speaks the time to do so.
            time.sleep(GRACE_SECONDS)
        raise SystemExit(EXIT_BAD_CONFIG) from None


def _env_int(*names: str) -> int:
    """The first of the environment variables that is set, as a number; 0 outside a launcher."""
    for name in names:
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name])
    return 0
