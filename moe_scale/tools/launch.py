"""``moe-scale launch``: check a recipe's settings as its ranks would see them, then print (or start) the exact command.

On one machine, on the hosts of a hostfile, or under Slurm, by any launcher. What is wrong is told here and not by the
ranks, after they have queued and started. Of several commands each is typed on the host that it names.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from moe_scale.errors import ConfigError, Problem, raise_if
from moe_scale.parallel import device as devices
from moe_scale.parallel.device import Device
from moe_scale.parallel.hostfile import MAX_SLOTS, Host, read_hostfile, select
from moe_scale.parallel.launch import INTERFACE, Launch
from moe_scale.tools import launch_commands as commands
from moe_scale.tools.arguments import not_empty, port, positive
from moe_scale.tools.compare import load_recipe
from moe_scale.tools.launch_commands import Command, Request
from moe_scale.tools.launch_environment import users_file_name
from moe_scale.tools.launch_run import start
from moe_scale.train.recipe import Job, Recipe, prepare_job

BATCH_SCRIPT = "recipes/slurm/train.sbatch"
BY_HOSTFILE: Mapping[str, Callable[[Request], list[Command]]] = {
    "deepspeed": commands.deepspeed,
    "deepspeed-openmpi": commands.deepspeed_openmpi,
    "torchrun": commands.torchrun,
    "accelerate": commands.accelerate,
}
SLURM_OPTIONS = ("time", "partition", "account", "qos", "constraint")
OF_SBATCH_ALONE = ("partition", "account", "qos")
"""Those that say where a job goes; a step inside of one has no choice, and srun passes over them in silence."""
RANKS_OF_A_NODE = (commands.RANKS_PER_NODE, "SLURM_NTASKS_PER_NODE", "SLURM_GPUS_PER_NODE", "SLURM_GPUS_ON_NODE")
"""Variables of an allocation, of which the first one counts, as in ``recipes/slurm/train.sh``."""
A_GPU = Device("cuda", "a GPU", bf16=True, fp16=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The tool's own flags; whatever else is given goes to the recipe."""
    parser.add_argument("recipe", help="file of the recipe, as recipes/lm_16l.py")
    where = parser.add_argument_group("where; without any of these, on this machine")
    where.add_argument("--hostfile", type=Path, metavar="FILE", help="hosts and their slots, as hostfiles/2x8")
    where.add_argument("--include", type=not_empty, metavar="HOSTS", help="of the hostfile: node-1@node-2:0,1")
    where.add_argument("--exclude", type=not_empty, metavar="HOSTS", help="all of the hostfile but these")
    where.add_argument("--slurm", action="store_true", help="sbatch; inside an allocation, srun")
    where.add_argument(
        "--nodes",
        type=nodes,
        metavar="N",
        help="of the Slurm job; 2-4 lets it go on with 2 when some are lost [inside an allocation: all]",
    )
    where.add_argument(
        "--ranks_per_node",
        "--gpus-per-node",
        type=positive,
        metavar="N",
        help="ranks, one a GPU [all GPUs of this machine, on a CPU 1; a hostfile has its slots]; under Slurm and for "
        "GPUs that this machine lacks it has to be given",
    )
    for name in SLURM_OPTIONS:
        where.add_argument(f"--{name}", type=not_empty, metavar="VALUE", help="handed to Slurm as it is")
    where.add_argument("--array", help=argparse.SUPPRESS)  # refused here, and not by the recipe as a wrong setting
    how = parser.add_argument_group("how")
    how.add_argument(
        "--launcher", choices=[*BY_HOSTFILE, "srun"], help="what starts the ranks [deepspeed; under Slurm, srun]"
    )
    how.add_argument("--master_addr", type=not_empty, metavar="HOST", help="of rank 0 [the hostfile's first host]")
    how.add_argument("--master_port", type=port, metavar="PORT", help=f"of the rendezvous [{commands.DEFAULT_PORT}]")
    how.add_argument("--interface", type=not_empty, metavar="NAME", help=f"of the network, sets {INTERFACE}: ib0")
    how.add_argument(
        "--device", choices=["cpu", "gpu"], help="of the ranks [this machine's; with several hosts, gpu unless "
        "DS_ACCELERATOR is cpu]"
    )  # fmt: skip
    how.add_argument("--run", action="store_true", help="start it; the exit code is the launcher's")
    how.add_argument("--node_rank", type=int, metavar="N", help="with --run and a command a host: the Nth, from 0")


