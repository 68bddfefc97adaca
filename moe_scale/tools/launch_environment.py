"""The variables that ranks on other hosts need.

pdsh and mpirun hand few of this shell's on; DeepSpeed takes the others from a file, ``~/.deepspeed_env`` or the one
that ``DS_ENV_FILE`` names. A launch writes a file of its own: what the user's holds, unseen, and what is added here.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from moe_scale.errors import ConfigError, Problem, raise_if
from moe_scale.parallel.launch import INTERFACE
from moe_scale.telemetry.provenance import hide

CARRIED = ("PATH", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "DS_ACCELERATOR", "DEEPSPEED_TIMEOUT", INTERFACE)
CARRIED_PREFIXES = ("GLOO_", "NCCL_", "HF_", "MOE_SCALE_", "TORCH_", "TRITON_", "WANDB_")
_SECRET = re.compile(r"TOKEN(?!IZER)|KEY|SECRET|PASS(W|PHRASE)|CREDENTIAL|(?<![A-Z])AUTH(?![A-Z])", re.IGNORECASE)
"""Names that are not carried, besides what ``run.json`` hides: pdsh shows values on command lines that all can read."""

READ_BY_SHELLS = re.compile(r'["$`\\\n]')
"""Characters that DeepSpeed does not quote for pdsh."""
QUOTED = re.compile(r"[^\w@%+=:,./-]")
"""Characters that DeepSpeed puts a value in quotes for, which no shell takes off under mpirun."""


@dataclass(frozen=True)
class Carried:
    """What a launch's file of variables holds.

    Attributes:
        values: variables that are shown. They come last in the file, so that they win.
        users_files: taken over as they are, and never shown: a user may keep secrets there.
        held_back: names of this shell's variables that may be secrets and are not handed on.
    """

    values: Mapping[str, str] = field(default_factory=dict)
    users_files: tuple[Path, ...] = ()
    held_back: tuple[str, ...] = ()

    @property
    def lines(self) -> list[str]:
        """Of :attr:`values`, as DeepSpeed reads them."""
        return [f"{name}={value}" for name, value in self.values.items()]

    def shell_text(self, file: str) -> str:
        """A line of shell that writes the file, for this user alone."""
        taken_over = f"grep -h = -- {shlex.join(map(str, self.users_files))}; " if self.users_files else ""
        added = f"printf '%s\\n' {shlex.join(self.lines)}"
        return f"(umask 077; {{ {taken_over}{added}; }} > {file}.new && mv {file}.new {file})"

    def text(self) -> str:
        """The content of the file. Not to be printed."""
        users_lines = [line for path in self.users_files for line in path.read_text().splitlines()]
        return "".join(f"{line}\n" for line in [*users_lines, *self.lines])


def carried(extra: Mapping[str, str], unsafe: re.Pattern[str] = READ_BY_SHELLS) -> Carried:
    """This shell's variables that ranks need, but those that a user's own file names; and ``extra``, which wins.

    Raises:
        ConfigError: for a value with an ``unsafe`` character, which DeepSpeed would hand on changed, and for a line of
            the user's file that DeepSpeed could not read. No value is quoted.
    """
    files = _users_files()
    named = {name for path in files for name in _names(path, unsafe)}
    wanted = {
        name: value
        for name, value in {**os.environ, "PATH": search_path()}.items()
        if (name in CARRIED or name.startswith(CARRIED_PREFIXES)) and name not in named
    }
    held_back = tuple(sorted(name for name, value in wanted.items() if is_secret(name, value)))
    values = {name: value for name, value in wanted.items() if name not in held_back} | dict(extra)
    raise_if([_changed(name, found[0]) for name, value in values.items() if (found := unsafe.search(value))])
    return Carried(values, files, held_back)


def is_secret(name: str, value: str) -> bool:
    """Whether a variable may hold a secret, by its name or by a login in an address (``https://user:password@host``)."""
    return bool(_SECRET.search(name)) or hide(value, name) != value


def search_path() -> str:
    """PATH with this interpreter's folder first: ``python`` is this one, though its environment may not be active."""
    own, path = str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)
    return path if path.split(os.pathsep)[0] == own else f"{own}{os.pathsep}{path}"


def users_file_name() -> str:
    """What DeepSpeed reads if nobody tells it otherwise."""
    return os.environ.get("DS_ENV_FILE", "~/.deepspeed_env")


def _users_files() -> tuple[Path, ...]:
    """The files that DeepSpeed would read, in its order: in the home folder, and in this one."""
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    paths = {path.resolve(): path for folder in (Path("~").expanduser(), Path()) if (path := folder / name).is_file()}
    return tuple(paths.values())


def _names(path: Path, unsafe: re.Pattern[str]) -> list[str]:
    """The variables of a user's file."""
    names, problems = [], []
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not text"
        raise ConfigError(Problem(str(path), f"cannot be read: {why}", "DeepSpeed reads it for the ranks")) from None
    for number, line in enumerate(lines, 1):
        name, equals, value = line.partition("=")
        names.append(name.strip())
        if not equals:
            problems.append(Problem(f"{path}:{number}", "no =", "DeepSpeed wants NAME=VALUE on every line"))
        elif found := unsafe.search(value.strip()):
            problems.append(_changed(f"{path}:{number}, {name.strip()}", found[0]))
    raise_if(problems)
    return names


def _changed(where: str, character: str) -> Problem:
    what = f"the value would reach the other hosts changed, for its {character!r}"
    return Problem(where, what, "unset it, or set it without that character")
