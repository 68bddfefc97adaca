"""One start at a time in a folder: a lock that the system takes back when its process dies, however it dies.

On NFS, Linux asks the server for the lock, so that starts on other hosts are refused too, unless the folder is mounted
with ``nolock`` or ``local_lock``. A host that is lost keeps its locks there until the server gives them up: with NFSv4
after a lease of about 90 seconds, with NFSv3 once the host is up again.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Any

from moe_scale.errors import ConfigError, Problem

NAME = ".lock"

LEASE_S = 120.0
"""How long a lock of another host is waited for: that host may be lost, and this the start that takes its place."""

POLL_S = 1.0

_held: set[FileIO] = set()


@contextlib.contextmanager
def alone_in(folder: Path, others: str, instead: str = "wait for its end") -> Iterator[int | None]:
    """Keep other starts out of a folder, which is made if need be, while the block runs.

    Args:
        folder: where the lock's file is.
        others: who may hold it, for the message: ``another run``.
        instead: what its user can do.

    Yields:
        the lock's file descriptor, for processes that are to keep the folder when this one dies; None where there is
        no lock: a folder that cannot be written is told of by what is written next, a file system without locks here.

    Raises:
        ConfigError: at ``output_dir``, if others hold it: by which process of which host, and since when.
    """
    made = _make(folder)
    try:
        file = _take(folder, others, instead)
        try:
            yield file.fileno() if file else None
        finally:
            if file:
                _give_back(folder / NAME, file)
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # unless something was written there
                path.rmdir()


def _make(folder: Path) -> list[Path]:
    """Make a folder. Returns those that were not there, the innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return missing


def _take(folder: Path, others: str, instead: str) -> FileIO | None:
    try:
        import fcntl  # noqa: F401 - not on every platform
    except ImportError:
        return None
    path, deadline, waits = folder / NAME, time.monotonic() + LEASE_S, False
    while True:
        try:
            file = _lock(path)
            break
        except BlockingIOError:
            holder = _holder(path)
        except OSError as error:
            if path.exists():
                print(f"note: {folder} has no locks ({error.strerror}): another start in it would not be noticed")
            return None
        if holder.get("host") == socket.gethostname() or time.monotonic() > deadline:
            raise ConfigError(_taken(folder, holder, others, instead))
        if not waits:
            who = f"{folder} is in use by {others}{_said(holder)}"
            print(f"{who}: waiting {LEASE_S:.0f} seconds, in case that host is lost", flush=True)
            waits = True
        time.sleep(POLL_S)
    _held.add(file)
    _sign(file)
    return file


def _lock(path: Path) -> FileIO:
    """The locked file.

    Raises:
        BlockingIOError: if others hold it.
        OSError: if it cannot be opened, or cannot be locked here.
    """
    import fcntl

    while True:
        file = open(path, "ab", buffering=0)  # noqa: SIM115 - _give_back() closes it
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                return file
        except FileNotFoundError:
            pass  # who had it has just given it back, file and all
        except OSError:
            file.close()
            raise
        file.close()


def _sign(file: FileIO) -> None:
    """Say in the file who holds it."""
    since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    with contextlib.suppress(OSError):  # a full disk: the lock itself takes no room
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "process": os.getpid(), "since": since}).encode())


def _give_back(path: Path, file: FileIO) -> None:
    _held.discard(file)
    file.close()
    with contextlib.suppress(OSError):
        last = _lock(path)  # not where a process that was given the lock still has it, or another start has it now
        path.unlink()
        last.close()


def _holder(path: Path) -> dict[str, Any]:
    """What the holder says of itself; nothing in the moment before it does."""
    with contextlib.suppress(OSError, ValueError):
        if isinstance(found := json.loads(path.read_text()), dict):
            return found
    return {}


def _said(holder: dict[str, Any]) -> str:
    return ", process {process} on host {host}, since {since}".format(**holder) if holder else ""


def _taken(folder: Path, holder: dict[str, Any], others: str, instead: str) -> Problem:
    if holder and holder["host"] != socket.gethostname():
        instead += f", or remove {folder / NAME} if that host is lost for good"
    return Problem("output_dir", f"{folder} is in use by {others}{_said(holder)}", instead)


def _close_in_child() -> None:
    """A lock belongs to an opened file, which forked processes share, such as those that load data: they would keep
    it for seconds after this one is killed."""
    for file in _held:
        file.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
