"""Which checkpoint a run continues from, and which it refuses. Saving and loading need ranks: tests/distributed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_scale.errors import ConfigError
from moe_scale.train.checkpoint import MARKER, describe, layout_problems, newest

LAYOUT: dict[str, Any] = {"ranks": 4, "moe.ep_size": 2, "zero_optimization.stage": 3, "precision": "bf16"}


def write(run_dir: Path, step: int, content: str | None = None) -> Path:
    path = run_dir / "checkpoints" / f"step_{step:08d}"
    path.mkdir(parents=True)
    (path / MARKER).write_text(
        json.dumps({"format": 1, "step": step, "layout": LAYOUT}) if content is None else content
    )
    return path


def test_no_checkpoint(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    assert newest(tmp_path / "missing") is None
    (tmp_path / "checkpoints").mkdir()
    assert newest(tmp_path) is None
    (tmp_path / "file").touch()
    assert newest(tmp_path / "file") is None


def test_newest_is_the_one_of_the_most_steps(tmp_path: Path) -> None:
    for step in (100, 20, 3000, 999):
        write(tmp_path, step)
    assert newest(tmp_path) == tmp_path / "checkpoints" / "step_00003000"


def test_newest_ignores_what_was_cut_off_and_what_is_no_checkpoint(tmp_path: Path) -> None:
    complete = write(tmp_path, 10)
    (tmp_path / "checkpoints" / "step_00000020").mkdir()
    (tmp_path / "checkpoints" / "step_00000030").mkdir()
    (tmp_path / "checkpoints" / "step_00000030" / "checkpoint.tmp").write_text("{}")
    (tmp_path / "checkpoints" / "latest").write_text("step_00000030")
    (tmp_path / "checkpoints" / "zzz").mkdir()
    (tmp_path / "checkpoints" / "zzz" / MARKER).write_text("{}")
    assert newest(tmp_path) == complete


def test_describe(tmp_path: Path) -> None:
    assert describe(write(tmp_path, 7))["step"] == 7


@pytest.mark.parametrize("content", ["", "{", "\x00"])
def test_a_damaged_marker_is_a_problem(tmp_path: Path, content: str) -> None:
    path = write(tmp_path, 7, content)
    with pytest.raises(ConfigError, match="unreadable") as raised:
        describe(path)
    assert raised.value.problems[0].where == str(path / MARKER)


def test_the_same_layout_fits(tmp_path: Path) -> None:
    assert layout_problems(write(tmp_path, 7), dict(LAYOUT)) == []


def test_other_layouts_do_not(tmp_path: Path) -> None:
    path = write(tmp_path, 7)
    found = [str(problem) for problem in layout_problems(path, LAYOUT | {"ranks": 8, "precision": "fp16", "new": 1})]
    assert found == [
        "resume: ranks: the checkpoint step_00000007 was written with 4, this run has 8; start with ranks = 4",
        "resume: precision: the checkpoint step_00000007 was written with bf16, this run has fp16; "
        "start with precision = bf16",
        "resume: new: the checkpoint step_00000007 was written with None, this run has 1; start with new = None",
    ]
