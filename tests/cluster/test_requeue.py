"""The batch script for Slurm: a run that is asked to stop saves, queues again, and ends as if it had not stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cluster.slurm import Slurm
from tests.curves import Runs
from tests.ranks import REPO

pytestmark = pytest.mark.cluster

SCRIPT = "recipes/slurm/train.sbatch"
RECIPE = "recipes/lm_16l.py"
STEPS = 60
# sbatch's own options win over those in the script; the hosts of this cluster have no GPU.
SIZE = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--time=60")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


def flags(runs: Runs, name: str) -> list[str]:
    extra = ("--moe.ep_size", "2", "--max_steps", str(STEPS))
    return runs.argv(name, 2, stage=3, ds=("gradient_accumulation_steps=1",), extra=extra)


def steps_of(run: Path) -> int:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines[:-1]), default=0)


def test_a_preempted_job_is_queued_again_and_ends_as_if_uninterrupted(slurm: Slurm, runs: Runs, tmp_path: Path) -> None:
    whole = slurm.submit(f"srun python {RECIPE} {' '.join(flags(runs, 'whole'))}", *SIZE[:2], timeout=200).check()
    assert "held-out loss" in whole.output

    run, log = runs.folder / "requeued", tmp_path / "job.log"
    job = slurm.queue(SCRIPT, RECIPE, *flags(runs, "requeued"), options=SIZE, log=log)
    slurm.wait_for(lambda: steps_of(run) >= 5, job, log, 120)
    slurm.controller.run(["scancel", "--batch", "--signal=USR1", job]).check()
    slurm.wait_for(lambda: "goes back into the queue" in log.read_text(), job, log, 60)
    stopped_at = steps_of(run)
    assert stopped_at < STEPS, "it was stopped in the middle"
    assert (run / "checkpoints" / "latest").exists()
    slurm.wait_for(lambda: slurm.state(job) == "PENDING", job, log, 60)
    slurm.start_again(job)
    slurm.wait_for(lambda: slurm.state(job) == "COMPLETED", job, log, 200)
    assert "continuing from" in log.read_text()
    assert runs.curve("requeued") == runs.curve("whole")


def test_without_a_recipe_it_says_how_to_use_it(slurm: Slurm, tmp_path: Path) -> None:
    log = tmp_path / "usage.log"
    argv = ["sbatch", "--wait", f"--chdir={REPO}", f"--output={log}", *SIZE, SCRIPT]
    assert slurm.controller.run(argv, timeout=60).returncode == 2
    assert "usage: sbatch" in log.read_text()
