"""Every hostfile, batch script and DeepSpeed JSON of the repository: it parses, it fits, and the README names it."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from deepspeed.launcher.runner import fetch_hostfile

from moe_scale.parallel.device import Device
from moe_scale.parallel.hostfile import read_hostfile
from moe_scale.parallel.launch import Launch
from moe_scale.train.recipe import prepare_job
from recipes.lm_16l import RECIPE

ROOT = Path(__file__).resolve().parents[2]
HOSTFILES = sorted((ROOT / "hostfiles").iterdir())
SCRIPTS = sorted((ROOT / "recipes" / "slurm").glob("*.sbatch"))
DS_CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))
GPU = Device("cuda", "some GPU", bf16=True, fp16=True)
CPU = Device("cpu", "some CPU", bf16=True, fp16=True)

RANKS = {"cpu": (2, 2), "1gpu": (1, 1), "1node": (8, 8), "multinode": (32, 8)}
"""Of each scale, in all and a node."""
EP_SIZES = {"zero3_multinode": 8, "zero3_multinode_ep_across": 16, "zero3_multinode_hpz": 1}
"""What a file of several nodes is for."""


def name(path: Path) -> str:
    return path.name


def test_there_are_files_to_test() -> None:
    assert [path.name for path in HOSTFILES] == ["1x8", "2x8", "4x8", "mixed"]
    assert len(SCRIPTS) >= 4
    assert len(DS_CONFIGS) >= 14


@pytest.mark.parametrize("hostfile", HOSTFILES, ids=name)
def test_hostfile(hostfile: Path) -> None:
    hosts = read_hostfile(hostfile)
    assert {host.name: host.num_ranks for host in hosts} == fetch_hostfile(str(hostfile))
    slots = [host.num_ranks for host in hosts]
    if shape := re.fullmatch(r"(\d+)x(\d+)", hostfile.name):
        assert slots == [int(shape[2])] * int(shape[1])
    else:
        assert len(set(slots)) > 1


@pytest.mark.parametrize("hostfile", HOSTFILES, ids=name)
def test_the_command_of_a_hostfile_passes_every_check(hostfile: Path, tmp_path: Path) -> None:
    commands = re.findall(rf"^#     (deepspeed --hostfile hostfiles/{hostfile.name} .*)$", hostfile.read_text(), re.M)
    assert len(commands) == 1
    recipe, *settings = shlex.split(commands[0])[3:]
    assert recipe == "recipes/lm_16l.py"
    hosts = read_hostfile(hostfile)
    for host in hosts:
        launch = Launch(0, sum(other.num_ranks for other in hosts), 0, host.num_ranks, "env")
        job = prepare_job(RECIPE, [*settings, "--output_dir", str(tmp_path / "run")], launch, GPU)
        assert job.config.scale == ("1node" if len(hosts) == 1 else "multinode")
        assert job.config.moe.ep_size == min(other.num_ranks for other in hosts), "on hosts of any size"


@pytest.mark.parametrize("file", DS_CONFIGS, ids=lambda file: file.stem)
def test_ds_config_fits_the_large_model_at_its_scale(file: Path, tmp_path: Path) -> None:
    scale = next(scale for scale in RANKS if f"_{scale}" in file.stem)
    world_size, per_node = RANKS[scale]
    launch = Launch(0, world_size, 0, per_node, "env" if world_size > 1 else "none")
    flags = ["--scale", scale, "--deepspeed_config", f"ds_configs/{file.name}", "--output_dir", str(tmp_path / "run")]
    if file.stem in EP_SIZES:
        flags += ["--moe.ep_size", str(EP_SIZES[file.stem])]
    job = prepare_job(RECIPE, flags, launch, CPU if scale == "cpu" else GPU)
    assert job.plan.json["train_batch_size"] % world_size == 0
    if scale == "multinode":
        assert job.tokens_per_step == 32 * 16 * 2048, "the files of several nodes train the same batch"


def options(script: Path) -> dict[str, str]:
    """The #SBATCH lines, which end where the commands begin."""
    found = {}
    for line in script.read_text().splitlines():
        if line.startswith("#SBATCH"):
            match = re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line)
            assert match, line
            assert match[1] not in found, line
            found[match[1]] = match[2] or ""
        elif line and not line.startswith("#"):
            break
    assert script.read_text().count("\n#SBATCH") == len(found), "Slurm reads none that comes later"
    return found


