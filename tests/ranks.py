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
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(num_ranks: int, arguments: Sequence[str], *, timeout: float = 240.0) -> str:
    """Run ``python <arguments>`` as ``num_ranks`` ranks. Returns rank 0's output.

    Raises:
        AssertionError: when a rank fails or the timeout passes, with the output of every rank.
    """
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
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"rank_{rank}.log" for rank in range(num_ranks)]
        processes = []
        for rank, log in enumerate(logs):
            with log.open("w") as out:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, *arguments],
                        cwd=REPO,
                        stdout=out,
                        stderr=subprocess.STDOUT,
                        env=environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                        start_new_session=True,
                    )
                )
        verdict = _wait(processes, timeout)
        output = [log.read_text(errors="replace") for log in logs]
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
