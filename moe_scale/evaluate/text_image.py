"""What a model of texts and images makes of held-out batches, on every rank that of all.

Shapes: B rows of a rank's batch, N rows of all, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moe_scale.data.images.batches import ImageTextBatch
from moe_scale.evaluate.retrieval import RetrievalScores, gather_features, retrieval_scores
from moe_scale.parallel.collectives import all_gather_rows, mean_over_ranks


class Answers(NamedTuple):
    """Outputs of the rows that are there, in the order of the split."""

    loss: float
    """Mean over the rows of cross entropy, nats, or of the squared error; of those that have a label."""
    places_N: np.ndarray
    """int64 place of each row in what was run, those that are not there counted."""
    labels_N: np.ndarray
    """float64; -100 or NaN for none."""
    outputs_NO: np.ndarray
    """float64 logits of the classes, or the score [N, 1]."""


@torch.no_grad()
def score_retrieval(
    model: Callable[..., Any], batches: Iterable[ImageTextBatch], device: torch.device
) -> tuple[float, RetrievalScores]:
    """The mean loss of the batches (contrastive over each joined batch, and matching), and recall over all of them.

    All ranks call it together, with as many batches of as many rows each.

    Args:
        model: the engine (or a bare model) in evaluation mode.
        batches: one at least.
    """
    losses: list[Tensor] = []
    rows: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for batch in batches:
        output = model(*batch.to(device))
        losses.append(output.lm_loss)
        rows.append((output.image_BE, output.text_BE, batch.items_B, batch.present_B))
    loss = float(mean_over_ranks(torch.stack(losses).mean()))
    images, texts, items, present = (torch.cat(column) for column in zip(*rows, strict=True))
    return loss, retrieval_scores(gather_features(images, texts, items, present))


@torch.no_grad()
def answer(model: Callable[..., Any], batches: Iterable[ImageTextBatch], device: torch.device) -> Answers:
    """Run a model for classes or scores over the batches of a split, in its order; as :func:`score_retrieval`."""
    total, counted = 0.0, 0
    presents: list[Tensor] = []
    labels: list[Tensor] = []
    outputs: list[Tensor] = []
    for batch in batches:
        on_device = batch.to(device)
        output = model(*on_device)
        assert on_device.labels_B is not None
        has_label_B = on_device.present_B & (on_device.labels_B >= 0)  # NaN is not
        number = int(all_gather_rows(has_label_B.long()).sum())
        total += float(mean_over_ranks(output.lm_loss)) * number
        counted += number
        presents.append(all_gather_rows(on_device.present_B.long()).bool().cpu())
        labels.append(all_gather_rows(on_device.labels_B.double()).cpu())
        outputs.append(all_gather_rows(output.outputs_BO.double()).cpu())
    present_N = torch.cat(presents)
    return Answers(
        total / max(counted, 1),
        present_N.nonzero().squeeze(1).numpy(),
        torch.cat(labels)[present_N].numpy(),
        torch.cat(outputs)[present_N].numpy(),
    )
