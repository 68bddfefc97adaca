"""Signals to a launcher, as a cluster sends them: the run saves, ends, and continues to the bit.

What the launchers make of a run that has saved and left with exit code 75:

- ``deepspeed`` on one host is two processes. The one in front, which a user starts, dies of a SIGTERM (-15) and passes
  nothing on: the run goes on without it. The one behind, ``deepspeed.launcher.launch``, signals the ranks, gives each
  30 seconds before it kills it, and returns 1. A signal to the whole process group reaches both.
- When the ranks leave by themselves, because one of them was signalled or the time was up, ``deepspeed`` returns 75.
- ``torchrun`` returns 1 for every failure.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from moe_scale.train.faults import EXIT_PREEMPTED
from tests.curves import Runs
from tests.distributed.faulty import case, run_cases
from tests.ranks import free_port
from tests.recipes.test_launchers import Launch

pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent
RECIPE = "recipes/lm_16l.py"
DEEPSPEED = ("deepspeed", "--num_accelerators")
TORCHRUN = ("torchrun", "--nproc_per_node")
STEPS = 30


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("preemption"))


def command(runs: Runs, name: str, launcher: tuple[str, str], *extra: str) -> list[str]:
    start = [str(BIN / launcher[0]), launcher[1], "2", "--master_port", str(free_port())]
    settings = ("--moe.ep_size", "2", "--data.num_workers", "2", "--max_steps", str(STEPS), "--resume", "auto")
    return [*start, RECIPE, *runs.argv(name, 2, stage=3, extra=(*settings, *extra))]


def ranks_of(launch: Launch) -> list[psutil.Process]:
    """The training processes, in the order of their ranks."""
    found = [p for p in launch.alive() if p.environ().get("RANK", "").isdecimal() and RECIPE in p.cmdline()]
    return sorted(found, key=lambda process: int(process.environ()["RANK"]))


def stop(runs: Runs, name: str, launcher: tuple[str, str], send: Callable[[Launch], None]) -> tuple[int | None, str]:
    """Start a run, send a signal in its middle, and wait until nothing of it is left. Its exit code and output."""
    metrics = runs.folder / name / "metrics.jsonl"
    with Launch(command(runs, name, launcher), runs.folder / f"{name}.log") as launch:
        code = launch.wait(until=lambda: metrics.exists() and metrics.read_text().count("\n") >= 3)
        assert code is None, launch.output()
        send(launch)
        code = launch.wait()
        launch.assert_nothing_left(seconds=60.0)
        return code, launch.output()


def to_the_front_then_behind(launch: Launch) -> None:
    launch.process.send_signal(signal.SIGTERM)
    launch.process.wait(timeout=30)
    time.sleep(1.0)
    assert len(ranks_of(launch)) == 2, "nothing is passed on"
    (behind,) = [process for process in launch.alive() if "deepspeed.launcher.launch" in process.cmdline()]
    behind.terminate()


def to_rank_1(launch: Launch) -> None:
    ranks_of(launch)[1].send_signal(signal.SIGUSR1)


CASES = {
    "deepspeed": (DEEPSPEED, to_the_front_then_behind, -signal.SIGTERM),
    "one-rank": (DEEPSPEED, to_rank_1, EXIT_PREEMPTED),
    "torchrun": (TORCHRUN, to_rank_1, 1),
}


@pytest.mark.parametrize(
    "names",
    [("deepspeed",), pytest.param(("one-rank", "torchrun"), marks=pytest.mark.long)],
    ids=["deepspeed", "the rest"],
)
@pytest.mark.timeout(600)
def test_signals_to_launchers(names: tuple[str, ...], runs: Runs) -> None:
    cases = {name: CASES[name] for name in names}
    for name, (launcher, send, expected) in cases.items():
        code, output = stop(runs, name, launcher, send)
        assert code == expected, f"{name}\n{output}"
        done = len(runs.curve(name))
        assert f"stopped and saved after step {done}; --resume auto continues" in output, f"{name}\n{output}"
        assert (runs.folder / name / "checkpoints" / f"step_{done:08d}").is_dir(), name
        assert done < STEPS, name
    flags = ("--moe.ep_size", "2", "--max_steps", str(STEPS), "--resume", "auto")
    again = {name: case(runs.argv(name, 2, stage=3, extra=flags)) for name in (f"whole-{names[0]}", *cases)}
    ends, _ = run_cases(runs, again, f"again-{names[0]}")
    assert all(end["outcome"] == "" for both in ends.values() for end in both), ends
    whole = runs.curve(f"whole-{names[0]}")
    assert len(whole) == STEPS
    for name in cases:
        assert runs.curve(name) == whole, name


def test_a_rank_that_is_killed_under_deepspeed(runs: Runs) -> None:
    start = 0.0

    def kill(launch: Launch) -> None:
        nonlocal start
        ranks_of(launch)[1].kill()
        start = time.monotonic()

    code, output = stop(runs, "killed", DEEPSPEED, kill)
    assert code not in (0, None), output
    assert time.monotonic() - start < 60
    assert "Traceback" not in output, output
    assert sum(line.startswith("error: lost rank 1 on ") for line in output.splitlines()) == 1, output
