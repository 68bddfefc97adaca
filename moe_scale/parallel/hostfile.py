"""Hostfiles: which hosts take part in a run, and how many ranks each of them starts.

One host a line, as ``node-1 slots=8``; ``#`` begins a comment. That is what ``deepspeed`` and ``mpirun`` read, too, but
this parser is stricter: DeepSpeed takes ``slots=8x`` for 8 and a host of no slots for one that is not there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_scale.errors import ConfigError, Problem, raise_if

MAX_SLOTS = 1024
_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_LINE = re.compile(rf"(?P<name>{_NAME})[ \t]+slots=(?P<slots>[0-9]{{1,9}})")
_SELECTED = re.compile(rf"(?P<name>{_NAME})(?::(?P<slots>[0-9]{{1,4}}(?:,[0-9]{{1,4}})*))?")


@dataclass(frozen=True)
class Host:
    """One host. ``slots`` are the numbers of its devices (on a CPU: of its ranks) that take part, one rank each."""

    name: str
    slots: tuple[int, ...]

    @property
    def num_ranks(self) -> int:
        return len(self.slots)


def read_hostfile(path: Path) -> list[Host]:
    """The hosts of a file, in its order, which is that of the ranks: the first host has rank 0.

    Raises:
        ConfigError: with every line that is wrong, and its number; or if the file cannot be read or names no host.
    """
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(Problem("hostfile", f"cannot read {path}: {why}", "for example hostfiles/2x8")) from None
    hosts: dict[str, Host] = {}
    problems: list[Problem] = []
    for number, line in enumerate(text.split("\n"), 1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        match = _LINE.fullmatch(content)
        if not match:
            problems.append(Problem(f"{path}:{number}", f"{content!r}", "write a host a line, as: node-1 slots=8"))
            continue
        name, slots = match["name"], int(match["slots"])
        if name.lower() in hosts:
            problems.append(Problem(f"{path}:{number}", f"{name} is named twice", "write each host once"))
        elif not 1 <= slots <= MAX_SLOTS:
            allowed = f"choose 1 to {MAX_SLOTS}, or remove the line"
            problems.append(Problem(f"{path}:{number}", f"slots={slots}", allowed))
        hosts[name.lower()] = Host(name, tuple(range(min(slots, MAX_SLOTS))))
    if not hosts and not problems:
        problems.append(Problem(str(path), "names no host", "write a host a line, as: node-1 slots=8"))
    raise_if(problems)
    return list(hosts.values())


def select(hosts: Sequence[Host], include: str = "", exclude: str = "") -> list[Host]:
    """Part of the hosts, as ``deepspeed --include`` and ``--exclude`` mean it.

    Args:
        hosts: of the hostfile.
        include: ``node-1@node-2:0,1`` takes all of one host and two slots of another; empty for all.
        exclude: the same, for what to leave out. Only one of the two can be given.

    Raises:
        ConfigError: for a host or slot that is not in the file, wrong syntax, or if nothing is left.
    """
    if include and exclude:
        raise ConfigError(Problem("--include, --exclude", "both are given", "give one of them"))
    flag, text = ("--include", include) if include else ("--exclude", exclude)
    if not text:
        return list(hosts)
    named = _selection(flag, text, {host.name: host for host in hosts})
    kept = []
    for host in hosts:
        chosen = named.get(host.name, ())
        slots = tuple(slot for slot in host.slots if (slot in chosen) == bool(include))
        if slots:
            kept.append(Host(host.name, slots))
    if not kept:
        raise ConfigError(Problem(flag, f"{text!r} leaves no slot", "leave at least one"))
    return kept


def _selection(flag: str, text: str, hosts: dict[str, Host]) -> dict[str, set[int]]:
    """The slots that a filter names, by host."""
    named: dict[str, set[int]] = {}
    problems = []
    for part in text.split("@"):
        match = _SELECTED.fullmatch(part)
        if not match:
            problems.append(Problem(flag, f"{part!r}", "write HOST or HOST:0,1, and @ between hosts"))
            continue
        host = hosts.get(match["name"])
        if host is None:
            problems.append(Problem(flag, f"{match['name']} is not in the hostfile", f"choose from {', '.join(hosts)}"))
            continue
        slots = {int(slot) for slot in match["slots"].split(",")} if match["slots"] else set(host.slots)
        problems += [
            Problem(flag, f"{host.name} has no slot {slot}", f"choose 0 to {host.slots[-1]}")
            for slot in sorted(slots - set(host.slots))
        ]
        named.setdefault(host.name, set()).update(slots)
    raise_if(problems)
    return named
