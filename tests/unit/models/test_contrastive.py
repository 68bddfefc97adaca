"""The contrastive loss against torch's cross entropy, and hard negatives."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_scale.models.contrastive import MAX_SCALE, Temperature, contrastive_loss, hard_negatives


def features(rows: int, seed: int) -> Tensor:
    drawn = torch.randn(rows, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return F.normalize(drawn, dim=-1)


SCALE = torch.tensor([14.0], dtype=torch.float64)
ALL = torch.ones(5, dtype=torch.bool)


def test_with_one_text_an_image_it_is_clips() -> None:
    image, text = features(5, 0), features(5, 1)
    logits = SCALE * image @ text.t()
    own = torch.arange(5)
    expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.t(), own)) / 2
    torch.testing.assert_close(contrastive_loss(image, text, own, ALL, SCALE), expected)


def test_rows_of_one_item_share_the_probability() -> None:
    image, text, items = features(5, 0), features(5, 1), torch.tensor([3, 1, 3, 2, 3])
    log_probs = (SCALE * image @ text.t()).log_softmax(dim=1), (SCALE * text @ image.t()).log_softmax(dim=1)
    losses = []
    for direction in log_probs:
        for row in range(5):
            same = [column for column in range(5) if items[column] == items[row]]
            losses.append(-sum(direction[row, column] for column in same) / len(same))
    torch.testing.assert_close(contrastive_loss(image, text, items, ALL, SCALE), sum(losses) / 10)


def test_absent_rows_are_no_answers_and_count_for_nothing() -> None:
    image, text, items = features(5, 0), features(5, 1), torch.tensor([0, 1, -1, 2, -1])
    present = items >= 0
    kept = torch.tensor([0, 1, 3])
    expected = contrastive_loss(image[kept], text[kept], items[kept], ALL[:3], SCALE)
    torch.testing.assert_close(contrastive_loss(image, text, items, present, SCALE), expected)
    nothing = contrastive_loss(image, text, items, torch.zeros(5, dtype=torch.bool), SCALE)
    assert float(nothing) == 0


def test_the_temperature_has_a_limit_that_it_can_come_back_from() -> None:
    temperature = Temperature()
    torch.testing.assert_close(temperature(), torch.tensor([1 / 0.07]))
    with torch.no_grad():
        temperature.log_scale.fill_(math.log(MAX_SCALE) + 1)
    scale = temperature()
    torch.testing.assert_close(scale, torch.tensor([MAX_SCALE]))
    (-scale).backward()  # more would be better
    assert float(temperature.log_scale.grad) == 0
    temperature().backward()
    assert float(temperature.log_scale.grad) > 0


def test_hard_negatives_are_wrong_present_and_similar() -> None:
    items, present = torch.tensor([0, 0, 1, 2, 3]), torch.tensor([True, True, True, True, False])
    similar = torch.zeros(5, 5)
    similar[:, 3] = 2.0
    similar[:, 4] = 50.0  # absent
    torch.manual_seed(0)
    drawn = torch.stack([hard_negatives(similar, items, present, sample=True).rows_B for _ in range(4000)])
    assert set(drawn[:, 0].tolist()) == {2, 3}, "neither itself nor its own item nor an absent row"
    share = float((drawn[:, 0] == 3).double().mean())
    assert abs(share - math.exp(2) / (math.exp(2) + 1)) < 0.03
    found = hard_negatives(similar, items, present, sample=False)
    assert found.rows_B[:3].tolist() == [3, 3, 3]
    assert found.rows_B[3] in (0, 1, 2)
    assert found.found_B.tolist() == [True, True, True, True, False]


def test_a_batch_of_one_item_has_no_negatives() -> None:
    items, present = torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.bool)
    for sample in (False, True):
        found = hard_negatives(torch.randn(3, 3), items, present, sample=sample)
        assert not found.found_B.any()
        assert (found.rows_B < 3).all()
