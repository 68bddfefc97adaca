"""When a run stops early: what is an improvement, and how long it is waited for."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moe_scale.config import CheckpointConfig, EarlyStoppingConfig, EvalConfig, LMConfig, LMEvalConfig
from moe_scale.train import evaluation
from moe_scale.train.evaluation import Patience, Way, is_better


def stopped_after(scores: list[float], way: Way, **settings: float) -> int | None:
    """The evaluation, from 1, that ends the run; None for none."""
    config = EarlyStoppingConfig(metric="eval/x", **settings)  # type: ignore[arg-type]
    kept = None
    for number, score in enumerate(scores, start=1):
        patience = Patience(config, way, kept)  # as after a resume, every time
        patience.look({"eval/x": score, "eval/other": -score})
        if patience.is_over:
            return number
        kept = patience.state()
    return None


@pytest.mark.parametrize(
    ("scores", "way", "settings", "expected"),
    [
        ([3, 2, 1, 1, 1], "lower", {"patience": 2}, 5),
        ([3, 2, 1, 1], "lower", {"patience": 2}, None),
        ([1, 2, 3, 2, 2.5], "higher", {"patience": 2}, 5),
        ([1, 2, 3, 2, 4, 3], "higher", {"patience": 2}, None),
        ([3, 2.9, 2.8, 2.7], "lower", {"patience": 1, "min_delta": 0.2}, 2),
        ([3, 2.9, 2.75, 2.65, 2.5], "lower", {"patience": 2, "min_delta": 0.2}, None),  # small steps add up
        ([3, 2.8], "lower", {"patience": 1, "min_delta": 0.25}, 2),
        ([2, 1.5], "lower", {"patience": 1, "min_delta": 0.5}, 2),  # exactly min_delta is none
        ([math.nan, math.nan], "lower", {"patience": 2}, 2),
        ([math.nan, 5, math.inf, 4], "lower", {"patience": 2}, None),
        ([-math.inf, 5], "lower", {"patience": 2}, None),
    ],
)
def test_patience(scores: list[float], way: Way, settings: dict, expected: int | None) -> None:
    assert stopped_after(scores, way, **settings) == expected


def test_another_score_begins_anew() -> None:
    kept = {"metric": "eval/other", "reference": 0.0, "stale": 4}
    patience = Patience(EarlyStoppingConfig(metric="eval/x"), "lower", kept)
    assert (patience.stale, patience.reference) == (0, None)


def test_what_is_told() -> None:
    patience = Patience(EarlyStoppingConfig(metric="eval/x", patience=1, min_delta=0.5), "lower")
    patience.look({"eval/x": math.nan})
    assert str(patience) == "eval/x was never a number in 1 evaluation"
    patience.look({"eval/x": 3.0})
    patience.look({"eval/x": 2.9})
    assert str(patience) == "eval/x got no better than 3.0000 by more than 0.5 in 1 evaluation"


def test_is_better() -> None:
    assert is_better(1.0, None, "lower")
    assert is_better(1.0, 2.0, "lower")
    assert not is_better(1.0, 1.0, "higher")
    assert not is_better(math.nan, None, "lower")


def test_settings_that_do_not_fit_together() -> None:
    stop = EarlyStoppingConfig(metric="eval/loss")
    assert LMConfig(early_stopping=stop).problems() == []
    assert LMConfig(early_stopping=stop, checkpoint=CheckpointConfig(save_best="eval/loss")).problems() == []
    assert LMConfig(early_stopping=stop).best_metric == "eval/loss"
    assert LMConfig(checkpoint=CheckpointConfig(save_best="eval/perplexity")).best_metric == "eval/perplexity"
    wrong = LMConfig(early_stopping=stop, checkpoint=CheckpointConfig(save_best="eval/perplexity"))
    assert [p.where for p in wrong.problems()] == ["checkpoint.save_best"]
    assert [p.where for p in LMConfig(early_stopping=stop, eval=LMEvalConfig(every=0)).problems()] == [
        "early_stopping.metric"
    ]
    assert EvalConfig().every


class Recorder:
    """Stands for what a run has beside its scores: writes down what is asked of it."""

    def __init__(self, scores: dict[str, Any], step: int, stale: int):
        config = EarlyStoppingConfig(metric="eval/x", patience=2)
        kept = {"metric": "eval/x", "reference": 1.0, "stale": stale}
        self.logged: list[dict[str, Any]] = []
        self.put: list[int] = []
        self.patience = Patience(config, "lower", kept)
        self.state = SimpleNamespace(step=step, tokens=70, scores=scores)
        self.saver = SimpleNamespace(wait=lambda: None, failure="")
        self.agreement = SimpleNamespace(any=lambda *flags: list(flags))
        self.logger = SimpleNamespace(log=self.logged.append)
        self.job = SimpleNamespace(run_dir=Path("run"))
        self.engine, self.new_best, self.at = None, None, lambda phase: None


def restore(run: Recorder, monkeypatch: pytest.MonkeyPatch, best_step: int | None) -> str:
    """What is told at the end of a run whose best checkpoint is of ``best_step``."""
    scores = {"eval/x": 1.0, "best": {"score": "eval/x", "value": 1.0}, "stopping": {}}
    found = None if best_step is None else (Path("best"), SimpleNamespace(step=best_step, scores=scores))
    monkeypatch.setattr(evaluation.checkpoint, "best_intact", lambda run_dir: found)
    monkeypatch.setattr(evaluation, "Reader", lambda path, index: None)
    monkeypatch.setattr(evaluation.snapshot, "put", lambda engine, reader, step: run.put.append(step))
    ((_, told),) = evaluation.restore_best(run)  # type: ignore[arg-type]
    return told


BEST = {"score": "eval/x", "value": 1.0}


def test_the_best_weights_and_their_scores_are_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Recorder({"eval/x": 2.0, "best": BEST}, step=7, stale=2)
    assert restore(run, monkeypatch, 5).endswith("; the weights are those of step 5, the best, with 1.0000")
    assert run.put == [5]
    assert run.logged == [{"step": 7, "tokens": 70, "eval/x": 1.0, "eval/restored_step": 5}]
    assert run.state.scores["eval/x"] == 1.0


def test_weights_that_are_the_best_already_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Recorder({"eval/x": 1.0, "best": BEST}, step=7, stale=0)
    assert restore(run, monkeypatch, 7).startswith("not before step 7; the weights are those of step 7")
    assert run.put == []
    assert run.logged[-1]["eval/restored_step"] == 7


@pytest.mark.parametrize(("best", "best_step"), [(None, None), (BEST, None), ({**BEST, "score": "eval/other"}, 5)])
def test_without_a_best_checkpoint_the_last_weights_stay(
    best: Any, best_step: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Recorder({"eval/x": math.nan} | ({"best": best} if best else {}), step=7, stale=2)
    assert restore(run, monkeypatch, best_step).endswith(
        "there is no best checkpoint, and the weights are the last ones"
    )
    assert (run.put, run.logged) == ([], [])


def test_nothing_is_restored_unless_asked() -> None:
    assert evaluation.restore_best(SimpleNamespace(patience=None)) == []  # type: ignore[arg-type]
