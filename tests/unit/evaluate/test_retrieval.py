"""Retrieval: ranks by hand, ties, several captions of an image, chance, and rows that are none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moe_scale.evaluate.retrieval import CUTOFFS, Features, Recall, gather_features, recall_of, retrieval_scores


def of(scores: list[list[float]], right: list[list[int]]) -> Recall:
    return recall_of(iter([(np.array(scores), np.array(right, dtype=bool))]))


def test_ranks_by_hand() -> None:
    scores = [[0.9, 0.1, 0.2], [0.9, 0.1, 0.2], [0.1, 0.3, 0.2]]
    found = of(scores, np.eye(3).tolist())
    assert found.recall == {1: pytest.approx(1 / 3), 5: 1.0, 10: 1.0}
    assert found.median_rank == 2  # ranks 1, 3 and 2
    assert found.chance_recall[1] == pytest.approx(1 / 3)
    assert found.chance_median_rank == 2
    assert found.over_chance == pytest.approx(1)


def test_equal_scores_get_chance() -> None:
    right = np.eye(40).tolist()
    for value in (0.0, 0.7, float("nan")):
        found = of(np.full((40, 40), value).tolist(), right)
        assert found.recall == pytest.approx({k: k / 40 for k in CUTOFFS})
        assert found.recall == pytest.approx(found.chance_recall)
        assert found.median_rank == found.chance_median_rank == 20.5


def test_ties_against_all_orders_that_could_be_drawn() -> None:
    random = np.random.RandomState(1)
    scores = random.randint(0, 4, (6, 20)).astype(float)
    right = random.uniform(size=(6, 20)) < 0.15
    right[:, 3] = True
    hits, ranks = dict.fromkeys(CUTOFFS, 0.0), np.zeros(6)
    draws = 4000
    for _ in range(draws):
        order = np.argsort(-(scores + random.uniform(0, 0.5, scores.shape)), axis=1)
        places = np.take_along_axis(right, order, axis=1).argmax(axis=1) + 1
        ranks += places / draws
        for k in CUTOFFS:
            hits[k] += (places <= k).mean() / draws
    found = of(scores.tolist(), right.tolist())
    assert found.recall == pytest.approx(hits, abs=0.02)
    assert found.median_rank == pytest.approx(np.median(ranks), abs=0.15)


def test_a_score_that_is_no_number_is_the_last() -> None:
    assert of([[float("nan"), 0.1, 0.2]], [[1, 0, 0]]).median_rank == 3
    assert of([[0.1, float("nan"), float("nan")]], [[1, 0, 0]]).median_rank == 1


def test_several_captions_of_an_image() -> None:
    """Two images; the first has three captions, of which one is nearest to it."""
    images = np.array([[1.0, 0.0], [0.0, 1.0]])
    texts = np.array([[9.0, 0.1], [0.1, 1.0], [0.2, 1.0], [0.4, 1.0]])
    found = retrieval_scores(Features(images, np.array([4, 7]), texts, np.array([4, 4, 4, 7])))
    assert (found.image_to_text.queries, found.image_to_text.candidates) == (2, 4)
    assert found.image_to_text.recall[1] == 0.5  # the second image is nearer to two captions of the first
    assert found.image_to_text.median_rank == 2  # ranks 1 and 3
    assert found.image_to_text.chance_recall[1] == pytest.approx((3 / 4 + 1 / 4) / 2)
    assert found.text_to_image.recall[1] == 0.5  # two captions of the first image are nearer to the second
    assert found.text_to_image.chance_recall[1] == 0.5
    assert found.record()["image_to_text"]["queries"] == 2


def test_length_does_not_matter_and_collapsed_features_get_chance() -> None:
    random = np.random.RandomState(2)
    features = random.normal(size=(30, 8)).astype(np.float32)
    items = np.arange(30)
    scaled = features * random.uniform(0.1, 9, size=(30, 1))
    assert retrieval_scores(Features(features, items, scaled, items)).image_to_text.recall[1] == 1.0
    same = np.repeat(features[:1], 30, axis=0) * random.uniform(1, 2, size=(30, 1)).astype(np.float32)
    found = retrieval_scores(Features(same.astype(np.float64), items, same.astype(np.float64), items))
    assert found.image_to_text.recall[1] == pytest.approx(1 / 30)
    zeros = retrieval_scores(Features(features * 0, items, features, items))
    assert zeros.text_to_image.recall[1] == pytest.approx(1 / 30)


def test_rows_that_only_fill_and_repeated_images_are_left_out() -> None:
    images = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [5.0, 5.0]])
    texts = torch.arange(8.0).view(4, 2)
    found = gather_features(
        images, texts, torch.tensor([2, 2, 0, -1]), torch.tensor([True, True, True, False])
    )  # fmt: skip
    assert found.image_items_I.tolist() == [0, 2]
    assert found.images_ID.tolist() == [[0.0, 1.0], [1.0, 0.0]]
    assert found.text_items_T.tolist() == [0, 2, 2]
    assert found.texts_TD.tolist() == [[4.0, 5.0], [0.0, 1.0], [2.0, 3.0]]


def test_the_rows_of_all_ranks_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    others = (np.array([[3.0, 3.0], [0.0, 1.0]]), np.array([[4.0, 4.0], [5.0, 5.0]]), np.array([1, 2]))

    def gather(everyones: list, own: tuple) -> None:
        everyones[:] = [own, others]

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    mine = torch.tensor([[1.0, 0.0], [7.0, 7.0]])
    found = gather_features(mine, mine + 1, torch.tensor([2, -1]), torch.tensor([True, False]))
    assert found.image_items_I.tolist() == [1, 2]
    assert found.images_ID.tolist() == [[3.0, 3.0], [1.0, 0.0]]
    assert found.text_items_T.tolist() == [1, 2, 2]
    assert found.texts_TD.tolist() == [[4.0, 4.0], [2.0, 1.0], [5.0, 5.0]]


def test_queries_without_an_answer() -> None:
    with pytest.raises(ValueError, match="no right candidate"):
        of([[0.1, 0.2]], [[0, 0]])
    with pytest.raises(ValueError, match="no query"):
        recall_of(iter([]))
