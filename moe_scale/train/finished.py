"""The mark of a run that has finished: ``finished.json``, the last file that a run writes into its folder.

The newest checkpoint alone does not tell: it is written before the best weights are restored, test data are evaluated
and their files are written, and a run may be killed meanwhile. A start that finds every step done and no mark does what
is left; one that finds the mark has nothing to do.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe_scale.checkpoint.index import Index
from moe_scale.config import RunConfig
from moe_scale.telemetry.provenance import write_atomically
from moe_scale.telemetry.records import finite
from moe_scale.train.evaluation import STOPPING, only_scores

MARK = "finished.json"

NOT_WRITTEN = "not written"
"""Label of a summary's line that says which file of the end could not be written: such a run has not finished."""


@dataclass(frozen=True)
class Mark:
    """How a run ended.

    Attributes:
        step: its last one.
        stopped_early: by ``early_stopping``.
        scores: held-out scores of the weights that it ended with; None for what is not a number.
    """

    step: int
    stopped_early: bool
    scores: dict[str, Any]


def read_mark(run_dir: Path) -> Mark | None:
    """The mark of a finished run; None where there is none that can be read."""
    try:
        found = json.loads((run_dir / MARK).read_text())
        return Mark(int(found["step"]), bool(found["stopped_early"]), dict(found["scores"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_mark(run_dir: Path, mark: Mark) -> None:
    """Say that the run has finished; after everything else, on rank 0.

    Raises:
        OSError: if it cannot be written.
    """
    content = asdict(mark) | {"scores": finite(only_scores(mark.scores))}
    write_atomically(run_dir / MARK, json.dumps(content, indent=1).encode() + b"\n")


def remove_mark(run_dir: Path) -> None:
    """Before a run trains on.

    Raises:
        OSError: if it cannot be removed.
    """
    (run_dir / MARK).unlink(missing_ok=True)


def stopped_early(config: RunConfig, scores: Mapping[str, Any]) -> bool:
    """Whether a checkpoint with these scores is where early stopping, as it is set now, ends the run."""
    stopping, kept = config.early_stopping, scores.get(STOPPING)
    return bool(stopping.metric and kept and kept["metric"] == stopping.metric and kept["stale"] >= stopping.patience)


def has_all_steps(config: RunConfig, index: Index) -> bool:
    """Whether no step is left for a run that continues from this checkpoint."""
    return index.step >= config.max_steps or stopped_early(config, index.scores)


def how_finished(config: RunConfig, run_dir: Path, index: Index) -> str:
    """One line of a run that is finished with the checkpoint of ``index``; empty if anything is left to do."""
    mark = read_mark(run_dir)
    if mark is None or mark.step != index.step or not has_all_steps(config, index):
        return ""
    if stopped_early(config, index.scores):
        more = "a larger early_stopping.patience, or early_stopping.metric '', trains on"
        return f"{run_dir} is finished: early stopping ended it at step {mark.step:,}; {more}"
    return f"{run_dir} is finished, at step {mark.step:,}; a larger max_steps trains on"


def write_files(run_dir: Path, files: Mapping[str, bytes | Callable[[Path], None]]) -> list[tuple[str, str]]:
    """Write the files of a run's end.

    Args:
        files: by name, the content or what writes it to a path.

    Returns:
        a line for the summary where that failed: a full disk is no reason to lose the other lines as well.
    """
    for name, content in files.items():
        try:
            if callable(content):
                content(run_dir / name)
            else:
                write_atomically(run_dir / name, content)
        except OSError as error:
            return [(NOT_WRITTEN, f"{', '.join(files)} in {run_dir}: {error.strerror or error}")]
    return []
