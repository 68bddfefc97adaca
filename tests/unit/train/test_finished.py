"""The mark of a run that has finished: what it says, which checkpoint it is of, and when there is none."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moe_scale.config import EarlyStoppingConfig, LMConfig
from moe_scale.train import finished
from moe_scale.train.finished import MARK, Mark, how_finished, read_mark, remove_mark, write_files, write_mark

STOPPED = {"eval/loss": 2.0, "stopping": {"metric": "eval/loss", "reference": 1.0, "stale": 3}}


def index(step: int, scores: dict[str, Any] | None = None) -> Any:
    return SimpleNamespace(step=step, scores=scores or {})


def test_a_mark_holds_scores_alone(tmp_path: Path) -> None:
    assert read_mark(tmp_path) is None
    write_mark(tmp_path, Mark(7, True, {**STOPPED, "best": {}, "evaluated_step": 5, "eval/x": math.nan}))
    assert read_mark(tmp_path) == Mark(7, True, {"eval/loss": 2.0, "eval/x": None})
    remove_mark(tmp_path)
    remove_mark(tmp_path)
    assert read_mark(tmp_path) is None


@pytest.mark.parametrize("text", ["", "[]", "{", '{"step": 3}', '{"step": 3, "stopped_early": 0, "scores": 1}'])
def test_a_mark_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / MARK).write_text(text)
    assert read_mark(tmp_path) is None


@pytest.mark.parametrize(
    ("mark", "saved", "scores", "max_steps", "metric", "told"),
    [
        (10, 10, None, 10, "", "at step 10; a larger max_steps trains on"),
        (10, 10, None, 11, "", ""),  # more is to be trained
        (None, 10, None, 10, "", ""),  # killed at its end
        (10, 5, None, 10, "", ""),  # the checkpoint that it ended with is damaged
        (6, 6, STOPPED, 10, "eval/loss", "early stopping ended it at step 6"),
        (6, 6, STOPPED, 10, "", ""),
        (6, 6, STOPPED, 10, "eval/perplexity", ""),
    ],
)
def test_a_run_has_finished_with_its_newest_checkpoint_and_these_settings(
    mark: int | None, saved: int, scores: dict | None, max_steps: int, metric: str, told: str, tmp_path: Path
) -> None:
    if mark is not None:
        write_mark(tmp_path, Mark(mark, bool(scores), {}))
    config = LMConfig(max_steps=max_steps, early_stopping=EarlyStoppingConfig(metric=metric, patience=3))
    found = how_finished(config, tmp_path, index(saved, scores))
    assert told in found
    assert bool(told) == bool(found)
    assert len(found.splitlines()) <= 1


def test_files_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    def draw(path: Path) -> None:
        raise OSError(28, "No space left on device")

    assert write_files(tmp_path, {"a.json": b"1", "b.txt": lambda path: path.write_text("2")}) == []
    assert [(tmp_path / name).read_text() for name in ("a.json", "b.txt")] == ["1", "2"]
    ((label, text),) = write_files(tmp_path, {"a.json": b"3", "c.png": draw})
    assert (label, text) == (finished.NOT_WRITTEN, f"a.json, c.png in {tmp_path}: No space left on device")
