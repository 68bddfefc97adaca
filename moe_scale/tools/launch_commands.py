"""The command lines that start a recipe's ranks: one place for what each launcher has to be told.

What they have in common: rank 0 is on the first host, and every rank sees the settings as they were given.

* ``deepspeed`` takes the first address of ``hostname -I`` for that of rank 0, whatever network it belongs to, unless it
  is told the host's name. It starts the ranks of a hostfile with one host locally unless told ``--force_multi``.
* pdsh and mpirun hand few variables on; the others come from a file that ``DS_ENV_FILE`` names (launch_environment).
* pdsh hands words to a shell on each host, and DeepSpeed quotes those with a blank alone.
* ``deepspeed --launcher slurm`` is left out: it sets neither RANK nor the address of rank 0. ``srun`` needs neither.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from moe_scale.errors import ConfigError, Problem
from moe_scale.parallel.hostfile import Host
from moe_scale.parallel.launch import INTERFACE
from moe_scale.tools.launch_environment import QUOTED, Carried, carried

DEFAULT_PORT = 29500
ENVIRONMENT_FILE = ".deepspeed_env.launch"
"""Written into the current folder by the printed commands; ``DS_ENV_FILE`` names it."""
RANKS_PER_NODE = "MOE_SCALE_RANKS_PER_NODE"
"""Tells ``recipes/slurm/train.sh`` how many tasks a node gets."""


@dataclass(frozen=True)
class Request:
    """What is to be started.

    Attributes:
        recipe: file of the recipe.
        settings: its command line.
        hosts: in the order of their ranks; a single one of no name is this machine.
        on_gpu: whether a rank has a GPU.
        hostfile: that names the hosts; None for this machine, and for Slurm.
        include, exclude: which part of the hostfile, as ``deepspeed`` writes it.
        master_addr: where all hosts reach the first one; empty for its name.
        master_port: of the rendezvous; None for the launcher's own choice.
        environ: of the ranks, besides what they inherit.
        slurm: options of ``sbatch`` or ``srun``, besides those of the numbers of nodes and ranks.
        fewest_nodes: that a Slurm job may run on, where it may be fewer than there are hosts; else None.
    """

    recipe: str
    settings: tuple[str, ...]
    hosts: tuple[Host, ...]
    on_gpu: bool
    hostfile: Path | None = None
    include: str = ""
    exclude: str = ""
    master_addr: str = ""
    master_port: int | None = None
    environ: Mapping[str, str] = field(default_factory=dict)
    slurm: tuple[str, ...] = ()
    fewest_nodes: int | None = None

    @property
    def num_ranks(self) -> int:
        return sum(host.num_ranks for host in self.hosts)

    @property
    def rendezvous(self) -> tuple[str, int]:
        """Where the ranks of several hosts meet."""
        return self.master_addr or self.hosts[0].name, self.master_port or DEFAULT_PORT

    @property
    def script(self) -> list[str]:
        return [self.recipe, *self.settings]


@dataclass(frozen=True)
class Command:
    """One command line.

    Attributes:
        argv: the words.
        environ: variables to set for it.
        host: where it is typed; empty for here.
        carried: what has to be in the file that ``DS_ENV_FILE`` names; None for no file.
    """

    argv: tuple[str, ...]
    environ: Mapping[str, str] = field(default_factory=dict)
    host: str = ""
    carried: Carried | None = None

    def __str__(self) -> str:
        """Shell text to copy."""
        variables = dict(self.environ)
        lines = []
        if self.carried:
            lines.append(self.carried.shell_text(ENVIRONMENT_FILE))
            variables = {"DS_ENV_FILE": f"$PWD/{ENVIRONMENT_FILE}"} | variables
        words = [f'{k}="{v}"' if v.startswith("$PWD") else f"{k}={shlex.quote(v)}" for k, v in variables.items()]
        return "\n".join([*lines, " ".join([*words, shlex.join(self.argv)])])


def deepspeed(request: Request) -> list[Command]:
    """DeepSpeed's launcher: on this machine, or by pdsh on the hosts of the hostfile."""
    if request.hostfile is None:
        number = "--num_gpus" if request.on_gpu else "--num_accelerators"
        port = _flag("--master_port", request.master_port)
        argv = ["deepspeed", number, str(request.num_ranks), *port, *request.script]
        return [Command(tuple(argv), request.environ)]
    argv = ["deepspeed", "--hostfile", str(request.hostfile), *_selected(request), *_master(request)]
    local = len(request.hosts) == 1 and is_this_host(request.hosts[0].name)
    if local:
        argv.append("--no_ssh_check")  # ranks of this host need no ssh, and DeepSpeed would ask for it
    elif len(request.hosts) == 1:
        argv.append("--force_multi")
    if local:
        return [Command((*argv, *request.script), request.environ)]
    words = [through_pdsh(word) for word in request.script]
    return [Command((*argv, *words), carried=carried(request.environ))]


def deepspeed_openmpi(request: Request) -> list[Command]:
    """DeepSpeed's launcher with ``mpirun``, which tells each rank its number and nothing else.

    Raises:
        ConfigError: for a part of a hostfile: DeepSpeed's OpenMPI has none.
    """
    if request.hostfile is None:
        raise _refuse("deepspeed-openmpi", "has no hostfile", "give one: --hostfile hostfiles/2x8")
    if request.include or request.exclude:
        raise _refuse("deepspeed-openmpi", "takes all hosts of a hostfile", "leave --include and --exclude out")
    options = ["--bind-to", "none"]  # else a rank and the workers that read its data share one core
    options += ["--allow-run-as-root"] if os.geteuid() == 0 else []
    if interface := request.environ.get(INTERFACE):
        options += ["--mca", "btl_tcp_if_include", interface]
    # With the =, because argparse takes a value that begins with a dash for a flag.
    argv = ["deepspeed", "--hostfile", str(request.hostfile), "--launcher", "openmpi"]
    argv += [f"--launcher_args={shlex.join(options)}", *_master(request), *_forced(request), *request.script]
    address, port = request.rendezvous
    extra = {"MASTER_ADDR": address, "MASTER_PORT": str(port), **request.environ}
    return [Command(tuple(argv), carried=carried(extra, unsafe=QUOTED))]


