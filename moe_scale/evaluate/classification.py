"""How well a model classifies: its probabilities of held-out examples, and accuracy, F1, confusion and calibration.

Shapes: N examples, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from moe_scale.data.examples.batches import NO_EXAMPLE, ExampleBatch

CALIBRATION_BINS = 15
"""Of the expected calibration error, as in arXiv 1706.04599."""


@dataclass(frozen=True)
class Predictions:
    """Probabilities of held-out examples, in the order of their places in the split.

    Attributes:
        places_N: [N] int64, place of each example in the split.
        labels_N: [N] int64.
        probs_NC: [N, C] float64; rows sum to 1.
    """

    places_N: np.ndarray
    labels_N: np.ndarray
    probs_NC: np.ndarray

    @property
    def predicted(self) -> np.ndarray:
        """The most probable class of each example, [N]."""
        found: np.ndarray = self.probs_NC.argmax(axis=1)
        return found


@dataclass(frozen=True)
class ReliabilityBin:
    """Examples whose predicted class has a probability in one stretch of 0 to 1."""

    low: float
    high: float
    examples: int
    confidence: float
    """Mean probability of the predicted class; NaN without examples."""
    accuracy: float
    """Share that is predicted right; NaN without examples."""


@dataclass(frozen=True)
class ClassificationScores:
    """Scores of predictions.

    Attributes:
        examples: N.
        loss: mean -log p(label), nats.
        accuracy: share that is predicted right.
        standard_error: of the accuracy, sqrt(a (1 - a) / N).
        f1: macro F1: the mean over the classes of the harmonic mean of precision and recall.
        ece: expected calibration error: mean distance of confidence and accuracy over the bins, by their examples.
        confusion: [C][C] examples of each class (row) that are predicted as each class (column).
        reliability: the bins of ``ece``.
    """

    examples: int
    loss: float
    accuracy: float
    standard_error: float
    f1: float
    ece: float
    confusion: list[list[int]]
    reliability: list[ReliabilityBin]

    def record(self) -> dict[str, Any]:
        """As it is written to JSON, without NaN."""
        found = asdict(self)
        for one in found["reliability"]:
            one |= {name: None for name in ("confidence", "accuracy") if math.isnan(one[name])}
        return found


@torch.no_grad()
def predict(model: Callable[..., Any], batches: Iterable[ExampleBatch], device: torch.device) -> Predictions:
    """Probabilities of all examples, those of all ranks on every rank.

    All ranks must call it together with the same number of batches.

    Args:
        model: the engine (or a bare model) in evaluation mode.
    """
    mine: list[tuple[int, int, list[float]]] = []
    for batch in batches:
        output = model(batch.inputs.to(device), batch.valid_BS.to(device), batch.labels_B.to(device))
        probs = output.logits_BC.double().softmax(dim=-1).tolist()
        found = zip(batch.indices_B.tolist(), batch.labels_B.tolist(), probs, strict=True)
        mine += [one for one in found if one[0] != NO_EXAMPLE]
    everyones = [mine]
    if dist.is_initialized() and dist.get_world_size() > 1:
        everyones = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyones, mine)
    places, labels, probs = zip(*sorted(one for theirs in everyones for one in theirs), strict=True)
    return Predictions(np.array(places), np.array(labels), np.array(probs))


def score_predictions(predictions: Predictions) -> ClassificationScores:
    """All scores of predictions."""
    from sklearn.metrics import accuracy_score, confusion_matrix

    labels_N, predicted_N = predictions.labels_N, predictions.predicted
    classes = np.arange(predictions.probs_NC.shape[1])
    of_label_N = predictions.probs_NC[np.arange(len(labels_N)), labels_N]
    accuracy = float(accuracy_score(labels_N, predicted_N))
    bins = reliability(predictions)
    return ClassificationScores(
        examples=len(labels_N),
        loss=float(-np.log(of_label_N.clip(min=1e-300)).mean()),
        accuracy=accuracy,
        standard_error=math.sqrt(accuracy * (1 - accuracy) / len(labels_N)),
        f1=macro_f1(labels_N, predicted_N, len(classes)),
        ece=sum(b.examples * abs(b.confidence - b.accuracy) for b in bins if b.examples) / len(labels_N),
        confusion=confusion_matrix(labels_N, predicted_N, labels=classes).tolist(),
        reliability=bins,
    )


def macro_f1(labels_N: np.ndarray, predicted_N: np.ndarray, num_classes: int) -> float:
    """Macro F1 over all classes; one that neither occurs nor is predicted counts 0."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels_N, predicted_N, labels=np.arange(num_classes), average="macro", zero_division=0.0))


def reliability(predictions: Predictions, num_bins: int = CALIBRATION_BINS) -> list[ReliabilityBin]:
    """Confidence against accuracy, in bins of equal width (arXiv 1706.04599)."""
    from sklearn.calibration import calibration_curve

    confidence_N = predictions.probs_NC.max(axis=1).clip(0, 1)
    right_N = (predictions.predicted == predictions.labels_N).astype(int)
    # scikit-learn returns the bins that have examples, without their number; the edges are its own.
    edges = np.linspace(0.0, 1.0, num_bins + 1)
    counts = np.bincount(np.searchsorted(edges[1:-1], confidence_N), minlength=num_bins)
    accuracy, confidence = np.full(num_bins, np.nan), np.full(num_bins, np.nan)
    accuracy[counts > 0], confidence[counts > 0] = calibration_curve(right_N, confidence_N, n_bins=num_bins)
    return [
        ReliabilityBin(float(edges[n]), float(edges[n + 1]), int(counts[n]), float(confidence[n]), float(accuracy[n]))
        for n in range(num_bins)
    ]
