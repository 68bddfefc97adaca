"""Before the first step: do all ranks run the same thing, and how fast are their hosts and links?

Ranks that differ in their code, packages, settings or data do not fail. They train something that nobody asked for, or
wait for each other without end. So every rank says what it has; where they differ, all of them stop and the hosts are
named. What they agree on, and what was measured, is one table.
"""

from __future__ import annotations

import hashlib
import json
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from moe_scale.errors import Problem, raise_if
from moe_scale.parallel.bandwidth import GroupRate, measure
from moe_scale.parallel.collectives import host_group
from moe_scale.parallel.groups import ParallelGroups
from moe_scale.settings import to_dict
from moe_scale.telemetry.provenance import commit_of, package_versions
from moe_scale.train.recipe import Job

CLOCK_ROUNDS = 5
CLOCK_TOLERANCE_S = 1.0
"""Clocks that are further apart are worth a remark: the lines of their logs cannot be put in order."""

HOSTS_NAMED = 8
"""In a message; the others are counted."""

HOSTS_SHOWN = 16
"""In the table of a run; ``moe-scale doctor`` shows all."""

REMEDY = {
    "code": "bring the same files to all hosts",
    "commit": "bring the same commit to all hosts",
    "settings": "start all ranks with the same command and files",
    "data": "give all hosts the same files",
}
"""What would be right, by fact. For a package: the same version."""


@dataclass(frozen=True)
class RankFacts:
    """What one rank runs on and with, in plain values.

    Attributes:
        rank: its number.
        host: its name.
        device: the name of its device.
        same: what has to be the same on all ranks that have it, by name.
        device_free: bytes of free memory on the device; None where that is the host's.
        host_free: bytes of memory that are available on the host.
        clock_s: seconds that the host's clock is ahead of rank 0's.
    """

    rank: int
    host: str
    device: str
    same: Mapping[str, str]
    device_free: int | None
    host_free: int
    clock_s: float = 0.0


@dataclass(frozen=True)
class Preflight:
    """All that was found out, the same on every rank."""

    ranks: list[RankFacts]
    rates: list[GroupRate]

    def remarks(self) -> list[str]:
        """What does not stop a run but its owner should know, one sentence each."""
        found = []
        hosts_of = _places([(rank.device, rank.rank, rank.host) for rank in self.ranks])
        if len(hosts_of) > 1:
            found.append(f"the devices differ, and the slowest sets the pace: {_listed(hosts_of)}")
        for host, ranks in _by_host(self.ranks).items():
            if abs(ranks[0].clock_s) > CLOCK_TOLERANCE_S:
                where = "ahead of" if ranks[0].clock_s > 0 else "behind"
                found.append(f"the clock of {host} is {abs(ranks[0].clock_s):.1f} s {where} that of rank 0's host")
        return found

    def show(self, console: Console, *, all_hosts: bool = False) -> None:
        """Print the hosts, what is the same on all of them, and the rates of the groups."""
        by_host = _by_host(self.ranks)
        shown = list(by_host.items())[: len(by_host) if all_hosts else HOSTS_SHOWN]
        hosts = Table("host", "ranks", "device", "free memory", "of the host", "clock", box=None, pad_edge=False)
        for host, ranks in shown:
            device_free = min((rank.device_free for rank in ranks if rank.device_free is not None), default=None)
            hosts.add_row(
                host,
                _ranges([rank.rank for rank in ranks]),
                ", ".join(dict.fromkeys(rank.device for rank in ranks)),
                "" if device_free is None else _gib(device_free),
                _gib(min(rank.host_free for rank in ranks)),
                f"{ranks[0].clock_s:+.3f} s",
            )
        console.print(hosts)
        if len(shown) < len(by_host):
            console.print(f"and {len(by_host) - len(shown)} more hosts: moe-scale doctor shows all", highlight=False)
        same = ", ".join(f"{name} {value}" for name, value in self.ranks[0].same.items() if value != "none")
        console.print(f"the same on all ranks: {same}", highlight=False, soft_wrap=True)
        if self.rates:
            rates = Table("group", "ranks", "groups", "all-reduce", "all-to-all", box=None, pad_edge=False)
            for rate in self.rates:
                speeds = (f"{speed / 1e9:.2f} GB/s" for speed in (rate.all_reduce, rate.all_to_all))
                rates.add_row(rate.name, str(rate.size), str(rate.count), *speeds)
            console.print(rates)

    def record(self) -> dict[str, Any]:
        """The same as JSON."""
        hosts = [
            {
                "host": host,
                "ranks": _ranges([rank.rank for rank in ranks]),
                "devices": [rank.device for rank in ranks],
                "device_free": [rank.device_free for rank in ranks],
                "host_free": min(rank.host_free for rank in ranks),
                "clock_s": ranks[0].clock_s,
            }
            for host, ranks in _by_host(self.ranks).items()
        ]
        return {"hosts": hosts, "same": dict(self.ranks[0].same), "groups": [asdict(rate) for rate in self.rates]}