def run(arguments: argparse.Namespace, settings: list[str]) -> None:
    """Print the commands, or start this host's.

    Raises:
        ConfigError: for settings that the ranks would refuse, and for what the launcher cannot do.
        SystemExit: with the exit code of what was started.
    """
    raise_if(_contradictions(arguments))
    device = _device(arguments)
    request = _request(arguments, settings, on_gpu=not device.is_cpu)
    recipe = load_recipe(Path(arguments.recipe))
    allocated = _in_allocation()
    as_seen = ["--resume", "auto", *settings] if arguments.slurm and not allocated else settings
    jobs = check_sizes(recipe, as_seen, request, device)
    if not arguments.slurm:
        planned = BY_HOSTFILE[arguments.launcher or "deepspeed"](request)
    elif allocated:
        planned = commands.srun(request)
    else:
        planned = commands.sbatch(request, _batch_script())
    if arguments.run:
        start(_this_hosts(planned, arguments.node_rank), Path(arguments.recipe))
    print("\n".join([*(describe(size, job) for size, job in jobs), *notes(jobs, planned), *lines_of(planned)]))


def nodes(text: str) -> tuple[int | None, int]:
    """The fewest and the most nodes of ``2-4``; None and the number of ``4``."""
    fewest, dash, most = text.rpartition("-")
    numbers = (positive(fewest) if dash else None, positive(most))
    if numbers[0] and not numbers[0] <= numbers[1]:
        raise argparse.ArgumentTypeError(f"{text}: write the smaller number first, as 2-4")
    return numbers


def check_sizes(recipe: Recipe, settings: list[str], request: Request, device: Device) -> list[tuple[Request, Job]]:
    """The job at each end of a range of nodes, the larger first; without a range, at the one size.

    Raises:
        ConfigError: with the problems of both ends, and if a job that shrinks would go on at another scale.
    """
    sizes = [request]
    if request.fewest_nodes and request.fewest_nodes < len(request.hosts):
        sizes.append(replace(request, hosts=request.hosts[: request.fewest_nodes]))
    jobs: list[tuple[Request, Job]] = []
    problems: list[Problem] = []
    for size in sizes:
        try:
            jobs.append((size, check(recipe, settings, size, device)))
        except ConfigError as error:
            problems += error.problems
    raise_if(list(dict.fromkeys(problems)))
    scales = {len(size.hosts): job.config.scale for size, job in jobs}
    if len(set(scales.values())) > 1:
        found = ", ".join(f"{scale} on {number}" for number, scale in scales.items())
        instead = f"set it for both: --scale {jobs[0][1].config.scale}"
        raise ConfigError(Problem("scale", f"would change with the nodes: {found}", instead))
    return jobs


def check(recipe: Recipe, settings: list[str], request: Request, device: Device) -> Job:
    """The job as the first rank of each host would see it; that of the first host is returned.

    Raises:
        ConfigError: with every problem that any of them has, and for settings that they would read differently.
    """
    first_of_size = {host.num_ranks: host for host in reversed(request.hosts)}
    jobs: dict[int, Job] = {}
    problems: list[Problem] = []
    for size in dict.fromkeys(host.num_ranks for host in request.hosts):
        launch = Launch(0, request.num_ranks, 0, size, "env")
        try:
            jobs[size] = prepare_job(recipe, settings, launch, device)
        except ConfigError as error:
            problems += error.problems
    raise_if(list(dict.fromkeys(problems)))
    seen = {size: job.config.moe.ep_size for size, job in jobs.items() if job.config.moe.enabled}
    if len(set(seen.values())) > 1:
        found = ", ".join(f"{ep_size} on {first_of_size[size].name}" for size, ep_size in seen.items())
        what = f"0 takes what fits a node, which differs: {found}"
        raise ConfigError(Problem("moe.ep_size", what, f"set it for all: --moe.ep_size {min(seen.values())}"))
    return next(iter(jobs.values()))


