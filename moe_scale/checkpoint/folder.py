"""The folder ``<run>/checkpoints``: which checkpoints there are, which are kept, and how one gets its name.

A checkpoint is written into ``.step_00000100.partial`` and renamed when every file is on the disk and checked, so what
has a name is complete. ``latest`` and ``best`` are links, set after that.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from moe_scale.checkpoint.files import sync_folder
from moe_scale.checkpoint.index import INDEX
from moe_scale.errors import ConfigError, Problem

_NAME = re.compile(r"step_([0-9]{8,})")


def checkpoints_of(run_dir: Path) -> Path:
    """The folder of a run's checkpoints."""
    return run_dir / "checkpoints"


def name_of(step: int) -> str:
    return f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """The step that a checkpoint's name says; -1 for any other folder."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else -1


def complete(run_dir: Path) -> list[Path]:
    """The checkpoints of a run that have a name, newest first. They are not looked into."""
    folder = checkpoints_of(run_dir)
    found = [path for path in folder.glob("step_*") if step_of(path) >= 0 and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a user means by a path: itself, or the newest of a run.

    Raises:
        ConfigError: if there is none.
    """
    if (path / INDEX).exists():
        return path.resolve()
    if found := complete(path):
        return found[0]
    raise ConfigError(
        Problem(str(path), "holds no checkpoint", "a run's folder, or one of its checkpoints/step_*", True)
    )


def partial_of(folder: Path) -> Path:
    """Where a checkpoint is written before it gets its name."""
    return folder.with_name(f".{folder.name}.partial")


def begin(folder: Path) -> Path:
    """Make an empty partial folder for a checkpoint, in the place of one that was cut off."""
    partial = partial_of(folder)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    return partial


def finish(folder: Path) -> None:
    """Give the partial folder its name, and point ``latest`` at it."""
    sync_folder(partial_of(folder))
    # The same step may be there, of a run that went back.
    replaced = set_aside(folder, "replaced") if folder.exists() else None
    partial_of(folder).rename(folder)
    sync_folder(folder.parent)
    point(folder.parent / "latest", folder)
    if replaced:
        shutil.rmtree(replaced, ignore_errors=True)


def point(link: Path, folder: Path) -> None:
    """Make ``link`` a link to a checkpoint beside it, in one move."""
    aside = link.with_name(f".{link.name}.new")
    aside.unlink(missing_ok=True)
    aside.symlink_to(folder.name)
    os.replace(aside, link)


def set_aside(folder: Path, why: str) -> Path:
    """Rename a checkpoint so that it is not used again, without losing it."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{why}-{number}")).exists():
        number += 1
    folder.rename(aside)
    return aside


def prune(run_dir: Path, *, keep_last: int, keep_every: int, keep: Collection[str]) -> list[Path]:
    """Delete checkpoints beyond the newest ``keep_last`` (0: none is deleted). Returns those deleted.

    Args:
        keep_every: multiples of so many steps stay; 0: none for that.
        keep: names that stay.
    """
    if not keep_last:
        return []
    deleted = []
    for folder in complete(run_dir)[keep_last:]:
        if folder.name in keep or (keep_every and step_of(folder) % keep_every == 0):
            continue
        # Renamed first: a deletion that is cut off must not leave half a checkpoint with a name.
        doomed = folder.with_name(f".{folder.name}.deleted")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
        deleted.append(folder)
    return deleted


def sweep(run_dir: Path) -> None:
    """Remove what runs that were cut off left behind. One process, before anything is read or written.

    Raises:
        OSError: if a checkpoint that was to be replaced, and was not, cannot be given its name back.
    """
    folder = checkpoints_of(run_dir)
    set_apart = folder.glob("step_*.replaced-[0-9]*")
    for replaced in sorted(set_apart, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        whole = replaced.with_name(replaced.name.partition(".")[0])
        if not whole.exists():  # cut off between the two renames of finish()
            replaced.rename(whole)
    for pattern in (".step_*.partial", ".step_*.deleted", "step_*.replaced-*"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
