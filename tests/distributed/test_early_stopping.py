"""Early stopping on two ranks: all stop together, a resumed run stops where the whole one does, the best is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_scale.checkpoint.index import read_index
from moe_scale.errors import ConfigError
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


def test_all_ranks_stop_together_and_a_resumed_run_where_the_whole_one_does(tmp_path: Path) -> None:
    runs = CharacterRuns(tmp_path)

    def argv(name: str, *extra: str) -> list[str]:
        return runs.argv(name, 2, stage=3, extra=(*FLAGS, *extra))

    cases = [argv("whole"), argv("cut", "--max_steps", "4"), argv("cut", "--resume", "must")]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    printed = run_ranks(2, [str(REPO / "tests" / "distributed" / "train_cases.py"), str(tmp_path / "cases.json")])

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

    # Where a run has stopped by itself, going on takes other settings.
    with pytest.raises(ConfigError) as refused:
        prepare_job(RECIPE, [*argv("whole"), "--resume", "must"])
    assert [p.where for p in refused.value.problems] == ["early_stopping.patience"]
    for change in (["--early_stopping.patience", "3"], ["--early_stopping.metric", ""]):
        assert prepare_job(RECIPE, [*argv("whole"), "--resume", "must", *change]).resume_from is not None


def test_a_score_that_the_recipe_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        prepare_job(RECIPE, ["--early_stopping.metric", "eval/bleu", "--output_dir", str(tmp_path / "run")])
    assert [p.where for p in refused.value.problems] == ["early_stopping.metric"]
