"""The scores of GLUE and VQA against values by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moe_scale.evaluate.glue import METRICS, glue_scores, vqa_accuracy

PREDICTED, LABELS = np.array([1, 1, 1, 0, 0, 0, 0, 1]), np.array([1, 1, 0, 0, 0, 0, 1, 0])
"""Of class 1, two are right, two are wrong, one is missed; three of class 0 are right."""


def test_accuracy_f1_and_matthews_by_hand() -> None:
    assert glue_scores("sst2", PREDICTED, LABELS) == {"accuracy": 5 / 8, "score": 5 / 8}
    precision, recall = 2 / 4, 2 / 3
    f1 = 2 * precision * recall / (precision + recall)
    mrpc = glue_scores("mrpc", PREDICTED, LABELS)
    assert mrpc == pytest.approx({"accuracy": 5 / 8, "f1": f1, "score": (5 / 8 + f1) / 2})
    matthews = (2 * 3 - 2 * 1) / math.sqrt((2 + 2) * (2 + 1) * (3 + 2) * (3 + 1))
    assert glue_scores("cola", PREDICTED, LABELS)["matthews"] == pytest.approx(matthews)
    assert glue_scores("mnli", np.array([0, 1, 2, 2]), np.array([0, 2, 2, 1]))["accuracy"] == 0.5


def test_correlations_by_hand() -> None:
    predicted, labels = np.array([1.0, 2.0, 3.0, 10.0]), np.array([0.0, 2.0, 1.0, 5.0])
    dx, dy = predicted - 4, labels - 2
    pearson = (dx * dy).sum() / math.sqrt((dx**2).sum() * (dy**2).sum())
    spearman = 1 - 6 * (0 + 1 + 1 + 0) / (4 * 15)  # ranks 1 2 3 4 and 1 3 2 4
    found = glue_scores("stsb", predicted, labels)
    assert found == pytest.approx({"pearson": pearson, "spearman": spearman, "score": (pearson + spearman) / 2})


def test_constant_predictions_order_nothing() -> None:
    assert glue_scores("stsb", np.ones(4), np.arange(4.0))["score"] == 0
    assert glue_scores("cola", np.ones(4), np.array([0, 1, 0, 1]))["score"] == 0
    assert glue_scores("qqp", np.zeros(4), np.array([0, 1, 0, 1])) == {"accuracy": 0.5, "f1": 0.0, "score": 0.25}


def test_what_cannot_be_scored() -> None:
    with pytest.raises(ValueError, match="no task 'ax'"):
        glue_scores("ax", PREDICTED, LABELS)
    with pytest.raises(ValueError, match=r"\(8,\) labels"):
        glue_scores("rte", PREDICTED[:3], LABELS)
    with pytest.raises(ValueError, match="finite"):
        glue_scores("stsb", np.array([1.0, float("nan")]), np.array([1.0, 2.0]))
    assert len(METRICS) == 9


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("red", 1.0), ("blue", (2 * 1 / 3 + 8 * 2 / 3) / 10), ("green", (1 * 0 + 9 * 1 / 3) / 10), ("grey", 0.0),
     ("pink", (3 * 2 / 3 + 7 * 1.0) / 10)],
)  # fmt: skip
def test_vqa_by_hand(answer: str, expected: float) -> None:
    people = ["red"] * 4 + ["blue"] * 2 + ["green"] + ["pink"] * 3
    assert vqa_accuracy([answer], [people]) == pytest.approx(expected)
    assert vqa_accuracy([answer, "yes"], [people, ["yes"]]) == pytest.approx((expected + 1) / 2)


def test_vqa_without_a_question() -> None:
    with pytest.raises(ValueError, match="no question"):
        vqa_accuracy([], [])
