"""Save a run and continue it, on the same number of ranks.

A checkpoint is a folder ``<run>/checkpoints/step_00000100`` that DeepSpeed's engine fills; beside its files each rank
writes its position in the data, and rank 0 writes ``checkpoint.json`` last. A folder without that file is one that
was cut off while it was written, and is never loaded.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moe_scale.errors import ConfigError, Problem
from moe_scale.parallel.device import rng_states, set_rng_states

MARKER = "checkpoint.json"


def newest(run_dir: Path) -> Path | None:
    """The complete checkpoint of the most steps in the run's folder, if there is one."""
    complete = sorted(run_dir.glob(f"checkpoints/step_*/{MARKER}"))
    return complete[-1].parent if complete else None


def describe(path: Path) -> dict[str, Any]:
    """What ``checkpoint.json`` says: the step and how the run was spread.

    Raises:
        ConfigError: if the file cannot be read.
    """
    try:
        said = json.loads((path / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(Problem(str(path / MARKER), f"unreadable: {error}", this_host_only=True)) from None
    if not (isinstance(said, dict) and isinstance(said.get("step"), int) and isinstance(said.get("layout"), dict)):
        raise ConfigError(
            Problem(str(path / MARKER), "damaged: it does not say a step and a layout", this_host_only=True)
        )
    return said


def layout_problems(path: Path, layout: dict[str, Any]) -> list[Problem]:
    """How the run that wrote the checkpoint was spread differently from this one; DeepSpeed's files want the same."""
    saved = describe(path).get("layout", {})
    return [
        Problem(
            f"resume: {name}",
            f"the checkpoint {path.name} was written with {saved.get(name)}, this run has {value}",
            f"start with {name} = {saved.get(name)}",
        )
        for name, value in layout.items()
        if saved.get(name) != value
    ]


def save(
    engine: Any, run_dir: Path, *, step: int, tokens: int, data_state: dict[str, Any], layout: dict[str, Any]
) -> Path:
    """Write a checkpoint after ``step`` steps; all ranks must call it together. Returns its folder."""
    path = run_dir / "checkpoints" / f"step_{step:08d}"
    engine.save_checkpoint(str(path.parent), tag=path.name, client_state={"step": step})
    rank = dist.get_rank()
    _write(path / f"rank_{rank:05d}.json", {"data": data_state, "rng": rng_states()})
    dist.barrier()
    if rank == 0:
        _write(path / MARKER, {"format": 1, "step": step, "tokens": tokens, "layout": layout})
    dist.barrier()
    return path


def load(engine: Any, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Load a checkpoint into the engine; all ranks must call it together.

    Returns:
        what :func:`describe` says, and this rank's position in the data.
    """
    loaded, _ = engine.load_checkpoint(str(path.parent), tag=path.name)
    if loaded is None:
        raise ConfigError(Problem(str(path), "DeepSpeed found no checkpoint in it", this_host_only=True))
    mine = json.loads((path / f"rank_{dist.get_rank():05d}.json").read_text(encoding="utf-8"))
    set_rng_states(mine["rng"])
    return describe(path), mine["data"]


def _write(path: Path, content: dict[str, Any]) -> None:
    """Write JSON so that the file is either whole or not there."""
    aside = path.with_suffix(".tmp")
    with open(aside, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