def check_environment(job: Job, recipe_file: Path | None = None) -> list[RankFacts]:
    """What every rank runs on and with, by rank. All ranks call it together, once the process group is up.

    Args:
        job: what is to be run.
        recipe_file: whose content has to be the same; the script that was started unless given.

    Raises:
        ConfigError: on all ranks, where code, packages or settings differ; the hosts are named.
    """
    mine = _facts(job, recipe_file)
    # Plain text first: ranks of different commits may not know each other's classes.
    problems = _differences(_from_all({"host": mine.host, "same": dict(mine.same)}))
    if any(problem.where == "hosts: settings" for problem in problems):
        problems = [p for p in problems if p.where != "hosts: settings"] + _different_settings(job)
    raise_if(problems)
    return _from_all(replace(mine, clock_s=_clock_offset()))


def complete(facts: list[RankFacts], data_fingerprint: str, groups: ParallelGroups) -> Preflight:
    """Add the data that this rank opened, and measure the groups. All ranks call it together.

    Raises:
        ConfigError: on all ranks, where the data is not the same.
    """
    mine = facts[dist.get_rank()]
    everyones: list[RankFacts] = _from_all(replace(mine, same={**mine.same, "data": data_fingerprint[:12]}))
    raise_if(_differences([{"host": rank.host, "same": rank.same} for rank in everyones]))
    return Preflight(everyones, measure(groups))


def tell(job: Job, found: Preflight, *, all_hosts: bool = False) -> None:
    """Print the table and the remarks, on rank 0."""
    if not job.launch.is_main:
        return
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120)
    found.show(console, all_hosts=all_hosts)
    for remark in found.remarks():
        console.print(f"note: {remark}", highlight=False, soft_wrap=True)


def _facts(job: Job, recipe_file: Path | None) -> RankFacts:
    settings = json.dumps(_settings(job), sort_keys=True, default=str)
    same = {name: version or "none" for name, version in package_versions().items()}
    same["backend"] = _backend(job.device.type)
    if job.launch.is_host_main:  # the others of a host would read the same files
        same |= _code(recipe_file)
    same["settings"] = hashlib.sha256(settings.encode()).hexdigest()[:12]
    host_free = psutil.virtual_memory().available
    return RankFacts(job.launch.rank, socket.gethostname(), job.device.name, same, _device_free(job), host_free)


def _device_free(job: Job) -> int | None:
    """Bytes that no process holds on this rank's device; None where that is the host's memory, or not known."""
    module = torch.get_device_module(job.device.type)
    return None if job.device.is_cpu or not hasattr(module, "mem_get_info") else int(module.mem_get_info()[0])


