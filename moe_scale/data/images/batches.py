"""Images and texts as padded batches.

Shape suffixes: B batch, C colours, H height, W width, S tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class ImageTextBatch(NamedTuple):
    """Images and a text of each, or texts alone.

    Attributes:
        images_BCHW: float32, red, green and blue after ``data.mean`` and ``data.std``; None for texts alone (GLUE).
        ids_BS: token ids, int64; the first of each row is CLS, padding on the right is 0.
        valid_BS: bool, False for padding.
        segments_BS: int64, 0 up to the end of the first text of a pair and 1 from there; None without pairs.
        labels_B: class, int64, -100 for none; or a score, float32, NaN for none; None for retrieval.
        items_B: int64, number of the image (of the example, for texts alone): all texts of an image share it, so each
            of them is a right answer to it; -1 where there is none.
        present_B: bool, False for a row that only fills the batch, or whose image cannot be read. Such a row has an
            image of zeros and CLS alone as text; it has to be left out of losses, negatives and scores.
    """

    images_BCHW: torch.Tensor | None
    ids_BS: torch.Tensor
    valid_BS: torch.Tensor
    segments_BS: torch.Tensor | None
    labels_B: torch.Tensor | None
    items_B: torch.Tensor
    present_B: torch.Tensor