@pytest.mark.parametrize("script", SCRIPTS, ids=name)
def test_batch_script(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    found = options(script)
    if found["nodes"] == "1":
        assert found["ntasks-per-node"] == found["gpus-per-node"], "one task a GPU"
        assert int(found["cpus-per-task"]) > 2, "a rank, its loader and its saver"
    else:  # train.sh has a task for each GPU
        assert "exclusive" in found, "or a node's processors go to others"
        assert not any("ntasks" in name for name in found), "or the job could not go on with fewer nodes"
    assert {"nodes", "requeue", "time", "open-mode", "output"} <= found.keys(), "it goes on in the same log"
    assert found["signal"].startswith("B:USR1@"), "the script hands it on"
    assert ("array" in found) == ("%a" in found["output"]) == (script.stem == "sweep")
    assert f"sbatch recipes/slurm/{script.name}" in script.read_text() or "sbatch --array" in script.read_text()


@pytest.mark.parametrize("script", SCRIPTS, ids=name)
def test_batch_script_outside_of_the_checkout_says_so(script: Path, tmp_path: Path) -> None:
    done = subprocess.run(["bash", str(script), "x", "y"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "start it from the checkout" in done.stderr


FAKE_SRUN = """#!/bin/sh
for word in "$@"; do printf '%s|' "$word"; done >> "$0.log"
echo "processors: $SRUN_CPUS_PER_TASK" >&2
"""


def words_of_srun(folder: Path, script: str, *arguments: str, environ: dict[str, str]) -> tuple[int, list[str], str]:
    """Run a batch script with an ``srun`` that writes down its words."""
    fake = folder / "srun"
    fake.write_text(FAKE_SRUN)
    fake.chmod(0o755)
    done = subprocess.run(
        ["bash", str(ROOT / "recipes" / "slurm" / script), *arguments],
        cwd=ROOT,
        env={"PATH": f"{folder}:/usr/bin:/bin", "SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "4"} | environ,
        capture_output=True,
        text=True,
    )
    log = folder / "srun.log"
    return done.returncode, log.read_text().split("|")[:-1] if log.exists() else [], done.stderr


def test_a_sweep_takes_the_line_of_its_task(tmp_path: Path) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("# two runs\n\n--optim.lr 1e-3\n  # a note\n--telemetry.run_name 'a -n b' --max_steps 5\n")
    environ = {"SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "2", "SLURM_NTASKS_PER_NODE": "8"}
    argv = ("recipes/lm_16l.py", str(lines), "--max_steps", "9")
    code, words, _ = words_of_srun(tmp_path, "sweep.sbatch", *argv, environ=environ)
    assert code == 0
    size = ["--nodes=4", "--ntasks-per-node=8"]
    python = ["--kill-on-bad-exit=1", *size, "python", "recipes/lm_16l.py", "--resume", "auto"]
    common = ["--output_dir", "runs/sweep-40/2", "--max_steps", "9"]
    assert words == [*python, *common, "--telemetry.run_name", "a -n b", "--max_steps", "5"]
    for task in ({"SLURM_ARRAY_TASK_ID": "3"}, {"SLURM_ARRAY_TASK_ID": ""}):
        code, _, said = words_of_srun(tmp_path, "sweep.sbatch", *argv, environ=environ | task)
        assert code == 2
        assert ("no line of settings 3" if task["SLURM_ARRAY_TASK_ID"] else "usage: sbatch --array") in said


def test_a_sweep_keeps_empty_words_and_takes_no_notes_for_settings(tmp_path: Path) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("--max_steps 1 --telemetry.run_name ''\n--max_steps 1 # a note\n--name '#' x\n--name 'a\n")
    environ = {"SLURM_ARRAY_JOB_ID": "40"}
    argv = ("recipes/lm_16l.py", str(lines))
    tasks = {
        task: words_of_srun(tmp_path, "sweep.sbatch", *argv, environ=environ | {"SLURM_ARRAY_TASK_ID": task})
        for task in "4321"
    }
    for task, why in (("2", "a note needs a line of its own"), ("3", "a note"), ("4", "cannot read the line --name")):
        code, words, said = tasks[task]
        assert (code, words) == (2, [])
        assert why in said
    assert tasks["1"][1][-4:] == ["--max_steps", "1", "--telemetry.run_name", ""]


def test_processors_of_a_task_reach_the_ranks(tmp_path: Path) -> None:
    """srun reads SRUN_CPUS_PER_TASK alone, and Slurm sets SLURM_CPUS_PER_TASK alone."""
    for environ, said in (({"SLURM_CPUS_PER_TASK": "6"}, "processors: 6\n"), ({}, "processors: \n")):
        assert words_of_srun(tmp_path, "one_node.sbatch", environ=environ)[2] == said


def test_the_example_sweep_passes_every_check(tmp_path: Path) -> None:
    lines = (ROOT / "recipes" / "slurm" / "sweep.txt").read_text().splitlines()
    runs = [shlex.split(line) for line in lines if line and not line.startswith("#")]
    tasks = options(ROOT / "recipes" / "slurm" / "sweep.sbatch")["array"]
    assert tasks == f"1-{len(runs)}"
    for settings in runs:
        prepare_job(RECIPE, ["--output_dir", str(tmp_path / "run"), *settings], Launch(0, 8, 0, 8, "srun"), GPU)


@pytest.mark.parametrize(("script", "scale"), [("one_node.sbatch", "1node"), ("several_nodes.sbatch", "multinode")])
def test_scripts_of_lm_16l_take_settings(script: str, scale: str, tmp_path: Path) -> None:
    _, words, _ = words_of_srun(tmp_path, script, "--optim.lr", "1e-3", environ={})
    assert words[4:] == ["recipes/lm_16l.py", "--resume", "auto", "--scale", scale, "--optim.lr", "1e-3"]


@pytest.mark.parametrize(
    ("environ", "ranks"),
    [
        ({"SLURM_GPUS_ON_NODE": "8"}, 8),
        ({"SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS_PER_NODE": "4"}, 4),
        ({"SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS_PER_NODE": "4", "MOE_SCALE_RANKS_PER_NODE": "2"}, 2),
        ({}, 1),
    ],
)
def test_ranks_of_a_node(environ: dict[str, str], ranks: int, tmp_path: Path) -> None:
    """A task for each GPU, or as many as were asked for."""
    _, words, _ = words_of_srun(tmp_path, "train.sbatch", "recipes/lm_16l.py", environ=environ)
    assert words[1:4] == ["--nodes=4", f"--ntasks-per-node={ranks}", "python"]


@pytest.mark.parametrize("folder", ["hostfiles", "ds_configs", "recipes/slurm"])
def test_the_readme_names_every_file(folder: str) -> None:
    readme = (ROOT / "README.md").read_text()
    for path in (ROOT / folder).iterdir():
        assert f"`{path.stem if folder == 'ds_configs' else path.name}`" in readme, path
