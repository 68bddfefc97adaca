"""When a run stops early: what is an improvement, and how long it is waited for."""

from __future__ import annotations

import math

import pytest

from moe_scale.config import CheckpointConfig, EarlyStoppingConfig, EvalConfig, LMConfig
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
    from moe_scale.config import LMEvalConfig

    assert [p.where for p in LMConfig(early_stopping=stop, eval=LMEvalConfig(every=0)).problems()] == [
        "early_stopping.metric"
    ]
    assert EvalConfig().every
