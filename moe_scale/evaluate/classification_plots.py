"""Pictures of a classifier's test: who is taken for whom, and how far its probabilities can be trusted."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moe_scale.evaluate.classification import ClassificationScores

_MAX_NUMBERED = 20
"""Classes up to which the confusion matrix has its numbers written in."""


def draw_confusion(scores: ClassificationScores, path: Path) -> None:
    """The confusion matrix as shares of each class, with numbers of examples where there is room for them."""
    from matplotlib.figure import Figure

    counts_CC = np.array(scores.confusion)
    shares_CC = counts_CC / counts_CC.sum(axis=1, keepdims=True).clip(min=1)
    figure = Figure(figsize=(5, 4.4), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares_CC, vmin=0, vmax=1, cmap="Blues")
    figure.colorbar(image, label="share of the class")
    if len(counts_CC) <= _MAX_NUMBERED:
        for (row, column), count in np.ndenumerate(counts_CC):
            colour = "white" if shares_CC[row, column] > 0.5 else "black"
            axes.text(column, row, f"{count:,}", ha="center", va="center", color=colour, fontsize=9)
        axes.set_xticks(range(len(counts_CC)))
        axes.set_yticks(range(len(counts_CC)))
    axes.set(xlabel="predicted class", ylabel="class")
    axes.set_title(f"accuracy {scores.accuracy:.1%}, macro F1 {scores.f1:.3f}")
    figure.savefig(path, dpi=120)


def draw_calibration(scores: ClassificationScores, path: Path) -> None:
    """Accuracy against confidence, and below it how many examples each bin has."""
    from matplotlib.figure import Figure

    bins = [b for b in scores.reliability if b.examples]
    figure = Figure(figsize=(5, 5), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    upper.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1, label="calibrated")
    upper.plot([b.confidence for b in bins], [b.accuracy for b in bins], marker="o", label="model")
    upper.set(ylabel="accuracy", ylim=(0, 1), title=f"expected calibration error {scores.ece:.3f}")
    upper.legend(loc="upper left")
    width = scores.reliability[0].high - scores.reliability[0].low
    lower.bar([b.low for b in bins], [b.examples for b in bins], width=width, align="edge", edgecolor="white")
    lower.set(xlabel="probability of the predicted class", ylabel="examples", xlim=(0, 1))
    figure.savefig(path, dpi=120)