def describe(request: Request, job: Job) -> str:
    """A comment that says what was checked."""
    counts = " + ".join(str(host.num_ranks) for host in request.hosts)
    ranks = f"{request.num_ranks} rank{'s' if request.num_ranks > 1 else ''}"
    where = f" ({counts})" if len(request.hosts) > 1 else ""
    kind = "GPUs" if request.on_gpu else "a CPU"
    return (
        f"# {job.name} at scale {job.config.scale}, checked for {ranks}{where} on {kind}: ep_size "
        f"{job.config.moe.ep_size}, ZeRO-{job.plan.stage}, {job.plan.precision}, {job.tokens_per_step:,} tokens a step"
    )


def notes(jobs: list[tuple[Request, Job]], planned: list[Command]) -> list[str]:
    """Comments on what runs but may not be what was meant."""
    found = []
    if any(job.config.moe.enabled and crosses_hosts(size.hosts, job.config.moe.ep_size) for size, job in jobs):
        found.append("# note: tokens cross hosts on their way to their experts; ep_size within a host avoids it")
    held_back = [name for command in planned if command.carried for name in command.carried.held_back]
    if held_back:
        names = ", ".join(held_back)
        found.append(f"# note: not handed to other hosts, as possible secrets: {names}; {users_file_name()} is")
    return found


def lines_of(planned: list[Command]) -> list[str]:
    """Commands to copy, each under the host that it is for where there are several."""
    lines = []
    for command in planned:
        if command.host and len(planned) > 1:
            lines += [f"# on {command.host}, in this folder, with this environment:"]
        lines.append(str(command))
    return lines


def crosses_hosts(hosts: tuple[Host, ...], ep_size: int) -> bool:
    """Whether any group of ``ep_size`` neighbouring ranks, which share the experts, is on several hosts."""
    host_of_rank = [number for number, host in enumerate(hosts) for _ in host.slots]
    groups = (host_of_rank[first : first + ep_size] for first in range(0, len(host_of_rank), ep_size))
    return any(group[0] != group[-1] for group in groups)


def _contradictions(arguments: argparse.Namespace) -> list[Problem]:
    """Flags that do not go together."""
    found = []
    if arguments.hostfile and arguments.slurm:
        found.append(Problem("--hostfile, --slurm", "Slurm chooses the hosts itself", "give one of them"))
    if arguments.slurm and arguments.launcher not in (None, "srun"):
        found.append(Problem("--launcher", f"{arguments.launcher} with --slurm", "leave it out: srun starts the ranks"))
    if arguments.launcher == "srun" and not arguments.slurm:
        found.append(Problem("--launcher", "srun without --slurm", "add --slurm"))
    if not arguments.hostfile:
        found += [
            Problem(f"--{name}", "chooses from a hostfile, and none is given", "add --hostfile FILE")
            for name in ("include", "exclude", "master_addr", "node_rank")
            if getattr(arguments, name) is not None
        ]
    if arguments.node_rank is not None and not arguments.run:
        found.append(Problem("--node_rank", "says which command to start", "add --run"))
    if arguments.hostfile and arguments.ranks_per_node:
        found.append(Problem("--ranks_per_node", "with a hostfile", "leave it out: the hostfile has slots"))
    if arguments.array:
        one_each = "recipes/slurm/sweep.sbatch gives each job a line of settings and a folder"
        found.append(Problem("--array", "all jobs of it would write into one output_dir", one_each))
    if arguments.device == "gpu" and os.environ.get("DS_ACCELERATOR") == "cpu":
        found.append(Problem("--device", "gpu, but DS_ACCELERATOR is cpu and reaches the ranks", "unset it"))
    if arguments.slurm and arguments.master_port:
        found.append(Problem("--master_port", "with --slurm", "leave it out: the number of the job gives a port"))
    if arguments.slurm and _in_allocation():
        given = [name for name in OF_SBATCH_ALONE if getattr(arguments, name)]
        found += [Problem(f"--{name}", "is for a new job, and this is inside of one", "leave it out") for name in given]
        if arguments.nodes and arguments.nodes[0]:
            found.append(Problem("--nodes", "a range is for a new job, and this is inside of one", "give a number"))
    if not arguments.slurm:
        given = [name for name in ("nodes", *SLURM_OPTIONS) if getattr(arguments, name)]
        found += [Problem(f"--{name}", "is an option of Slurm", "add --slurm") for name in given]
    return found


