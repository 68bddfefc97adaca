"""``moe-scale launch`` on real hosts: what it prints runs as printed, and Slurm takes the batch scripts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_scale import cli
from tests.cluster.hosts import Cluster, Command, Host, reason_to_skip
from tests.cluster.slurm import Slurm
from tests.curves import CharacterRuns, Runs, assert_same
from tests.ranks import REPO, run_ranks

pytestmark = pytest.mark.cluster

RECIPE = "recipes/lm_16l.py"
STEPS = 6
TOLERANCE = 1e-4
SCRIPTS = sorted((REPO / "recipes" / "slurm").glob("*.sbatch"))
LAUNCH = ["python", "-m", "moe_scale.cli", "launch", RECIPE]


class Launches(CharacterRuns):
    """Settings of the recipe, and a check of the curves that they leave."""

    def settings(self, name: str, world_size: int, *extra: str) -> list[str]:
        extra = ("--max_steps", str(STEPS), "--moe.ep_size", str(world_size), *extra)
        return self.argv(name, world_size, stage=3, extra=extra)

    def check(self, *names: str) -> None:
        assert_same({name: self.curve(name) for name in names}, self.curve("one_process"), TOLERANCE)


@pytest.fixture(scope="module")
def four_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := reason_to_skip():
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("cluster"), 4) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def runs(four_hosts: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    runs = Launches(tmp_path_factory.mktemp("runs"))
    run_ranks(1, [RECIPE, *runs.settings("one_process", 1)], timeout=120)
    assert len(runs.curve("one_process")) == STEPS
    return runs


def hostfile(folder: Path, *slots: int) -> list[str]:
    path = folder / f"hosts-{'-'.join(map(str, slots))}"
    path.write_text("# of this test\n" + "".join(f"n{n}  slots={number}\n" for n, number in enumerate(slots, 1)))
    return ["--hostfile", str(path)]


def by_host(printed: str) -> dict[str, str]:
    """The command that is printed for each host."""
    return dict(re.findall(r"^# on (\w+),.*\n(.*)$", printed, flags=re.MULTILINE))


def type_in(host: Host, command: str) -> Command:
    return host.start(["bash", "-c", command])


def test_four_hosts_by_deepspeed(four_hosts: Cluster, runs: Launches, tmp_path: Path) -> None:
    """One rank and one expert on each; nobody writes the file of variables that pdsh has to carry."""
    argv = [*LAUNCH, *hostfile(tmp_path, 1, 1, 1, 1), "--interface", "eth0", "--run"]
    output = four_hosts.hosts[1].run([*argv, *runs.settings("four", 4)], timeout=150).check().output
    assert sorted(set(re.findall(r"^(n\d): .*spawned with command", output, re.MULTILINE))) == ["n1", "n2", "n3", "n4"]
    assert "ep_size 4; ZeRO-3" in output
    runs.check("four")


def test_two_hosts_by_openmpi(four_hosts: Cluster, runs: Launches, tmp_path: Path) -> None:
    if reason := reason_to_skip(("mpirun=openmpi-bin",)):
        pytest.skip(reason)
    flags = [*hostfile(tmp_path, 1, 1), "--launcher", "deepspeed-openmpi", "--interface", "eth0", "--run"]
    four_hosts.hosts[0].run([*LAUNCH, *flags, *runs.settings("openmpi", 2)], timeout=150).check()
    runs.check("openmpi")


def test_commands_of_torchrun_and_accelerate_as_printed(
    four_hosts: Cluster, runs: Launches, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Hosts of two sizes by torchrun, of one by accelerate: each host gets the line that is printed for it."""
    two = four_hosts.hosts[:2]
    for launcher, slots in (("torchrun", (3, 1)), ("accelerate", (1, 1))):
        settings = runs.settings(launcher, sum(slots))
        how = [*hostfile(tmp_path, *slots), "--launcher", launcher, "--interface", "eth0", "--device", "cpu"]
        cli.main(["launch", RECIPE, *how, *settings])
        lines = by_host(capsys.readouterr().out)
        assert list(lines) == ["n1", "n2"]
        for command in [type_in(host, lines[host.name]) for host in two]:
            command.wait(150).check()
        runs.check(launcher)


def test_a_wrong_setting_starts_nothing(four_hosts: Cluster, runs: Launches, tmp_path: Path) -> None:
    argv = [*LAUNCH, *hostfile(tmp_path, 1, 1), "--run", *runs.settings("wrong", 3)]
    result = four_hosts.hosts[0].run(argv, timeout=60)
    assert result.returncode == 2
    assert "does not divide the 2 ranks of this run" in result.output
    assert not (runs.folder / "wrong").exists()


def test_batch_scripts_pass_slurms_own_test(slurm: Slurm) -> None:
    assert SCRIPTS
    for script in SCRIPTS:
        # As it stands but for the size of this cluster: two nodes, of a processor for each of 8 tasks.
        sizes = ["--nodes=1-2", *(["--cpus-per-task=1"] if "--cpus-per-task" in script.read_text() else [])]
        argv = ["sbatch", "--test-only", *sizes, str(script), RECIPE, "recipes/slurm/sweep.txt"]
        result = slurm.controller.run(argv).check()
        assert re.search(r"Job \d+ to start at .* using \d+ processors on nodes n", result.output), result.output


def test_the_job_of_launch_passes_slurms_own_test(slurm: Slurm, capsys: pytest.CaptureFixture[str]) -> None:
    """On a CPU its option wins over the script's GPUs; and it may run on fewer nodes."""
    for device, scale in (("cpu", "cpu"), ("gpu", "multinode")):
        how = ["--slurm", "--nodes", "1-2", "--ranks_per_node", "4", "--device", device, "--scale", scale]
        cli.main(["launch", RECIPE, *how])
        command = capsys.readouterr().out.splitlines()[-1]
        assert "sbatch --nodes=1-2 " in command
        tested = type_in(slurm.controller, command.replace("sbatch ", "sbatch --test-only ")).wait(30).check()
        assert re.search(r"Job \d+ to start at .* on nodes n", tested.output), tested.output


def test_slurm_by_launch(slurm: Slurm, runs: Launches, tmp_path: Path) -> None:
    """Inside a job it starts a step; outside it submits the script that says what is to be started."""
    size = ["--slurm", "--nodes", "2", "--ranks_per_node", "1"]
    inside = " ".join([*LAUNCH, *size, "--run", *runs.settings("step", 2)])
    slurm.submit(inside, "--nodes=2", "--ntasks-per-node=1", timeout=150).check()
    runs.check("step")
    outside = [*LAUNCH, *size, "--time", "5", "--run", *runs.settings("job", 2, "--optim.nonsense", "1")]
    refused = slurm.controller.run(outside, timeout=60)
    assert refused.returncode == 2
    assert "optim.nonsense" in refused.output
