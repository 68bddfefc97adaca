"""Which rank this process is, under every launcher: deepspeed, torchrun, srun, mpirun through deepspeed, or none."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from moe_scale.errors import ConfigError, Problem

_BASE_PORT = 29500
_PORT_RANGE = 2000


@dataclass(frozen=True)
class Launch:
    """This process's place in the job. ``launcher`` is ``env`` (deepspeed, torchrun), ``srun`` or ``none``."""

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
        ConfigError: if a launcher's variables are there but incomplete or not numbers.
    """
    env = os.environ if environ is None else environ
    if "RANK" in env or "WORLD_SIZE" in env:
        rank, world = _number(env, "RANK"), _number(env, "WORLD_SIZE")
        local_rank = _number(env, "LOCAL_RANK", default=rank)
        return Launch(
            rank, world, local_rank, _number(env, "LOCAL_WORLD_SIZE", default=_local_world(env, world)), "env"
        )
    # A batch script sees SLURM_PROCID too; only a step that srun started has SLURM_STEP_NUM_TASKS.
    if "SLURM_STEP_NUM_TASKS" in env and "SLURM_PROCID" in env and _number(env, "SLURM_STEP_NUM_TASKS") > 0:
        world = _number(env, "SLURM_STEP_NUM_TASKS")
        tasks_here = env.get("SLURM_STEP_TASKS_PER_NODE", str(world))
        return Launch(
            _number(env, "SLURM_PROCID"),
            world,
            _number(env, "SLURM_LOCALID"),
            _slurm_tasks_on_node(tasks_here, _number(env, "SLURM_NODEID", default=0)),
            "srun",
        )
    return Launch(0, 1, 0, 1, "none")


def export(launch: Launch) -> None:
    """Set the variables that ``torch.distributed`` rendezvous reads, where the launcher has not set them."""
    defaults = {
        "RANK": launch.rank,
        "WORLD_SIZE": launch.world_size,
        "LOCAL_RANK": launch.local_rank,
        "LOCAL_WORLD_SIZE": launch.local_world_size,
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, str(value))
    if launch.launcher == "srun":
        os.environ.setdefault("MASTER_ADDR", _first_slurm_host(os.environ))
        # The same on every rank, and different for jobs and steps that share a node.
        job, step = int(os.environ.get("SLURM_JOB_ID", 0)), int(os.environ.get("SLURM_STEP_ID", 0) or 0)
        os.environ.setdefault("MASTER_PORT", str(_BASE_PORT + (job * 7 + step) % _PORT_RANGE))
    elif launch.launcher == "none":
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(_free_port()))


def _first_slurm_host(env: Mapping[str, str]) -> str:
    """The first host of a Slurm node list such as ``gpu[003-005,9],login1``."""
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "127.0.0.1"
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+))?", nodes)
    return (match[1] + (match[2] or "")) if match else nodes


def _slurm_tasks_on_node(spec: str, node: int) -> int:
    """Entry ``node`` of a Slurm count list such as ``2(x3),1``."""
    counts: list[int] = []
    for part in spec.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match:
            counts += [int(match[1])] * int(match[2] or 1)
    return counts[min(node, len(counts) - 1)] if counts else 1


def _local_world(env: Mapping[str, str], world: int) -> int:
    # DeepSpeed's launcher sets LOCAL_SIZE with some runners; without either, one host is the best guess.
    return _number(env, "LOCAL_SIZE", default=world)


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdigit():
        raise ConfigError(
            Problem(
                name,
                f"the environment variable is {text!r}",
                "a launcher sets it to a number; unset RANK and WORLD_SIZE to run one process",
            )
        )
    return int(text)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
