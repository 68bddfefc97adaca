"""Early stopping on two ranks: all stop together, a resumed run stops where the whole one does, the best is kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_scale.checkpoint.index import read_index
from moe_scale.errors import ConfigError
from moe_scale.train.finished import MARK, read_mark
from moe_scale.train.recipe import prepare_job
from recipes.lm_16l import RECIPE
from tests.curves import CharacterRuns
from tests.ranks import REPO, run_ranks

# The first evaluation, at step 2, is the only improvement by more than min_delta: the one at step 6 ends the run.
FLAGS = (
    "--eval.every", "2", "--early_stopping.metric", "eval/loss", "--early_stopping.patience", "2",
    "--early_stopping.min_delta", "50", "--optim.schedule", "constant", "--eval.sink_sequences", "0",
)  # fmt: skip


def scores_of(run: Path) -> dict[int, float]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["eval/loss"] for record in records if "eval/loss" in record}


def train(runs: CharacterRuns, cases: list[list[str]]) -> str:
    """Run the command lines in one start of two ranks. Returns what rank 0 printed."""
    listed = runs.folder / "cases.json"
    listed.write_text(json.dumps(cases))
    return run_ranks(2, [str(REPO / "tests" / "distributed" / "train_cases.py"), str(listed)])


def test_all_ranks_stop_together_and_a_resumed_run_where_the_whole_one_does(tmp_path: Path) -> None:
    runs = CharacterRuns(tmp_path)

    def argv(name: str, *extra: str) -> list[str]:
        return runs.argv(name, 2, stage=3, extra=(*FLAGS, *extra))

    often = ("--checkpoint.every", "3", "--checkpoint.keep_last", "0")
    printed = train(runs, [argv("whole", *often), argv("cut", "--max_steps", "4"), argv("cut", "--resume", "must")])

    scores = scores_of(tmp_path / "whole")
    assert list(scores) == [2, 4, 6]
    assert scores_of(tmp_path / "cut") == scores
    last = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["step"], last["eval/restored_step"]) == (6, min(scores, key=lambda step: scores[step]))
    best = min(scores, key=lambda step: scores[step])
    for name in ("whole", "cut"):
        checkpoints = tmp_path / name / "checkpoints"
        assert (checkpoints / "best").resolve().name == f"step_{best:08d}"
        assert (checkpoints / "latest").resolve().name == "step_00000006"
    kept = read_index(tmp_path / "cut" / "checkpoints" / "step_00000004").scores["stopping"]
    assert kept == {"metric": "eval/loss", "reference": scores[2], "stale": 1}
    ended = f"stopped at step 6: eval/loss got no better than {scores[2]:.4f} by more than 50 in 2 evaluations; "
    assert printed.count(ended + f"the weights are those of step {best}, the best, with {scores[best]:.4f}") == 2
    assert f"held-out loss    {scores[best]:.4f}" in printed, "the summary speaks of the weights that were restored"

    assert read_mark(tmp_path / "whole") == read_mark(tmp_path / "cut")
    assert "cut is finished" not in printed, "at step 4 it was, and went on"
    go_on_where_runs_have_ended(runs, argv)


def go_on_where_runs_have_ended(runs: CharacterRuns, argv: Callable[..., list[str]]) -> None:
    """A stopped run does what is left of its end, and where nothing is left says so; other settings make it go on."""
    whole, kept = runs.folder / "whole", runs.folder / "cut"
    mark, metrics = (kept / MARK).read_bytes(), (kept / "metrics.jsonl").read_bytes()
    (kept / MARK).unlink()  # as if killed before it was written, once the best weights were restored
    # Saved in the middle of a longer run, and so never evaluated there.
    short = runs.folder / "short" / "checkpoints"
    shutil.copytree(whole / "checkpoints" / "step_00000003", short / "step_00000003")
    before = {path: path.lstat().st_mtime_ns for path in whole.rglob("*")}
    cases = [
        [*argv("cut"), "--resume", "must"],
        [*argv("whole"), "--resume", "must"],
        [*argv("short"), "--max_steps", "3", "--resume", "auto"],
        [*argv("cut"), "--resume", "auto", "--early_stopping.patience", "3", "--max_steps", "7"],
    ]
    printed = train(runs, cases)
    assert {path: path.lstat().st_mtime_ns for path in whole.rglob("*")} == before
    assert f"{whole} is finished: early stopping ended it at step 6; a larger early_stopping.patience" in printed
    assert printed.count("its last step is done; what is left is the end of the run") == 2
    last = json.loads((short.parent / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["step"], last["eval/restored_step"]) == (3, 3), "evaluated, and the best so far"
    assert (short / "best").resolve().name == "step_00000003"
    assert sorted(path.name for path in short.iterdir()) == ["best", "latest", "step_00000003"]
    assert read_mark(short.parent).step == 3  # type: ignore[union-attr]
    # The case that ended a second time left what the first end had; the last one has gone on from there.
    lines = (kept / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    without = [line for line in metrics.splitlines(keepends=True) if b"restored" not in line]
    assert lines[: len(without)] == without
    assert json.loads(lines[-1])["step"] == 7
    assert (kept / MARK).read_bytes() != mark
    assert read_mark(kept).step == 7  # type: ignore[union-attr]
    with pytest.raises(ConfigError) as refused:
        prepare_job(RECIPE, [*argv("cut"), "--resume", "must", "--max_steps", "6"])
    assert [str(p) for p in refused.value.problems] == [
        "max_steps: 6, but step_00000007 is already there; choose 7, or more to train on"
    ]


def test_a_score_that_the_recipe_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        prepare_job(RECIPE, ["--early_stopping.metric", "eval/bleu", "--output_dir", str(tmp_path / "run")])
    assert [p.where for p in refused.value.problems] == ["early_stopping.metric"]
