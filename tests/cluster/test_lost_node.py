"""A node that is lost ends its job soon, with its name told, and the job goes on with the nodes that are left."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.cluster.slurm import Slurm
from tests.curves import CharacterRuns, assert_same
from tests.ranks import run_ranks

pytestmark = pytest.mark.cluster

SCRIPT = "recipes/slurm/train.sbatch"
RECIPE = "recipes/lm_16l.py"
STEPS = 200
# One node is enough, and two are better.
SIZE = ("--nodes=1-2", "--ntasks-per-node=1", "--gpus-per-node=0", "--time=60")
MINUTES = 2
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> CharacterRuns:
    return CharacterRuns(tmp_path_factory.mktemp("runs"))


def flags(runs: CharacterRuns, name: str) -> list[str]:
    """The same sequences a step for any number of ranks."""
    steps = ("--max_steps", str(STEPS), "--checkpoint.every", "10", "--moe.ep_size", "0")
    argv = runs.argv(name, 1, stage=3, extra=steps)
    argv[argv.index("gradient_accumulation_steps=4")] = "train_batch_size=8"
    return argv


def steps_of(run: Path) -> int:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines[:-1]), default=0)


def begin(slurm: Slurm, runs: CharacterRuns, name: str, log: Path) -> str:
    """A job on both nodes, past its first checkpoint."""
    job = slurm.queue(SCRIPT, RECIPE, *flags(runs, name), options=SIZE, log=log)
    slurm.wait_for(lambda: steps_of(runs.folder / name) >= 15, job, log, 120)
    assert "2 x " in log.read_text(), "it runs on two nodes"
    return job


def wait_for_the_end(slurm: Slurm, job: str, log: Path) -> None:
    """Until the job has left its nodes; the time that it may take is the claim."""
    begun = time.monotonic()
    slurm.wait_for(lambda: slurm.state(job) != "RUNNING", job, log, 60 * MINUTES)
    print(f"ended after {time.monotonic() - begun:.0f} s\n{log.read_text()}")


def test_a_cut_link_ends_the_job_and_names_the_host(slurm: Slurm, runs: CharacterRuns, tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    job = begin(slurm, runs, "cut", log)
    slurm.cluster.hosts[1].ip("link set eth0 down")
    wait_for_the_end(slurm, job, log)
    slurm.controller.run(["scancel", job]).check()
    assert "lost rank 1 on n2" in log.read_text() or "Node failure on n2" in log.read_text()
    slurm.cluster.hosts[1].ip("link set eth0 up")
    slurm.wait_for_nodes(60)


def test_a_dead_daemon_ends_the_job_which_goes_on_with_what_is_left(
    slurm: Slurm, runs: CharacterRuns, tmp_path: Path
) -> None:
    run_ranks(1, [RECIPE, *flags(runs, "whole")], timeout=120)
    log, run = tmp_path / "job.log", runs.folder / "lost"
    job = begin(slurm, runs, "lost", log)
    slurm.cluster.hosts[1].run(["pkill", "-KILL", "-x", "slurmd"]).check()
    wait_for_the_end(slurm, job, log)
    assert "n2" in log.read_text()
    assert steps_of(run) < STEPS, "it was ended in the middle"
    slurm.wait_for(lambda: slurm.state(job) == "PENDING", job, log, 60)
    slurm.start_again(job)
    slurm.wait_for(lambda: slurm.state(job) == "COMPLETED", job, log, 200)
    assert "1 x " in log.read_text(), "it went on with one node"
    assert_same({"lost": runs.curve("lost")}, runs.curve("whole"), TOLERANCE, grad_norm=1e-2)
