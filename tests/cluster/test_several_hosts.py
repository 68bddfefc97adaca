"""The launchers for several hosts start one run: the curve of one process, whoever started the ranks and where."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from tests.cluster.hosts import Cluster, reason_to_skip
from tests.cluster.slurm import Slurm
from tests.curves import Curve, Runs, assert_same
from tests.ranks import run_ranks

pytestmark = pytest.mark.cluster

RECIPE = "recipes/lm_16l.py"
STEPS = 8
TOLERANCE = 1e-4
EXPERT_PARALLEL = ("--moe.ep_size", "2")


class Launches(Runs):
    """Command lines of the recipe, and a check of the curves that they leave."""

    def flags(self, name: str, world_size: int, *extra: str) -> list[str]:
        return self.argv(name, world_size, stage=3, extra=("--max_steps", str(STEPS), *extra))

    def check(self, name: str) -> None:
        assert_same({name: self.curve(name)}, self.one_process, TOLERANCE)

    one_process: Curve


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Launches:
    if reason := reason_to_skip():
        pytest.skip(reason)
    runs = Launches(tmp_path_factory.mktemp("runs"))
    run_ranks(1, [RECIPE, *runs.flags("one_process", 1)], timeout=120)
    runs.one_process = runs.curve("one_process")
    assert len(runs.one_process) == STEPS
    return runs


def assert_clean(output: str) -> None:
    noise = [line for line in output.splitlines() if re.search(r"warning|traceback|error", line, re.IGNORECASE)]
    assert not noise, output
    assert output.count("held-out loss") == 2, "rank 0 alone tells it: with the last step and in the summary"


def deepspeed_environment(cluster: Cluster, folder: Path) -> dict[str, str]:
    """pdsh takes no more than PYTHON* along: what the ranks need besides is in a file that DeepSpeed reads."""
    needed = ("PATH", "OMP_NUM_THREADS", "DS_ACCELERATOR")
    environment = folder / "deepspeed_env"
    environment.write_text("".join(f"{name}={cluster.environ[name]}\n" for name in needed))
    return {"DS_ENV_FILE": str(environment)}


def test_deepspeed_with_a_hostfile(cluster: Cluster, runs: Launches, tmp_path: Path) -> None:
    environment = deepspeed_environment(cluster, tmp_path)
    flags = runs.flags("deepspeed", 2, *EXPERT_PARALLEL)
    argv = ["deepspeed", "--hostfile", str(cluster.hostfile()), RECIPE, *flags]
    output = cluster.hosts[0].run(argv, environment, timeout=120).check().output
    runs.check("deepspeed")
    assert_clean(output)
    started = [line for line in output.splitlines() if "spawned with command" in line]
    assert sorted(line.split(":")[0] for line in started) == ["n1", "n2"], "one rank on each host"


def test_the_doctor_by_a_hostfile(cluster: Cluster, runs: Launches, tmp_path: Path) -> None:
    """As the README starts it."""
    environment = deepspeed_environment(cluster, tmp_path)
    flags = runs.flags("doctor", 2, *EXPERT_PARALLEL)
    argv = ["deepspeed", "--hostfile", str(cluster.hostfile()), "--module", "moe_scale.cli", "doctor", RECIPE, *flags]
    output = cluster.hosts[0].run(argv, environment, timeout=120).check().output
    assert output.count("all 2 ranks are ready for lm_16l at scale cpu") == 1, output
    assert "expert" in output


def test_torchrun_with_a_rendezvous(cluster: Cluster, runs: Launches, tmp_path: Path) -> None:
    """What the ranks print is read from torchrun's log folder. Its own words are no measure: the agent on n1 serves the
    rendezvous and may leave first, and the other one then complains of a lost connection, after a run that succeeded.
    """
    flags = runs.flags("torchrun", 2, *EXPERT_PARALLEL)
    rendezvous = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "n1:29400", "--rdzv_id", "curve"]
    logs = ["--redirects", "3", "--log-dir", str(tmp_path)]
    argv = ["torchrun", "--nnodes", "2", "--nproc_per_node", "1", *rendezvous, *logs, RECIPE, *flags]
    commands = [host.start(argv) for host in cluster.hosts]
    for command in commands:
        command.wait(120).check()
    printed = [log.read_text() for log in tmp_path.rglob("std*.log")]
    assert len(printed) == 4, "standard output and error of two ranks"
    assert_clean("\n".join(printed))
    runs.check("torchrun")


@pytest.mark.parametrize(
    ("name", "nodes", "tasks_per_node", "extra"),
    [("two_nodes", 2, 1, EXPERT_PARALLEL), ("two_tasks_on_a_node", 1, 2, ())],
)
def test_srun(slurm: Slurm, runs: Launches, name: str, nodes: int, tasks_per_node: int, extra: tuple[str, ...]) -> None:
    """Nobody exports MASTER_ADDR or MASTER_PORT: the run finds both in what srun tells every rank."""
    size = (f"--nodes={nodes}", f"--ntasks-per-node={tasks_per_node}")
    train = shlex.join([sys.executable, RECIPE, *runs.flags(name, 2, *extra)])
    job = slurm.submit(f"srun {' '.join(size)} {train}", *size, timeout=120).check()
    assert_clean(job.output)
    runs.check(name)


def test_a_wrong_setting_is_told_once(slurm: Slurm, runs: Launches) -> None:
    train = shlex.join([sys.executable, RECIPE, *runs.flags("wrong", 2, "--moe.top_k", "9")])
    job = slurm.submit(f"srun --nodes=2 --ntasks-per-node=1 {train}", "--nodes=2", timeout=60)
    assert (job.state, job.returncode) == ("FAILED", 2), job.output
    assert job.output.count("moe.top_k: 9 > moe.num_experts = 4") == 1, job.output
    assert job.output.count("1 problem with the settings") == 1, job.output
    assert "Traceback" not in job.output
    assert not (runs.folder / "wrong").exists(), "nothing is written before the settings are right"