def torchrun(request: Request) -> list[Command]:
    """One command a host; the numbers of ranks may differ."""
    if request.hostfile is None:
        port = ["--master_port", str(request.master_port)] if request.master_port else ["--standalone"]
        argv = ["torchrun", *port, "--nproc_per_node", str(request.num_ranks), *request.script]
        return [Command(tuple(argv), request.environ)]
    commands = []
    for number, host in enumerate(request.hosts):
        place = ["--nnodes", str(len(request.hosts)), "--node_rank", str(number)]
        argv = ["torchrun", *place, "--nproc_per_node", str(host.num_ranks), *_master(request), *request.script]
        commands.append(Command(tuple(argv), _visible(host, request), host.name))
    return commands


def accelerate(request: Request) -> list[Command]:
    """One command a host. DeepSpeed's JSON is the recipe's; accelerate starts the ranks and does no more.

    Raises:
        ConfigError: if the hosts have different numbers of ranks: accelerate divides the sum by the hosts.
    """
    numbers = {host.num_ranks for host in request.hosts}
    if len(numbers) > 1:
        raise _refuse("accelerate", "starts the same number of ranks on every host", "use deepspeed or torchrun")
    address, port = request.rendezvous
    commands = []
    for number, host in enumerate(request.hosts):
        argv = ["accelerate", "launch", "--use_deepspeed", "--deepspeed_multinode_launcher", "standard"]
        argv += ["--num_machines", str(len(request.hosts)), "--num_processes", str(request.num_ranks)]
        argv += ["--mixed_precision", "no", "--dynamo_backend", "no"]  # both are the recipe's; unsaid, it warns
        if request.hostfile is not None:
            argv += ["--machine_rank", str(number), "--main_process_ip", address, "--same_network"]
        argv += ["--main_process_port", str(port), *request.script]
        commands.append(Command(tuple(argv), _visible(host, request), host.name))
    return commands


def srun(request: Request) -> list[Command]:
    """One task a rank, in the allocation that this command is typed in."""
    ranks = request.hosts[0].num_ranks
    size: tuple[str, ...] = (f"--nodes={len(request.hosts)}", f"--ntasks-per-node={ranks}", _gpus(request))
    if processors := os.environ.get("SLURM_CPUS_PER_TASK"):  # of the allocation; from version 22.05 srun passes over it
        size = (*size, f"--cpus-per-task={processors}")
    argv = ["srun", "--kill-on-bad-exit=1", *size, *request.slurm, "python", *request.script]
    return [Command(tuple(argv), request.environ)]


def sbatch(request: Request, script: str) -> list[Command]:
    """The batch job of ``recipes/slurm/``, which starts the tasks and survives preemption.

    The ranks of a node are handed to the script and not to Slurm, which would keep the number of tasks when a node is
    lost: the job could not go on with those that are left.
    """
    most = len(request.hosts)
    nodes = f"{request.fewest_nodes}-{most}" if request.fewest_nodes else str(most)
    argv = ["sbatch", f"--nodes={nodes}", _gpus(request), *request.slurm, script, *request.script]
    return [Command(tuple(argv), {RANKS_PER_NODE: str(request.hosts[0].num_ranks), **request.environ})]


def through_pdsh(word: str) -> str:
    """What ``deepspeed`` has to be given for the shells of the hosts to make this word of it.

    Raises:
        ConfigError: for a word that no quoting brings through.
    """
    if re.search(r"\n|%[hnu%]", word) or (" " in word and re.search(r"[$`\\]", word)):
        what = f"{word!r} does not pass pdsh, which knows %h, %n and %u, and a shell on each host"
        raise ConfigError(Problem("settings", what, "put it into a YAML file (--config), or use torchrun"))
    return word if " " in word else shlex.quote(word)  # DeepSpeed puts one with a blank into double quotes


def is_this_host(name: str) -> bool:
    """Whether a hostfile's name is that of this machine, with or without its domain."""
    here = socket.gethostname().lower()
    return name.lower() in ("localhost", "127.0.0.1", here, here.split(".")[0]) or name.lower().split(".")[0] == here


def _selected(request: Request) -> list[str]:
    return [*_flag("--include", request.include), *_flag("--exclude", request.exclude)]


def _master(request: Request) -> list[str]:
    address, port = request.rendezvous
    return ["--master_addr", address, "--master_port", str(port)]


def _forced(request: Request) -> list[str]:
    return ["--force_multi"] if len(request.hosts) == 1 else []


def _flag(name: str, value: object) -> list[str]:
    return [name, str(value)] if value else []


def _visible(host: Host, request: Request) -> Mapping[str, str]:
    """The environment of a host's ranks; it names the GPUs where they are not simply the first ones."""
    if not request.on_gpu or host.slots == tuple(range(host.num_ranks)):
        return request.environ
    return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, host.slots)), **request.environ}


def _gpus(request: Request) -> str:
    return f"--gpus-per-node={request.hosts[0].num_ranks if request.on_gpu else 0}"


def _refuse(launcher: str, what: str, instead: str) -> ConfigError:
    return ConfigError(Problem("--launcher", f"{launcher} {what}", instead))
