"""A node that is lost ends its job soon, with its name told, and the job goes on with the nodes that are left."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import Cluster, reason_to_skip
from tests.cluster.slurm import TOOLS, Slurm
from tests.curves import CharacterRuns, assert_same

pytestmark = pytest.mark.cluster

SCRIPT = "recipes/slurm/train.sbatch"
RECIPE = "recipes/lm_16l.py"
FOR_EVER = 100_000
# One node is enough, and two are better.
SIZE = ("--nodes=1-2", "--gpus-per-node=0", "--time=60")
RANKS = {"MOE_SCALE_RANKS_PER_NODE": "2"}
MINUTES = 2
TOLERANCE = 1e-4


@pytest.fixture
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A Slurm for each test: what is lost here does not come back."""
    if reason := reason_to_skip(TOOLS):
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("cluster")) as hosts:
        yield Slurm(hosts)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> CharacterRuns:
    return CharacterRuns(tmp_path_factory.mktemp("runs"))


def flags(runs: CharacterRuns, name: str) -> list[str]:
    """The same sequences a step for any number of ranks; experts are spread over those of a node."""
    length = ("--max_steps", str(FOR_EVER), "--optim.schedule", "constant")
    extra = (*length, "--checkpoint.every", "10", "--moe.ep_size", "0")
    argv = runs.argv(name, 1, stage=3, extra=extra)
    argv[argv.index("gradient_accumulation_steps=4")] = "train_batch_size=8"
    return argv


def steps_of(run: Path) -> int:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines[:-1]), default=0)


def begin(slurm: Slurm, runs: CharacterRuns, name: str, log: Path) -> str:
    """A job on both nodes, past its first checkpoint."""
    job = slurm.queue(SCRIPT, RECIPE, *flags(runs, name), options=SIZE, log=log, env=RANKS)
    slurm.wait_for(lambda: steps_of(runs.folder / name) >= 15, job, log, 120)
    assert "4 x " in log.read_text(), "it runs on two nodes"
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
    assert "Node failure on n2" in log.read_text() or re.search("lost rank [23] on n2", log.read_text())


def test_a_dead_daemon_ends_the_job_which_goes_on_with_what_is_left(
    slurm: Slurm, runs: CharacterRuns, tmp_path: Path
) -> None:
    log, run = tmp_path / "job.log", runs.folder / "lost"
    job = begin(slurm, runs, "lost", log)
    slurm.cluster.hosts[1].run(["pkill", "-KILL", "-x", "slurmd"]).check()
    wait_for_the_end(slurm, job, log)
    assert "Node failure on n2" in log.read_text() or re.search("lost rank [23] on n2", log.read_text())
    slurm.wait_for(lambda: slurm.state(job) == "PENDING", job, log, 60)
    before = runs.curve("lost")
    for newer in sorted((run / "checkpoints").glob("step_*"))[-2:]:  # the last may be of this very end
        shutil.rmtree(newer)  # so that at least ten steps of both nodes are trained again by one
    slurm.start_again(job)
    slurm.wait_for(lambda: "continuing from" in log.read_text(), job, log, 120)
    (began,) = map(int, re.findall(r"continuing from \S+/step_(\d+)", log.read_text()))
    slurm.wait_for(lambda: steps_of(run) >= began + 10, job, log, 120)
    slurm.controller.run(["scancel", job]).check()
    assert "2 x " in log.read_text(), "it went on with one node"
    again = runs.curve("lost")[began : began + 10]
    assert_same({"on one node": again}, before[began : began + 10], TOLERANCE, grad_norm=1e-2)
