"""Folders that are built once, whoever comes first, and are either complete or not there."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from moe_scale.errors import ConfigError, Problem

if TYPE_CHECKING:
    from hashlib import _Hash

MANIFEST = "manifest.json"
"""The file that a complete folder has."""

_HASHED_BYTES = 64 * 2**20


def digest_files(digest: _Hash, files: list[Path], root: Path) -> None:
    """Add the names of ``files``, relative to ``root``, and their content to ``digest``.

    Files of up to 64 MiB together go by their content, larger ones by size and time of change.

    Raises:
        ConfigError: at ``data.source``, when a file cannot be read.
    """
    by_content = sum(file.stat().st_size for file in files) <= _HASHED_BYTES
    for file in files:
        stat = file.stat()
        digest.update(f"{str(file.relative_to(root))!r} {stat.st_size} ".encode(errors="surrogateescape"))
        try:
            digest.update(hashlib.sha256(file.read_bytes()).digest() if by_content else str(stat.st_mtime_ns).encode())
        except OSError as error:
            raise ConfigError(Problem("data.source", f"cannot read {file} ({error.strerror})", "", True)) from error


def build_once(folder: Path, build: Callable[[Path], None], say: Callable[[str], None]) -> None:
    """Make ``folder`` with ``build`` unless it is there already.

    ``build`` fills a folder beside it, which is renamed at the end: a reader sees all of it or nothing, and a process
    that dies leaves nothing in the way. Processes of one host wait for the one that builds. Hosts that share the
    file system but not its locks may build at the same time; the first to finish wins and the results are equal.

    Args:
        folder: where the result belongs.
        build: fills the (existing, empty) folder that it is given, :data:`MANIFEST` included.
        say: told when this process waits for another.

    Raises:
        ConfigError: at ``data.cache_dir``, when the folder cannot be written.
    """
    if (folder / MANIFEST).is_file():
        return
    prefix = f"{folder.name}.tmp-{socket.gethostname()}-"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.with_name(folder.name + ".lock"), say) as locked:
            if (folder / MANIFEST).is_file():
                return
            if locked:  # nobody else of this host is building, so what is half built was left by a dead process
                for leftover in folder.parent.glob(prefix + "*"):
                    shutil.rmtree(leftover, ignore_errors=True)
            aside = folder.with_name(f"{prefix}{uuid.uuid4().hex}")
            aside.mkdir()
            try:
                build(aside)
                _rename(aside, folder)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise ConfigError(
            Problem(
                "data.cache_dir",
                f"cannot write to {folder.parent} ({error.strerror or error})",
                "choose a folder with free space that this user may write to",
                this_host_only=True,
            )
        ) from error


def _rename(aside: Path, folder: Path) -> None:
    try:
        os.rename(aside, folder)
    except OSError:
        if not (folder / MANIFEST).is_file():  # not simply that another host was first
            raise


@contextlib.contextmanager
def _lock(path: Path, say: Callable[[str], None]) -> Iterator[bool]:
    """Hold an advisory lock that the system gives back when the process ends; False where there are no locks."""
    try:
        import fcntl
    except ImportError:  # not on this platform
        yield False
        return
    with open(path, "a") as file:
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"waiting for another process that prepares {path.with_suffix('')}")
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # some network file systems have no locks
            yield False
            return
        yield True
