"""What a model of texts and images makes of held-out batches, on every rank that of all.

Shapes: B rows of a rank's batch, N rows of all, E width of the shared space, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_scale.data.images.batches import ImageTextBatch
from moe_scale.parallel.collectives import all_gather_rows


@dataclass(frozen=True)
class HeldOut:
    """Rows that are there, in the order of batches and, of each, ranks. On the host; None for what there is not.

    Attributes:
        loss: mean over the rows of the goal's loss; that of a batch of retrieval is of its own rows.
        items_N: int64 number of each row's image.
        image_NE, text_NE: fp32 features of unit length.
        labels_N: class or score.
        outputs_NO: fp32 logits of the classes, or the score [N, 1].
    """

    loss: float
    items_N: Tensor
    image_NE: Tensor | None
    text_NE: Tensor | None
    labels_N: Tensor | None
    outputs_NO: Tensor | None


@torch.no_grad()
def run_held_out(model: Callable[..., Any], batches: Iterable[ImageTextBatch], device: torch.device) -> HeldOut:
    """Run a model over held-out batches. All ranks call it together, with as many batches of as many rows each.

    Args:
        model: the engine (or a bare model) in evaluation mode.
        batches: one at least.
    """
    total, rows = 0.0, 0
    parts: dict[str, list[Tensor]] = {}
    for batch in batches:
        batch = on_device(batch, device)
        output = model(*batch)
        present_N = all_gather_rows(batch.present_B.long()).bool()
        columns = {
            "items_N": batch.items_B,
            "image_NE": output.image_BE,
            "text_NE": output.text_BE,
            "labels_N": batch.labels_B,
            "outputs_NO": output.outputs_BO,
        }
        for name, column in columns.items():
            if column is not None:
                parts.setdefault(name, []).append(all_gather_rows(column)[present_N].cpu())
        here = int(present_N.sum())
        total += float(all_gather_rows(output.lm_loss.view(1)).mean()) * here
        rows += here
    return HeldOut(total / max(rows, 1), **{name: torch.cat(parts[name]) if name in parts else None for name in NAMES})


NAMES = ("items_N", "image_NE", "text_NE", "labels_N", "outputs_NO")


def on_device(batch: ImageTextBatch, device: torch.device) -> ImageTextBatch:
    """The batch on a device."""
    return ImageTextBatch(*(None if part is None else part.to(device) for part in batch))