def _settings(job: Job) -> dict[str, Any]:
    """Settings and DeepSpeed JSON by dotted name."""

    def flat(node: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, Any]]:
        for name, value in node.items():
            if isinstance(value, Mapping):
                yield from flat(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", value

    return dict([*flat(to_dict(job.config), ""), *flat(job.plan.json, "deepspeed_config: ")])


def _backend(device_type: str) -> str:
    """Who communicates, with its version where it has one of its own."""
    name = str(dist.get_backend())
    nccl = getattr(torch.get_device_module(device_type), "nccl", None) if name == "nccl" else None
    return f"{name} {'.'.join(map(str, nccl.version()))}" if nccl else name


def _code(recipe_file: Path | None) -> dict[str, str]:
    """The content of the project and of the recipe, installed or in a checkout; and the commit, where git knows it."""
    package = Path(__file__).resolve().parents[1]
    script = recipe_file or Path(getattr(sys.modules["__main__"], "__file__", None) or __file__)
    digest = hashlib.sha256()
    for path in [*sorted(package.rglob("*.py")), script]:
        digest.update(path.name.encode() + path.read_bytes())
    commit = commit_of(package)
    return {"code": digest.hexdigest()[:12]} | ({"commit": commit[:12]} if commit else {})


def _clock_offset() -> float:
    """Seconds that this host's clock is ahead of rank 0's, as near as messages tell."""
    offsets = []
    for _ in range(CLOCK_ROUNDS):
        dist.barrier(group=host_group())
        offsets.append(time.time())
    zero = _from_all(offsets)[0]
    return min((mine - reference for mine, reference in zip(offsets, zero, strict=True)), key=abs)


def _from_all(mine: Any) -> list[Any]:
    everyones = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, mine, group=host_group())
    return everyones


def _differences(ranks: list[dict[str, Any]]) -> list[Problem]:
    """A problem for each fact that is not the same on all ranks that know it.

    Args:
        ranks: of each rank its ``host`` and, as ``same``, its facts by name.
    """
    found = []
    for name in dict.fromkeys(name for rank in ranks for name in rank["same"]):
        known = [
            (rank["same"][name], number, rank["host"]) for number, rank in enumerate(ranks) if name in rank["same"]
        ]
        if len({value for value, _, _ in known}) > 1:
            remedy = REMEDY.get(name, "install the same version on all hosts")
            found.append(Problem(f"hosts: {name}", _listed(_places(known)), remedy))
    return found


def _different_settings(job: Job) -> list[Problem]:
    """The settings, and keys of the DeepSpeed JSON, in which ranks differ."""
    settings = {name: str(value) for name, value in _settings(job).items()}
    everyones = _from_all({"host": socket.gethostname(), "same": settings})
    names = dict.fromkeys(name for rank in everyones for name in rank["same"])
    whole = [rank | {"same": {name: rank["same"].get(name, "not set") for name in names}} for rank in everyones]
    return [replace(problem, allowed=REMEDY["settings"]) for problem in _differences(whole)]


def _by_host(ranks: list[RankFacts]) -> dict[str, list[RankFacts]]:
    found: dict[str, list[RankFacts]] = defaultdict(list)
    for rank in ranks:
        found[rank.host].append(rank)
    return found


def _places(known: list[tuple[str, int, str]]) -> dict[str, list[str]]:
    """From (value, rank, host), the hosts that have each value; a rank too, where one host has several values."""
    values_of: dict[str, set[str]] = defaultdict(set)
    for value, _, host in known:
        values_of[host].add(value)
    found: dict[str, list[str]] = defaultdict(list)
    for value, rank, host in known:
        found[value].append(host if len(values_of[host]) == 1 else f"rank {rank} of {host}")
    return found


def _listed(hosts_of: Mapping[str, list[str]]) -> str:
    """``2.13.0 on n1, n2 and 6 more; 2.12.0 on n9``: the rarest last, and so next to what to do about it."""
    parts = []
    for value, hosts in sorted(hosts_of.items(), key=lambda item: -len(item[1])):
        names = list(dict.fromkeys(hosts))
        rest = len(names) - HOSTS_NAMED
        parts.append(f"{value} on {', '.join(names[:HOSTS_NAMED])}" + (f" and {rest} more" if rest > 0 else ""))
    return "; ".join(parts)


def _ranges(numbers: list[int]) -> str:
    """``0-7`` or ``0, 2, 4``."""
    first, last = min(numbers), max(numbers)
    if len(numbers) > 1 and sorted(numbers) == list(range(first, last + 1)):
        return f"{first}-{last}"
    return ", ".join(map(str, sorted(numbers)))


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
