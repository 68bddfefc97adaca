"""The scores of GLUE (arXiv 1804.07461), each task's as GLUE defines them, and the accuracy of VQA.

Shape suffix: N examples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

METRICS = {
    "cola": ("matthews",),
    "sst2": ("accuracy",),
    "mrpc": ("accuracy", "f1"),
    "qqp": ("accuracy", "f1"),
    "stsb": ("pearson", "spearman"),
    "mnli": ("accuracy",),
    "qnli": ("accuracy",),
    "rte": ("accuracy",),
    "wnli": ("accuracy",),
}
"""Task to its scores. MNLI has two held-out sets, matched and mismatched, which are scored apart."""


def glue_scores(task: str, predicted_N: np.ndarray, labels_N: np.ndarray) -> dict[str, float]:
    """The scores of a task, by name, and their mean as ``score``, which GLUE averages over the tasks.

    accuracy; f1 of class 1; matthews, the correlation coefficient of two classes; pearson and spearman, of scores and
    of their ranks. A correlation with predictions that are all equal is 0, as they order nothing.

    Args:
        predicted_N: classes; for stsb, scores.

    Raises:
        ValueError: for an unknown task, without an example, or for predictions that are not numbers.
    """
    if task not in METRICS:
        raise ValueError(f"GLUE has no task {task!r}; choose one of {', '.join(METRICS)}")
    predicted_N, labels_N = np.asarray(predicted_N, dtype=np.float64), np.asarray(labels_N, dtype=np.float64)
    if not len(labels_N) or predicted_N.shape != labels_N.shape:
        raise ValueError(f"{predicted_N.shape} predictions for {labels_N.shape} labels")
    if not np.isfinite(predicted_N).all():
        raise ValueError("predictions that are not finite numbers")
    found = {name: _score(name, predicted_N, labels_N) for name in METRICS[task]}
    return found | {"score": float(np.mean(list(found.values())))}


def _score(name: str, predicted_N: np.ndarray, labels_N: np.ndarray) -> float:
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    if name in ("pearson", "spearman"):
        if np.ptp(predicted_N) == 0 or np.ptp(labels_N) == 0:
            return 0.0
        correlation = pearsonr if name == "pearson" else spearmanr
        return float(correlation(predicted_N, labels_N).statistic)
    predicted, labels = predicted_N.astype(np.int64), labels_N.astype(np.int64)
    if name == "matthews":
        return float(matthews_corrcoef(labels, predicted))
    if name == "f1":
        return float(f1_score(labels, predicted, zero_division=0.0))
    return float(accuracy_score(labels, predicted))


def vqa_accuracy(predicted: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """The accuracy of VQA (arXiv 1505.00468): an answer is right in full if three other people gave it.

    Of each question, min(1, people who gave that answer / 3), on average over all choices of all people but one; with
    a single person's answer, whether it is that one. Answers are compared as they are: articles and punctuation are not
    taken off, as VQA's own program does.

    Raises:
        ValueError: without a question.
    """
    if not predicted:
        raise ValueError("there is no question")
    each = [_agreement(own, given) for own, given in zip(predicted, answers, strict=True)]
    return math.fsum(each) / len(each)


def _agreement(own: str, given: Sequence[str]) -> float:
    if len(given) == 1:
        return float(own == given[0])
    same = sum(one == own for one in given)
    without = [same - (one == own) for one in given]  # people that gave it, with each person left out
    return math.fsum(min(1.0, count / 3) for count in without) / len(given)