def _device(arguments: argparse.Namespace) -> Device:
    """The device that the settings are checked for."""
    on_cpu = _is_told_cpu(arguments)
    here = devices.detect()
    if here.is_cpu != on_cpu and (arguments.device or on_cpu or arguments.hostfile or arguments.slurm):
        return devices.cpu() if on_cpu else A_GPU
    return here


def _is_told_cpu(arguments: argparse.Namespace) -> bool:
    """Whether the ranks are to leave GPUs alone, where they have some."""
    return arguments.device == "cpu" or (not arguments.device and os.environ.get("DS_ACCELERATOR") == "cpu")


def _request(arguments: argparse.Namespace, settings: list[str], *, on_gpu: bool) -> Request:
    """What is asked for, once the hosts are known."""
    slurm = tuple(f"--{name}={value}" for name in SLURM_OPTIONS if (value := getattr(arguments, name)))
    environ = {INTERFACE: arguments.interface} if arguments.interface else {}
    if _is_told_cpu(arguments):
        environ["DS_ACCELERATOR"] = "cpu"  # a rank would take a GPU of its host
    return Request(
        arguments.recipe,
        tuple(settings),
        tuple(_hosts(arguments, on_gpu=on_gpu)),
        on_gpu,
        arguments.hostfile,
        arguments.include or "",
        arguments.exclude or "",
        arguments.master_addr or "",
        arguments.master_port,
        environ,
        slurm,
        arguments.nodes[0] if arguments.nodes else None,
    )


def _hosts(arguments: argparse.Namespace, *, on_gpu: bool) -> list[Host]:
    if arguments.hostfile:
        return select(read_hostfile(arguments.hostfile), arguments.include or "", arguments.exclude or "")
    ranks = arguments.ranks_per_node
    if arguments.slurm:
        most = arguments.nodes[1] if arguments.nodes else 0
        if _in_allocation():
            most = most or _number_in("SLURM_JOB_NUM_NODES", "SLURM_NNODES")
            ranks = ranks or _number_in(*RANKS_OF_A_NODE)
        lacking = [flag for flag, value in (("--nodes", most), ("--ranks_per_node", ranks)) if not value]
        raise_if([Problem(flag, "not given", f"for example {flag} {2 if 'nodes' in flag else 8}") for flag in lacking])
        return [Host(f"node {number}", tuple(range(ranks))) for number in range(most)]
    if not ranks and on_gpu and devices.detect().is_cpu:
        what = "not given, and this machine has no GPUs to count"
        raise ConfigError(Problem("--ranks_per_node", what, "for example --ranks_per_node 8"))
    ranks = ranks or (devices.accelerator().device_count() if on_gpu else 1)
    if not 1 <= ranks <= MAX_SLOTS:
        raise ConfigError(Problem("--ranks_per_node", str(ranks), f"choose 1 to {MAX_SLOTS}"))
    return [Host("", tuple(range(ranks)))]


def _in_allocation() -> bool:
    return "SLURM_JOB_ID" in os.environ


def _number_in(*names: str) -> int:
    """The first of these variables that is a number, or ``gpu:8``; 0 for none."""
    values = (os.environ.get(name, "").rpartition(":")[2] for name in names)
    return next((int(value) for value in values if value.isascii() and value.isdigit()), 0)


def _batch_script() -> str:
    if not Path(BATCH_SCRIPT).is_file():
        raise ConfigError(Problem("--slurm", f"no {BATCH_SCRIPT} in this folder", "type it in the checkout's folder"))
    return BATCH_SCRIPT


def _this_hosts(planned: list[Command], node_rank: int | None) -> Command:
    """The command to start here.

    Raises:
        ConfigError: if there is one a host and none of them is this one.
    """
    if len(planned) == 1:
        return planned[0]
    if node_rank is not None:
        if not 0 <= node_rank < len(planned):
            raise ConfigError(Problem("--node_rank", str(node_rank), f"choose 0 to {len(planned) - 1}"))
        return planned[node_rank]
    for command in planned:
        if commands.is_this_host(command.host):
            return command
    names = ", ".join(command.host for command in planned)
    instead = "type it on each of them, or say which one this is: --node_rank N"
    raise ConfigError(Problem("--run", f"this host is none of {names}", instead, this_host_only=True))
