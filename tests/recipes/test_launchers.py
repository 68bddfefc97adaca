"""The commands of the README, as a user types them: each launcher starts the same run, and none leaves anything behind.

``tests/cluster`` does the same with several hosts.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from tests.curves import Curve, Runs, assert_same
from tests.ranks import REPO, free_port

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
RECIPE = "recipes/lm_16l.py"
STEPS = 8
TIMEOUT = 120.0

MARK = "MOE_SCALE_TEST_LAUNCH"
"""An environment variable that everything a command starts inherits, by which it is found."""

DEEPSPEED_REMARKS = (
    r".*\[WARNING\] \[real_accelerator\.py:.* Setting accelerator to CPU\..*",
    r".*\[WARNING\] \[runner\.py:.* Unable to find hostfile, will proceed with training with local resources only\.",
)
"""What DeepSpeed's launcher says by itself, before a recipe can have a say."""


class Launch:
    """A command, started from the checkout's folder as from a shell. Kills all of it when the block ends."""

    def __init__(self, argv: list[str], log: Path):
        self.mark = uuid.uuid4().hex
        self.log = log
        launchers = ("SLURM_", "PMI", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "TORCHELASTIC")
        environ = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
        environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), "PYTHONUNBUFFERED": "1", MARK: self.mark}
        if torch.cuda.is_available():
            environ["DS_ACCELERATOR"] = "cpu"
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                argv, cwd=REPO, stdout=out, stderr=subprocess.STDOUT, env=environ, start_new_session=True
            )

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *exc: object) -> None:
        for process in self.alive():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, until: Callable[[], bool] | None = None) -> int | None:
        """Wait for the end, or for ``until``. Returns the exit code, None while the command runs."""
        deadline = time.monotonic() + TIMEOUT
        while self.process.poll() is None and not (until and until()):
            assert time.monotonic() < deadline, f"still running after {TIMEOUT:.0f} s\n{self.output()}"
            time.sleep(0.05)
        return self.process.returncode

    def alive(self) -> list[psutil.Process]:
        """The command and all that it started, as far as they live."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == self.mark:
                    found.append(process)
        return found

    def assert_nothing_left(self, seconds: float = 5.0) -> None:
        deadline = time.monotonic() + seconds
        while (alive := self.alive()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not alive, [process.cmdline() for process in alive]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


def flags(runs: Runs, name: str, world_size: int, *extra: str, steps: int = STEPS) -> list[str]:
    return [RECIPE, *runs.argv(name, world_size, stage=3, extra=("--max_steps", str(steps), *extra))]


def train(runs: Runs, name: str, argv: list[str]) -> Curve:
    """Run a command to its end: it succeeds, prints no noise and leaves no process."""
    with Launch(argv, runs.folder / f"{name}.log") as launch:
        code = launch.wait()
        printed = launch.output()
        assert code == 0, printed
        launch.assert_nothing_left()
    lines = [line for line in printed.splitlines() if not any(re.fullmatch(r, line) for r in DEEPSPEED_REMARKS)]
    noise = [line for line in lines if re.search(r"warning|traceback|error", line, re.IGNORECASE)]
    assert not noise, printed
    for said in ("held-out loss", "run folder"):
        assert sum(line.startswith(said) for line in lines) == 1, f"one rank, not several, tells the {said}\n{printed}"
    return runs.curve(name)


@pytest.fixture(scope="module")
def one_process(runs: Runs) -> Curve:
    """``python recipes/lm_16l.py``, beside a job that has the port which all launchers take when none is given."""
    with socket.socket() as other:
        with contextlib.suppress(OSError):  # something else has it: as good
            other.bind(("127.0.0.1", 29500))
            other.listen()
        curve = train(runs, "python", [sys.executable, *flags(runs, "python", 1)])
    assert len(curve) == STEPS
    assert curve[0][0] > curve[-1][0], "the model must learn something for its curve to say something"
    return curve


def test_deepspeed(runs: Runs, one_process: Curve) -> None:
    launcher = [str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", str(free_port())]
    curve = train(runs, "deepspeed", [*launcher, *flags(runs, "deepspeed", 2, "--moe.ep_size", "2")])
    assert_same({"deepspeed": curve}, one_process, loss=1e-4)


def test_torchrun(runs: Runs, one_process: Curve) -> None:
    launcher = [str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", str(free_port())]
    curve = train(runs, "torchrun", [*launcher, *flags(runs, "torchrun", 2)])
    assert_same({"torchrun": curve}, one_process, loss=1e-4)


def test_an_interrupt_stops_all_ranks(runs: Runs) -> None:
    """Ctrl-C on ``deepspeed``, in the middle of a run: a terminal sends it to the launcher and all ranks at once."""
    metrics = runs.folder / "interrupted" / "metrics.jsonl"
    launcher = [str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", str(free_port())]
    argv = [*launcher, *flags(runs, "interrupted", 2, steps=100_000)]
    with Launch(argv, runs.folder / "interrupted.log") as launch:
        code = launch.wait(until=lambda: metrics.exists() and metrics.read_text().count("\n") >= 2)
        assert code is None, launch.output()
        assert len(launch.alive()) >= 4, "deepspeed, its launcher on this host, and two ranks"
        os.killpg(launch.process.pid, signal.SIGINT)
        assert launch.wait() != 0
        launch.assert_nothing_left(seconds=20.0)
