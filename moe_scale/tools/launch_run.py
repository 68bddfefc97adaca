"""Start a launcher, hand on the signals that ask a run to stop, and leave with its exit code."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import psutil

from moe_scale.errors import ConfigError, Problem
from moe_scale.tools.launch_commands import Command
from moe_scale.tools.launch_environment import search_path

ASKING = (signal.SIGTERM, signal.SIGUSR1)
"""Signals that ask a run to save and stop."""


def start(command: Command, recipe: Path) -> NoReturn:
    """Run the command, and leave with its exit code; 128 and the signal's number if one ended it.

    Raises:
        ConfigError: if the launcher is not installed.
        SystemExit: always.
    """
    name = command.argv[0]
    path = search_path()  # of the ranks, too: srun looks for python there
    found = shutil.which(name, path=path)
    if not found:
        raise ConfigError(Problem("--run", f"{name} is not on PATH", "install it, or choose another --launcher"))
    with _environment_file(command) as environ:
        environ = {**os.environ, "PATH": path, **command.environ, **environ}
        process = subprocess.Popen([found, *command.argv[1:]], env=environ)
        with _handing_on(process, recipe):
            code = process.wait()
    raise SystemExit(code if code >= 0 else 128 - code)


@contextlib.contextmanager
def _environment_file(command: Command) -> Iterator[dict[str, str]]:
    """What tells DeepSpeed of the file with the variables for other hosts.

    The file can be read by this user alone, and is there until the run ends.
    """
    if not command.carried:
        yield {}
        return
    with tempfile.NamedTemporaryFile("w", prefix="deepspeed_env.") as file:
        file.write(command.carried.text())
        file.flush()
        yield {"DS_ENV_FILE": file.name}


@contextlib.contextmanager
def _handing_on(process: subprocess.Popen, recipe: Path) -> Iterator[None]:
    """Give signals to the ranks of this host, where there are any, so that each saves and leaves by itself.

    The launchers in between make another of it: the one of ``deepspeed`` passes nothing on, and ``torchrun`` kills what
    has not left after 30 seconds. Ranks of other hosts hear it by their launcher, which is told to end (srun: by the
    signal itself). A Ctrl-C reaches all processes of the terminal without this one's help.
    """

    def hand_on(number: int, _: object) -> None:
        ranks = ranks_below(process.pid, recipe)
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.send_signal(number)
        if not ranks:
            passes_it_on = Path(str(process.args[0])).name == "srun"  # type: ignore[index]
            process.send_signal(number if passes_it_on else signal.SIGTERM)

    before = {number: signal.signal(number, hand_on) for number in ASKING}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ranks_below(pid: int, recipe: Path) -> list[psutil.Process]:
    """The processes below a launcher that run the recipe and have a rank; not what they have started themselves."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                is_recipe = str(recipe) in process.cmdline()[1:3]  # python [-u] RECIPE
                parent = process.parent()
                if is_recipe and "RANK" in process.environ() and parent and str(recipe) not in parent.cmdline()[1:3]:
                    found.append(process)
    return found
