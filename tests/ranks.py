"""Start real ranks: processes with a rendezvous on the loopback interface, a timeout, and their output on failure."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Ended:
    """How the ranks of a job ended: exit codes (negative: of a signal; None: killed after the timeout) and output."""

    codes: list[int | None]
    output: list[str]

    def told(self, rank: int) -> list[str]:
        """The lines of a rank, from the one on that names the run, but for its progress and notes."""
        lines = self.output[rank].splitlines()
        begun = next((number for number, line in enumerate(lines) if line.startswith("lm_16l at ")), -1)
        usual = ("step ", "note: ", "continuing from ", "this CPU multiplies bf16 ")
        return [line for line in lines[begun + 1 :] if line and not line.startswith(usual)]

    def __str__(self) -> str:
        return f"{self.codes}" + "".join(f"\n--- rank {n}\n{text[-4000:]}" for n, text in enumerate(self.output))


class Ranks:
    """``python <arguments>`` as ``num_ranks`` ranks, without a launcher: nothing ends them but themselves.

    A context manager, which kills what is left at its end.
    """

    def __init__(self, num_ranks: int, arguments: Sequence[str]):
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PMI"))}
        environ |= {
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_WORLD_SIZE": str(num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(REPO),
            "PYTHONUNBUFFERED": "1",
        }
        self._folder = tempfile.TemporaryDirectory()
        self._logs = [Path(self._folder.name) / f"rank_{rank}.log" for rank in range(num_ranks)]
        self.processes = []
        for rank, log in enumerate(self._logs):
            with log.open("w") as out:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, *arguments],
                        cwd=REPO,
                        stdout=out,
                        stderr=subprocess.STDOUT,
                        env=environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                        start_new_session=True,
                    )
                )

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._folder.cleanup()

    def kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def output(self, rank: int) -> str:
        return self._logs[rank].read_text(errors="replace")

    def wait(self, timeout: float) -> Ended:
        """Until all have ended by themselves, or the timeout."""
        deadline = time.monotonic() + timeout
        while any(p.poll() is None for p in self.processes) and time.monotonic() < deadline:
            time.sleep(0.05)
        return Ended([p.poll() for p in self.processes], [self.output(rank) for rank in range(len(self._logs))])


def run_ranks(num_ranks: int, arguments: Sequence[str], *, timeout: float = 240.0) -> str:
    """Run ``python <arguments>`` as ``num_ranks`` ranks. Returns rank 0's output.

    Raises:
        AssertionError: when a rank fails or the timeout passes, with the output of every rank.
    """
    with Ranks(num_ranks, arguments) as ranks:
        verdict = _wait(ranks.processes, timeout)
        output = [ranks.output(rank) for rank in range(num_ranks)]
    assert verdict == "", verdict + "".join(f"\n--- rank {n}\n{text[-4000:]}" for n, text in enumerate(output))
    return output[0]


def _wait(processes: list[subprocess.Popen], timeout: float) -> str:
    """Empty when all ranks end well; else what went wrong, with every rank killed."""
    deadline = time.monotonic() + timeout
    verdict = ""
    while any(p.poll() is None for p in processes):
        failed = [n for n, p in enumerate(processes) if p.returncode not in (None, 0)]
        if failed or time.monotonic() > deadline:
            verdict = f"rank {failed[0]} failed" if failed else f"a hang: still running after {timeout:.0f} s"
            break
        time.sleep(0.05)
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if not verdict:
        verdict = "".join(f"rank {n} ended with {p.returncode} " for n, p in enumerate(processes) if p.returncode)
    return verdict
