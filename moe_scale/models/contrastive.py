"""What retrieval learns from: a contrastive loss over the batches of all ranks, and pairs that are hard to tell apart.

Shapes: B rows of this rank, N = W * B rows of all ranks, E width of the shared space.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_scale.parallel.collectives import all_gather_rows, mean_of_all

MAX_SCALE = 100.0
"""The similarities' largest factor (arXiv 2103.00020, section 2.5)."""


class Temperature(nn.Module):
    """The learned factor on similarities, 1 / temperature: begins at 1 / 0.07 and never exceeds 100.

    At the limit its gradient counts only where it leads below: it can come back, and does not wander off meanwhile.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.full((1,), math.log(1 / 0.07)))

    def forward(self) -> Tensor:
        """The factor, fp32 [1]."""
        scale: Tensor = _Limited.apply(self.log_scale.float()).exp()
        return scale


class _Limited(torch.autograd.Function):
    """min(x, log 100), with a gradient above the limit where a step against it leads down."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(max=math.log(MAX_SCALE))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.where((x <= math.log(MAX_SCALE)) | (grads[0] > 0), grads[0], 0.0)


def contrastive_loss(image_BE: Tensor, text_BE: Tensor, items_B: Tensor, present_B: Tensor, scale: Tensor) -> Tensor:
    """The symmetric cross entropy of telling a text's image among all images, and an image's texts among all texts
    (arXiv 2103.00020, figure 3), over the rows of all ranks; these must call it together.

    Rows of one item belong together, and each of them is right: a row's loss is the mean of -log p over its right
    answers, as in supervised contrastive learning (arXiv 2004.11362, equation 2). With one text an image this is the
    paper's loss.

    Args:
        image_BE, text_BE: features of unit length, wide precision.
        items_B: int64 number of each row's image; the same number means the same image, on whatever rank.
        present_B: bool, False for rows that are to be left out of everything.
        scale: factor on the cosines.

    Returns:
        fp32 scalar, nats. Its mean over ranks is the loss of all rows joined; see :func:`mean_of_all`.
    """
    images_NE, texts_NE = all_gather_rows(torch.cat([image_BE, text_BE], dim=1)).split(image_BE.shape[1], dim=1)
    items_N, present_N = all_gather_rows(torch.stack([items_B, present_B.to(items_B.dtype)], dim=1)).unbind(dim=1)
    present_N = present_N.bool()
    right_BN = (items_B[:, None] == items_N) & present_B[:, None] & present_N
    pairs = ((image_BE, texts_NE), (text_BE, images_NE))
    sums = [_cross_entropy(scale * queries @ answers.t(), right_BN, present_N) for queries, answers in pairs]
    return mean_of_all((sums[0] + sums[1]) / 2, present_B.sum())


def _cross_entropy(logits_BN: Tensor, right_BN: Tensor, present_N: Tensor) -> Tensor:
    """The sum over rows of the mean of -log p over a row's right answers; rows without any count 0."""
    lowest = torch.finfo(logits_BN.dtype).min / 2  # finite: a softmax over nothing is NaN
    log_probs_BN = logits_BN.masked_fill(~present_N, lowest).log_softmax(dim=1).masked_fill(~right_BN, 0.0)
    return -(log_probs_BN.sum(dim=1) / right_BN.sum(dim=1).clamp(min=1)).sum()


class HardNegatives(NamedTuple):
    """A wrong answer to each row, and whether there is one at all."""

    rows_B: Tensor
    """int64 row of the batch that it is in."""
    found_B: Tensor
    """bool, False for rows that are absent or have no wrong answer in the batch."""


@torch.no_grad()
def hard_negatives(logits_BB: Tensor, items_B: Tensor, present_B: Tensor, *, sample: bool) -> HardNegatives:
    """For each row an answer of another item, the more likely the more similar it is (arXiv 2107.07651, section 3.1.2).

    Args:
        logits_BB: scaled similarities of each row's query to the answers of the batch.
        sample: draw it by the softmax of the similarities; else take the most similar one.
    """
    wrong_BB = (items_B[:, None] != items_B) & present_B[:, None] & present_B
    found_B = wrong_BB.any(dim=1)
    # A row without a wrong answer draws any, which is left out afterwards.
    logits_BB = logits_BB.float().masked_fill(~wrong_BB & found_B[:, None], float("-inf"))
    if not sample:
        return HardNegatives(logits_BB.argmax(dim=1), found_B)
    return HardNegatives(logits_BB.softmax(dim=1).multinomial(1).squeeze(1), found_B)
