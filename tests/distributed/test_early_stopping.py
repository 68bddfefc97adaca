"""Early stopping on two ranks: all stop together, a resumed run stops where the whole one does, the best is kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from moe_scale.checkpoint.index import read_index
from moe_scale.errors import ConfigError
from moe_scale.train.recipe import prepare_job
from recipes.lm_16l import RECIPE
from tests.curves import CharacterRuns
from tests.ranks import REPO, run_ranks

# So high a learning rate that the held-out loss gets worse after a while.
FLAGS = (
    "--optim.schedule", "constant", "--optim.lr", "0.3", "--optim.warmup_steps", "0", "--eval.sink_sequences", "0",
    "--eval.every", "2", "--early_stopping.metric", "eval/loss", "--early_stopping.patience", "2",
)  # fmt: skip


def scores_of(run: Path) -> dict[int, float]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["eval/loss"] for record in records if "eval/loss" in record}


def end_of(scores: dict[int, float], patience: int) -> tuple[int, int]:
    """The step at which a run with these scores stops, and its best step."""
    steps = sorted(scores)
    for place, step in enumerate(steps):
        best = min(steps[: place + 1], key=lambda s: scores[s])
        if place - steps.index(best) >= patience:
            return step, best
    return steps[-1], min(steps, key=lambda s: scores[s])


def test_all_ranks_stop_together_and_a_resumed_run_where_the_whole_one_does(tmp_path: Path) -> None:
    runs = CharacterRuns(tmp_path)
    worker = str(REPO / "tests" / "distributed" / "train_cases.py")

    def argv(name: str, *extra: str) -> list[str]:
        return runs.argv(name, 2, stage=3, extra=(*FLAGS, *extra))

    cases = [argv("whole"), argv("free", "--early_stopping.metric", "", "--checkpoint.save_best", "eval/loss")]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    printed = run_ranks(2, [worker, str(tmp_path / "cases.json")])

    all_scores = scores_of(tmp_path / "free")
    assert max(all_scores) == 20
    stop, best = end_of(all_scores, patience=2)
    assert best < stop < 20, f"this test needs a loss that gets worse: {all_scores}"
    scores = scores_of(tmp_path / "whole")
    assert scores == {step: score for step, score in all_scores.items() if step <= stop}
    assert f"stopped at step {stop}: eval/loss got no better than {scores[best]:.4f} in 2 evaluations" in printed
    assert f"the weights are those of step {best}, the best, with {scores[best]:.4f}" in printed
    checkpoints = tmp_path / "whole" / "checkpoints"
    assert (checkpoints / "best").resolve().name == f"step_{best:08d}"
    assert (checkpoints / "latest").resolve().name == f"step_{stop:08d}"
    # The summary speaks of the weights that were restored.
    assert f"held-out loss    {scores[best]:.4f}" in printed

    between = stop - 2  # one evaluation without an improvement
    cases = [argv("cut", "--max_steps", str(between)), argv("cut", "--resume", "must")]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    run_ranks(2, [worker, str(tmp_path / "cases.json")])
    assert scores_of(tmp_path / "cut") == scores
    kept = read_index(tmp_path / "cut" / "checkpoints" / f"step_{between:08d}").scores["stopping"]
    assert kept == {"metric": "eval/loss", "reference": scores[best], "stale": 1}

    # Where a run has stopped by itself, going on takes other settings.
    with pytest.raises(ConfigError) as refused:
        prepare_job(RECIPE, [*argv("whole"), "--resume", "must"])
    assert [p.where for p in refused.value.problems] == ["early_stopping.patience"]
    for change in (["--early_stopping.patience", "3"], ["--early_stopping.metric", ""]):
        assert prepare_job(RECIPE, [*argv("whole"), "--resume", "must", *change]).resume_from is not None
    shutil.rmtree(checkpoints)


def test_a_score_that_the_recipe_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        prepare_job(RECIPE, ["--early_stopping.metric", "eval/bleu", "--output_dir", str(tmp_path / "run")])
    assert [p.where for p in refused.value.problems] == ["early_stopping.metric"]
