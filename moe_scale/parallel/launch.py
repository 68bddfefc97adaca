"""Which rank this process is, under every launcher: deepspeed (pdsh, OpenMPI), torchrun, accelerate, srun, or none."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from moe_scale.errors import ConfigError, Problem, raise_if

INTERFACE = "MOE_SCALE_INTERFACE"
"""The variable that names the network interface of the ranks, the same on every host: ``eth0``, ``ib0``."""

_BASE_PORT = 29500
_PORT_RANGE = 2000


@dataclass(frozen=True)
class Launch:
    """This process's place in the job.

    ``launcher`` is ``env`` (deepspeed by pdsh, torchrun, accelerate), ``srun``, ``mpirun`` (deepspeed by OpenMPI) or
    ``none``.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launcher: str

    @property
    def is_main(self) -> bool:
        """Rank 0 of the job."""
        return self.rank == 0

    @property
    def is_host_main(self) -> bool:
        """The first rank of its host."""
        return self.local_rank == 0

    @property
    def num_nodes(self) -> int:
        return -(-self.world_size // self.local_world_size)


def detect(environ: Mapping[str, str] | None = None) -> Launch:
    """Read the launcher's variables. Does not change the environment.

    Raises:
        ConfigError: if a launcher's variables are there but incomplete, not numbers, or contradict each other.
    """
    env = os.environ if environ is None else environ
    if "RANK" in env or "WORLD_SIZE" in env:
        rank, world = _number(env, "RANK"), _number(env, "WORLD_SIZE")
        local_rank = _number(env, "LOCAL_RANK", default=rank)
        local_world = _number(env, "LOCAL_WORLD_SIZE", default=_local_world(env, world))
        return _consistent(Launch(rank, world, local_rank, local_world, "env"))
    # A batch script sees SLURM_PROCID too; only a step that srun started has SLURM_STEP_NUM_TASKS.
    if "SLURM_STEP_NUM_TASKS" in env and "SLURM_PROCID" in env and _number(env, "SLURM_STEP_NUM_TASKS") > 0:
        world = _number(env, "SLURM_STEP_NUM_TASKS")
        tasks_here = env.get("SLURM_STEP_TASKS_PER_NODE", str(world))
        local_world = _slurm_tasks_on_node(tasks_here, _number(env, "SLURM_NODEID", default=0))
        rank, local_rank = _number(env, "SLURM_PROCID"), _number(env, "SLURM_LOCALID")
        return _consistent(Launch(rank, world, local_rank, local_world, "srun"))
    if env.get("OMPI_COMM_WORLD_SIZE", "1") != "1":
        names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
        rank, world, local_rank, local_world = (_number(env, f"OMPI_COMM_WORLD_{name}") for name in names)
        return _consistent(Launch(rank, world, local_rank, local_world, "mpirun"))
    return Launch(0, 1, 0, 1, "none")


def _consistent(launch: Launch) -> Launch:
    """``launch``, unless no job could have such ranks; they would wait for each other until a timeout."""
    prefix, size = {"srun": ("SLURM: ", "number of tasks"), "mpirun": ("OMPI_COMM_WORLD: ", "number of ranks")}.get(
        launch.launcher, ("", "WORLD_SIZE")
    )
    problems = [
        Problem(f"{prefix}{name}", f"{rank} does not fit a {local}{size} of {ranks}", "ranks count from 0")
        for name, local, rank, ranks in (
            ("rank", "", launch.rank, launch.world_size),
            ("local rank", "local ", launch.local_rank, launch.local_world_size),
        )
        if not rank < ranks
    ]
    raise_if(problems)
    return launch


def export(launch: Launch) -> None:
    """Set the variables that ``torch.distributed`` rendezvous reads, where the launcher has not set them.

    Raises:
        ConfigError: if ``MOE_SCALE_INTERFACE`` names none of this host's, or mpirun's ranks lack the address of rank 0.
    """
    _choose_interface()
    defaults = {
        "RANK": launch.rank,
        "WORLD_SIZE": launch.world_size,
        "LOCAL_RANK": launch.local_rank,
        "LOCAL_WORLD_SIZE": launch.local_world_size,
        # On a CPU, DeepSpeed otherwise starts a process to count NUMA nodes, at every gradient reduction.
        "LOCAL_SIZE": launch.local_world_size,
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, str(value))
    if launch.launcher == "srun":
        os.environ.setdefault("MASTER_ADDR", _first_slurm_host(os.environ))
        # The same on every rank, and different for jobs and steps that share a node.
        job, step = (_number(os.environ, name, default=0) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
        os.environ.setdefault("MASTER_PORT", str(_BASE_PORT + (job * 7 + step) % _PORT_RANGE))
    elif launch.launcher == "mpirun":
        if "MASTER_ADDR" not in os.environ and launch.num_nodes > 1:
            how = "write MASTER_ADDR=HOST into the file that DS_ENV_FILE names, as moe-scale launch does"
            raise ConfigError(Problem("MASTER_ADDR", "mpirun does not tell its ranks where rank 0 is", how))
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(_BASE_PORT))
    elif launch.launcher == "none":
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(_free_port()))


def _choose_interface() -> None:
    """Let gloo and NCCL talk over the interface that ``MOE_SCALE_INTERFACE`` names, under every launcher."""
    name = os.environ.get(INTERFACE)
    if not name:
        return
    known = [interface for _, interface in socket.if_nameindex()]
    if name not in known:
        here = f"{name!r} is no network interface of this host"
        raise ConfigError(Problem(INTERFACE, here, f"choose one of {', '.join(known)}", this_host_only=True))
    for library in ("GLOO", "NCCL"):
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", name)


def _first_slurm_host(env: Mapping[str, str]) -> str:
    """The first host of a Slurm node list such as ``gpu[003-005,9],login1`` or ``rack[1-2]n[01-16]-ib``."""
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "127.0.0.1"
    return re.sub(r"\[([^\],-]*)[^\]]*\]|,.*", r"\1", nodes)


def _slurm_tasks_on_node(spec: str, node: int) -> int:
    """Entry ``node`` of a Slurm count list such as ``2(x3),1``; the last one where the list is shorter."""
    count = 0
    for part in spec.split(","):
        match = re.fullmatch(r"([0-9]+)(?:\(x([0-9]+)\))?", part.strip())
        if not match:
            raise ConfigError(Problem("SLURM_STEP_TASKS_PER_NODE", f"{spec!r}", "Slurm sets it to a list as 2(x3),1"))
        count, node = int(match[1]), node - int(match[2] or 1)
        if node < 0:
            break
    return count


def _local_world(env: Mapping[str, str], world: int) -> int:
    # DeepSpeed's launcher sets LOCAL_SIZE with some runners; without either, one host is the best guess.
    return _number(env, "LOCAL_SIZE", default=world)


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name)
    if text is None and default is not None:
        return default
    if text is None or not (text.isascii() and text.isdigit()):
        what = "the environment variable is not set" if text is None else f"the environment variable is {text!r}"
        remedy = {"SLURM": "let srun start the ranks", "OMPI_": "start the ranks with moe-scale launch"}.get(
            name[:5], "unset RANK and WORLD_SIZE to run one process"
        )
        raise ConfigError(Problem(name, what, f"a launcher sets it to a number; {remedy}"))
    return int(text)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
