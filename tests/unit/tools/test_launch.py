"""``moe-scale launch``: the commands of every launcher, what is refused before anything starts, and how it ends."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moe_scale import cli
from moe_scale.parallel import device as devices
from moe_scale.tools import launch_commands
from moe_scale.tools.launch_commands import Command, through_pdsh
from moe_scale.tools.launch_environment import carried, is_secret
from tests.ranks import REPO, free_port

RECIPE = "recipes/lm_16l.py"
HOSTS = ("--hostfile", "hostfiles/2x8")


@pytest.fixture(autouse=True)
def a_bare_login_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkout's folder on a machine without a GPU, whose name is in no hostfile, outside of any job."""
    monkeypatch.chdir(REPO)
    for name in list(os.environ):
        if name.startswith(("SLURM_", "GLOO_", "NCCL_", "HF_", "WANDB_", "MOE_SCALE_", "TRITON_", "TORCH_", "CUDA_")):
            monkeypatch.delenv(name)
    for name in ("DS_ACCELERATOR", "DS_ENV_FILE", "OMP_NUM_THREADS", "LD_LIBRARY_PATH", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/nowhere")
    monkeypatch.setattr(launch_commands.socket, "gethostname", lambda: "login")


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """What the tool prints for these words."""
    cli.main(["launch", *words])
    return capsys.readouterr().out.splitlines()


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What the tool says to words that are wrong."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["launch", *words])
    assert ended.value.code == 2
    return capsys.readouterr().err


def commands(lines: list[str]) -> list[str]:
    return [line for line in lines if not line.startswith("#")]


# --- one machine -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("launcher", "command"),
    [
        ([], f"deepspeed --num_accelerators 2 {RECIPE} --moe.ep_size 2"),
        (["--launcher", "torchrun"], f"torchrun --standalone --nproc_per_node 2 {RECIPE} --moe.ep_size 2"),
        (
            ["--launcher", "accelerate"],
            "accelerate launch --use_deepspeed --deepspeed_multinode_launcher standard --num_machines 1 "
            "--num_processes 2 --mixed_precision no --dynamo_backend no --main_process_port 29500 "
            f"{RECIPE} --moe.ep_size 2",
        ),
    ],
)
def test_this_machine(launcher: list[str], command: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--device", "cpu", "--ranks_per_node", "2", "--moe.ep_size", "2"]
    lines = printed(capsys, RECIPE, *launcher, *flags)
    assert commands(lines) == [f"DS_ACCELERATOR=cpu {command}"]
    assert "lm_16l at scale cpu, checked for 2 ranks on a CPU: ep_size 2, ZeRO-3" in lines[0]


def test_a_port_and_an_interface_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--device", "cpu", "--master_port", "1234", "--interface", "eth0"]
    (command,) = commands(printed(capsys, RECIPE, *flags))
    environ = "MOE_SCALE_INTERFACE=eth0 DS_ACCELERATOR=cpu"
    assert command == f"{environ} deepspeed --num_accelerators 1 --master_port 1234 {RECIPE}"
    (command,) = commands(printed(capsys, RECIPE, *flags, "--launcher", "torchrun"))
    assert command == f"{environ} torchrun --master_port 1234 --nproc_per_node 1 {RECIPE}"


# --- the hosts of a hostfile -----------------------------------------------------------------------------------------


def test_deepspeed_carries_the_environment_in_a_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The lines that are printed, run by a shell, leave the file that DeepSpeed reads."""
    values = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "4", "HF_HOME": "/models of all", "NCCL_DEBUG": "INFO",
              "HF_TOKEN": "hidden", "WANDB_API_KEY": "hidden", "EDITOR": "vi"}  # fmt: skip
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    told = printed(capsys, RECIPE, *HOSTS, "--interface", "ib0")
    assert "not handed to other hosts, as possible secrets: HF_TOKEN, WANDB_API_KEY; ~/.deepspeed_env is" in told[1]
    lines = commands(told)
    assert len(lines) == 2
    assert lines[1] == (
        f'DS_ENV_FILE="$PWD/.deepspeed_env.launch" deepspeed --hostfile hostfiles/2x8 '
        f"--master_addr node-1 --master_port 29500 {RECIPE}"
    )
    subprocess.run(["sh", "-c", lines[0]], cwd=tmp_path, check=True)
    written = dict(line.split("=", 1) for line in (tmp_path / ".deepspeed_env.launch").read_text().splitlines())
    assert written == {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "OMP_NUM_THREADS": "4", "HF_HOME": "/models of all",
        "NCCL_DEBUG": "INFO", "MOE_SCALE_INTERFACE": "ib0",
    }  # fmt: skip


def test_a_users_own_file_is_taken_over_unseen(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its values win over those of the shell, and are neither printed nor left for others to read."""
    mine = tmp_path / "my file"
    mine.write_text("OMP_NUM_THREADS=8\nWANDB_API_KEY=hidden")  # its last line has no end
    monkeypatch.setenv("DS_ENV_FILE", str(mine))
    for name, value in {"OMP_NUM_THREADS": "4", "WANDB_API_KEY": "old", "DS_ACCELERATOR": "cuda"}.items():
        monkeypatch.setenv(name, value)
    told = printed(capsys, RECIPE, *HOSTS, "--device", "cpu")
    assert "hidden" not in "\n".join(told)
    assert "possible secrets" not in "\n".join(told), "the file hands it on"
    written = tmp_path / ".deepspeed_env.launch"
    written.touch(0o644)
    subprocess.run(["sh", "-c", f"umask 022; {commands(told)[0]}"], cwd=tmp_path, check=True)
    assert written.stat().st_mode & 0o777 == 0o600
    handed_on = [line for line in written.read_text().splitlines() if not line.startswith("PATH=")]
    assert handed_on == ["OMP_NUM_THREADS=8", "WANDB_API_KEY=hidden", "DS_ACCELERATOR=cpu"]
    assert written.read_text() == carried({"DS_ACCELERATOR": "cpu"}).text(), "--run writes the same"


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        ("HF_TOKEN", "x", True), ("HF_proxy_auth", "x", True), ("GLOO_CREDENTIALS", "x", True),
        ("HF_BASIC_AUTH", "x", True), ("HF_ENDPOINT", "https://me:word@mirror", True),
        ("HF_ENDPOINT", "https://mirror", False), ("HF_AUTHOR", "x", False), ("HF_TOKENIZERS", "x", False),
        ("NCCL_DEBUG", "INFO", False),
    ],
)  # fmt: skip
def test_what_may_be_a_secret(name: str, value: str, secret: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_secret(name, value) == secret
    monkeypatch.setenv(name, value)
    assert (name in carried({}).held_back) == secret
    assert (name in carried({}).values) != secret


def test_a_cpu_is_asked_for_on_every_host(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts with GPUs would use them, whatever the settings were checked for."""
    cpu = ("--device", "cpu")
    for launcher in ("deepspeed", "deepspeed-openmpi", "torchrun", "accelerate"):
        lines = commands(printed(capsys, RECIPE, *HOSTS, *cpu, "--launcher", launcher))
        lines = lines[:1] if launcher.startswith("deepspeed") else lines
        assert lines
        assert all("DS_ACCELERATOR=cpu" in line for line in lines), launcher
    size = ("--slurm", "--nodes", "2", "--ranks_per_node", "8")
    (command,) = commands(printed(capsys, RECIPE, *size, *cpu))
    assert re.match("[^ ]+ DS_ACCELERATOR=cpu sbatch ", command)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    (command,) = commands(printed(capsys, RECIPE, *size, *cpu))
    assert command.startswith("DS_ACCELERATOR=cpu srun ")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert "DS_ACCELERATOR is cpu and reaches the ranks; unset it" in refused(capsys, RECIPE, *HOSTS, "--device", "gpu")


def test_part_of_a_hostfile(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    mixed, ep = ["--hostfile", "hostfiles/mixed"], ["--moe.ep_size", "2"]
    (*_, command) = commands(printed(capsys, RECIPE, *mixed, "--exclude", "small-2", *ep))
    assert "--hostfile hostfiles/mixed --exclude small-2 --master_addr big-1" in command
    (*_, command) = commands(printed(capsys, RECIPE, *mixed, "--include", "small-2", *ep))
    assert "--master_addr small-2 --master_port 29500 --force_multi" in command, "a host that is not this one"


def test_one_host_that_is_this_one_needs_no_ssh(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch_commands.socket, "gethostname", lambda: "node-1.cluster")
    (command,) = commands(printed(capsys, RECIPE, "--hostfile", "hostfiles/1x8"))
    assert "--no_ssh_check" in command
    assert "--force_multi" not in command


def test_openmpi_is_told_where_rank_0_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_commands.os, "geteuid", lambda: 0)
    flags = ["--launcher", "deepspeed-openmpi", "--hostfile", "hostfiles/2x8", "--interface", "ib0"]
    written, command = commands(printed(capsys, RECIPE, *flags))
    assert "MASTER_ADDR=node-1 MASTER_PORT=29500 MOE_SCALE_INTERFACE=ib0" in written
    words = shlex.split(command)
    assert "--launcher_args=--bind-to none --allow-run-as-root --mca btl_tcp_if_include ib0" in words
    assert words[words.index("--launcher") + 1] == "openmpi"


def test_torchrun_has_a_command_for_each_host_of_any_size(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--hostfile", "hostfiles/mixed", "--include", "big-1@small-2:2,3", "--launcher", "torchrun"]
    lines = printed(capsys, RECIPE, *flags, "--moe.ep_size", "2")
    place = "--master_addr big-1 --master_port 29500"
    assert [line.split(",")[0] for line in lines if line.startswith("# on")] == ["# on big-1", "# on small-2"]
    assert commands(lines) == [
        f"torchrun --nnodes 2 --node_rank 0 --nproc_per_node 8 {place} {RECIPE} --moe.ep_size 2",
        "CUDA_VISIBLE_DEVICES=2,3 "
        f"torchrun --nnodes 2 --node_rank 1 --nproc_per_node 2 {place} {RECIPE} --moe.ep_size 2",
    ]


def test_accelerate_has_a_command_for_each_host_of_one_size(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--launcher", "accelerate", "--master_addr", "10.0.0.1", "--master_port", "4000"]
    found = commands(printed(capsys, RECIPE, "--hostfile", "hostfiles/4x8", *flags))
    assert len(found) == 4
    assert "--num_machines 4 --num_processes 32" in found[0]
    place = "--machine_rank 3 --main_process_ip 10.0.0.1 --same_network --main_process_port 4000"
    assert place in found[3]


def test_experts_across_hosts_are_remarked_on(capsys: pytest.CaptureFixture[str]) -> None:
    for ep_size, remarked in (("8", False), ("16", True)):
        lines = printed(capsys, RECIPE, "--hostfile", "hostfiles/2x8", "--moe.ep_size", ep_size)
        assert any("cross hosts" in line for line in lines) == remarked


# --- Slurm -----------------------------------------------------------------------------------------------------------


def test_outside_a_job_it_submits_one(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--slurm", "--nodes", "4", "--gpus-per-node", "8", "--time", "2:00:00", "--partition", "gpu"]
    (command,) = commands(printed(capsys, RECIPE, *flags, "--output_dir", "runs/a b"))
    assert command == (
        "MOE_SCALE_RANKS_PER_NODE=8 sbatch --nodes=4 --gpus-per-node=8 --time=2:00:00 --partition=gpu "
        f"recipes/slurm/train.sbatch {RECIPE} --output_dir 'runs/a b'"
    )


def test_a_job_that_goes_on_with_fewer_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    """Settings are checked for the most and the fewest."""
    flags = ["--slurm", "--nodes", "2-4", "--ranks_per_node", "8"]
    lines = printed(capsys, RECIPE, *flags)
    assert ["32 ranks (8 + 8 + 8 + 8)" in lines[0], "16 ranks (8 + 8)" in lines[1]] == [True, True]
    script = f"recipes/slurm/train.sbatch {RECIPE}"
    assert commands(lines) == [f"MOE_SCALE_RANKS_PER_NODE=8 sbatch --nodes=2-4 --gpus-per-node=8 {script}"]
    assert "32 does not divide the 16 ranks" in refused(capsys, RECIPE, *flags, "--moe.ep_size", "32")
    flags[2] = "1-2"
    said = "would change with the nodes: multinode on 2, 1node on 1; set it for both: --scale multinode"
    assert said in refused(capsys, RECIPE, *flags)
    assert printed(capsys, RECIPE, *flags, "--scale", "multinode")
    flags[2] = "4-2"
    assert "write the smaller number first" in refused(capsys, RECIPE, *flags)


def test_inside_a_job_it_starts_a_step(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_PER_NODE": "gpu:a100:4",
           "SLURM_CPUS_PER_TASK": "6"}  # fmt: skip
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    (command,) = commands(printed(capsys, RECIPE, "--slurm"))
    size = "--nodes=2 --ntasks-per-node=4 --gpus-per-node=4 --cpus-per-task=6"
    assert command == f"srun --kill-on-bad-exit=1 {size} python {RECIPE}"
    (command,) = commands(printed(capsys, RECIPE, "--slurm", "--ranks_per_node", "2", "--device", "cpu"))
    assert "--nodes=2 --ntasks-per-node=2 --gpus-per-node=0" in command
    monkeypatch.setenv("MOE_SCALE_RANKS_PER_NODE", "3")
    (command,) = commands(printed(capsys, RECIPE, "--slurm", "--moe.ep_size", "3", "--moe.num_experts", "6"))
    assert "--ntasks-per-node=3" in command, "as train.sh has it"
    for words in (("--partition", "a"), ("--account", "a"), ("--qos", "a"), ("--nodes", "1-2")):
        assert "for a new job, and this is inside of one" in refused(capsys, RECIPE, "--slurm", *words)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ((*HOSTS, "--slurm"), "Slurm chooses the hosts itself"),
        (("--slurm", "--launcher", "torchrun"), "leave it out: srun starts the ranks"),
        (("--launcher", "srun"), "srun without --slurm"),
        (("--include", "node-1"), "chooses from a hostfile, and none is given"),
        ((*HOSTS, "--ranks_per_node", "4"), "leave it out: the hostfile has slots"),
        (("--slurm", "--nodes", "2", "--master_port", "4000"), "the number of the job gives a port"),
        (("--nodes", "2", "--time", "10"), "2 problems"),
        (("--slurm",), "--ranks_per_node: not given"),
        (("--slurm", "--nodes", "2", "--array", "1-3"), "--array: all jobs of it would write into one output_dir"),
        (("--device", "gpu"), "--ranks_per_node: not given, and this machine has no GPUs to count"),
        (("--launcher", "deepspeed-openmpi"), "has no hostfile"),
        ((*HOSTS, "--launcher", "deepspeed-openmpi", "--exclude", "node-2"), "takes all hosts of a hostfile"),
        (
            ("--hostfile", "hostfiles/mixed", "--moe.ep_size", "4", "--launcher", "accelerate"),
            "starts the same number of ranks on every host; use deepspeed or torchrun",
        ),
        (("--hostfile", "hostfiles/mixed"), "8 on big-1, 4 on small-1; set it for all: --moe.ep_size 4"),
        (("--hostfile", "hostfiles/none"), "cannot read hostfiles/none: No such file"),
        ((*HOSTS, "--moe.ep_size", "64"), "64 does not divide the 16 ranks of this run"),
        ((*HOSTS, "--moe.top_kk", "2"), "did you mean --moe.top_k?"),
        (
            (*HOSTS, "--deepspeed_override", "zero_optimization.zero_hpz_partition_size=3"),
            "3 does not divide the 16 ranks",
        ),
        ((*HOSTS, "--output_dir", "runs/a $HOME b"), "does not pass pdsh"),
        ((*HOSTS, "--run", "--launcher", "torchrun"), "this host is none of node-1, node-2"),
        ((*HOSTS, "--run", "--launcher", "torchrun", "--node_rank", "2"), "choose 0 to 1"),
        ((*HOSTS, "--launcher", "torchrun", "--node_rank", "1"), "--node_rank: says which command to start; add --run"),
        ((*HOSTS, "--include", ""), "argument --include: is empty"),
        (("--slurm", "--nodes", "2", "--partition", " "), "argument --partition: is empty"),
    ],
)
def test_it_is_told_before_anything_starts(
    words: tuple[str, ...], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert what in refused(capsys, RECIPE, *words)


@pytest.mark.parametrize(
    ("file", "what"), [("none", "none.py is no file"), ("compare_moe", "compare_moe.py defines no RECIPE")]
)
def test_a_file_that_is_no_recipe(file: str, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, f"recipes/{file}.py", *HOSTS)
    assert said == f"error: 1 problem with the settings\n  - recipe: recipes/{what}; for example recipes/lm_16l.py\n"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("x = 1\nprint(x", ":2 cannot be loaded: SyntaxError: '(' was never closed"),
        ("\nimport nothing_of_this_name", ":2 cannot be loaded: ModuleNotFoundError: No module named"),
        ("1 / 0", ":1 cannot be loaded: ZeroDivisionError: division by zero"),
        ("import sys; sys.exit(0)", ":1 cannot be loaded: SystemExit: 0"),
    ],
)
def test_a_recipe_that_does_not_load(
    content: str, what: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "broken.py"
    path.write_text(content)
    said = refused(capsys, str(path), *HOSTS)
    assert said.startswith(f"error: 1 problem with the settings\n  - recipe: {path}{what}")


def test_values_that_would_reach_other_hosts_changed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NCCL_DEBUG_FILE", "$HOME/nccl.log")
    changed = "the value would reach the other hosts changed, for its"
    assert f"NCCL_DEBUG_FILE: {changed} '$'" in refused(capsys, RECIPE, *HOSTS)
    monkeypatch.setenv("NCCL_DEBUG_FILE", "a file")
    assert printed(capsys, RECIPE, *HOSTS)
    assert f"{changed} ' '" in refused(capsys, RECIPE, *HOSTS, "--launcher", "deepspeed-openmpi")
    (tmp_path / "mine").write_text("A=1\nhidden\nWANDB_API_KEY=hid$den\n")
    monkeypatch.setenv("DS_ENV_FILE", str(tmp_path / "mine"))
    said = refused(capsys, RECIPE, *HOSTS)
    assert "mine:2: no =; DeepSpeed wants NAME=VALUE on every line" in said
    assert f"mine:3, WANDB_API_KEY: {changed} '$'" in said
    assert "hid" not in said
    (tmp_path / "mine").write_bytes(b"A=\xff")
    assert "mine: cannot be read: it is not text" in refused(capsys, RECIPE, *HOSTS)


@pytest.mark.parametrize("word", ["plain", "a;b", "*.jsonl", "it's", "a b", 'say "a b"', "$HOME", "`id`", "a\\b", ""])
def test_words_pass_deepspeed_pdsh_and_a_shell(word: str) -> None:
    from deepspeed.launcher.multinode_runner import PDSHRunner

    runner = PDSHRunner.__new__(PDSHRunner)
    runner.args = type("Arguments", (), {"user_args": [through_pdsh(word)]})()
    typed = " ".join(["printf '%s|'", *runner.parse_user_args()])
    assert subprocess.run(["sh", "-c", typed], capture_output=True, text=True, check=True).stdout == f"{word}|"


# --- --run -----------------------------------------------------------------------------------------------------------

SLOW_RANK = """
import os, signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
print("ready", flush=True)
time.sleep(60)
"""


def started(argv: list[str], recipe: Path, environ: dict[str, str] | None = None) -> subprocess.Popen[str]:
    code = (
        "from pathlib import Path; from moe_scale.tools.launch_run import start; "
        "from moe_scale.tools.launch_commands import Command; "
        "from moe_scale.tools.launch_environment import Carried; "
        f"carried = Carried({environ}) if {bool(environ)} else None; "
        f"start(Command({tuple(argv)!r}, carried=carried), Path({str(recipe)!r}))"
    )
    return subprocess.Popen([sys.executable, "-c", code], cwd=REPO, stdout=subprocess.PIPE, text=True)


def test_the_exit_code_is_the_launchers(tmp_path: Path) -> None:
    for script, code in (("exit 7", 7), ("kill -KILL $$", 128 + signal.SIGKILL)):
        with started(["sh", "-c", script], tmp_path) as process:
            assert process.wait(30) == code


def test_deepspeed_finds_the_file_of_variables(tmp_path: Path) -> None:
    process = started(["sh", "-c", 'cat "$DS_ENV_FILE"'], tmp_path, {"A": "1", "B": "two words"})
    assert process.communicate(timeout=30)[0] == "A=1\nB=two words\n"


def test_ranks_find_the_python_that_launches_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Called by its path, with the environment not active: srun takes ``python`` from PATH, and another is there."""
    other = tmp_path / "python"
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{Path(sys.executable).parent}:/usr/bin:/bin")
    found = started(["sh", "-c", "command -v python"], tmp_path).communicate(timeout=30)[0].strip()
    assert found == str(Path(sys.executable).with_name("python"))


def test_a_launcher_that_is_not_installed(tmp_path: Path) -> None:
    from moe_scale.errors import ConfigError
    from moe_scale.tools.launch_run import start

    with pytest.raises(ConfigError, match="no_such_launcher is not on PATH"):
        start(Command(("no_such_launcher",)), tmp_path)


def test_a_signal_reaches_the_ranks_and_not_the_launcher_between(tmp_path: Path) -> None:
    """DeepSpeed's own launcher would leave without a word to its ranks, and its exit code would not be theirs."""
    recipe = tmp_path / "recipe.py"
    recipe.write_text(SLOW_RANK)
    argv = ["deepspeed", "--num_accelerators", "1", "--master_port", str(free_port()), str(recipe)]
    with started(argv, recipe) as process:
        assert process.stdout
        assert any("ready" in line for line in process.stdout)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(30) == 75


def test_a_machine_with_gpus_starts_a_rank_on_each(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "detect", lambda: devices.Device("cuda", "a GPU", bf16=True, fp16=True))
    monkeypatch.setattr(devices, "accelerator", lambda: type("Accelerator", (), {"device_count": lambda self: 4})())
    (command,) = commands(printed(capsys, RECIPE))
    assert command == f"deepspeed --num_gpus 4 {RECIPE}"
