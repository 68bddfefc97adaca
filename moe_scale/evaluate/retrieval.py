"""How well images find their texts and texts their images: recall at 1, 5 and 10, and the median rank.

Shape suffixes: I images, T texts, Q queries, N candidates, D width of the features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

CUTOFFS = (1, 5, 10)
"""The k of recall@k."""

_DECIMALS = 6  # of similarities: fp32 products of equal features differ beyond
_QUERIES_AT_ONCE = 1024


@dataclass(frozen=True)
class Features:
    """Images and texts as a model sees them.

    Attributes:
        images_ID: of distinct images, float64.
        image_items_I: number of each image.
        texts_TD: float64.
        text_items_T: number of the image that each text belongs to.
    """

    images_ID: np.ndarray
    image_items_I: np.ndarray
    texts_TD: np.ndarray
    text_items_T: np.ndarray


@dataclass(frozen=True)
class Recall:
    """How well queries find what belongs to them, in one direction.

    Attributes:
        queries, candidates: Q and N.
        recall: share of the queries that have a right candidate among the best k, for each k of :data:`CUTOFFS`.
        median_rank: median over the queries of the place of their best right candidate, from 1.
        chance_recall, chance_median_rank: the same for candidates in an order that was drawn.
    """

    queries: int
    candidates: int
    recall: dict[int, float]
    median_rank: float
    chance_recall: dict[int, float]
    chance_median_rank: float

    @property
    def over_chance(self) -> float:
        """Recall at 1 as a multiple of what chance gives."""
        return self.recall[1] / self.chance_recall[1]


@dataclass(frozen=True)
class RetrievalScores:
    """Both directions."""

    image_to_text: Recall
    text_to_image: Recall

    def record(self) -> dict[str, Any]:
        """As it is written to JSON."""
        return asdict(self)


def gather_features(
    images_BD: torch.Tensor, texts_BD: torch.Tensor, items_B: torch.Tensor, present_B: torch.Tensor
) -> Features:
    """The features of all rows of all ranks, on every rank; all ranks must call it together.

    An image that several rows have is taken once. Rows that only fill batches are left out.

    Args:
        images_BD, texts_BD: of each row of this rank's batches, all of them in one tensor.
        items_B, present_B: as in :class:`moe_scale.data.images.batches.ImageTextBatch`.
    """
    present = present_B.cpu().numpy()
    mine = tuple(one.detach().double().cpu().numpy()[present] for one in (images_BD, texts_BD))
    everyones = [(*mine, items_B.cpu().numpy()[present])]
    if dist.is_initialized() and dist.get_world_size() > 1:
        own, everyones = everyones[0], [()] * dist.get_world_size()
        dist.all_gather_object(everyones, own)
    images, texts, items = (np.concatenate(parts) for parts in zip(*everyones, strict=True))
    order = np.argsort(items, kind="stable")
    image_items, first = np.unique(items[order], return_index=True)
    return Features(images[order][first], image_items, texts[order], items[order])


def retrieval_scores(features: Features) -> RetrievalScores:
    """Recall and median rank both ways, by the cosine of the features.

    Raises:
        ValueError: when there is no image or no text, or a query has no right candidate.
    """
    images_ID, texts_TD = _unit(features.images_ID), _unit(features.texts_TD)
    return RetrievalScores(
        _recall(images_ID, features.image_items_I, texts_TD, features.text_items_T),
        _recall(texts_TD, features.text_items_T, images_ID, features.image_items_I),
    )


def _unit(features: np.ndarray) -> np.ndarray:
    """Rows of length 1; a row of zeros stays one."""
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    return np.asarray(features / np.where(norms > 0, norms, 1.0))


def _recall(queries_QD: np.ndarray, of_Q: np.ndarray, candidates_ND: np.ndarray, of_N: np.ndarray) -> Recall:
    def rows() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for first in range(0, len(queries_QD), _QUERIES_AT_ONCE):
            some = slice(first, first + _QUERIES_AT_ONCE)
            yield (queries_QD[some] @ candidates_ND.T).round(_DECIMALS), of_Q[some, None] == of_N[None]

    return recall_of(rows())


def recall_of(blocks: Iterator[tuple[np.ndarray, np.ndarray]]) -> Recall:
    """Recall and median rank from scores, which need not be cosines: those of image-text matching will do.

    Equal scores are in an order that is drawn: a query counts with the probability that a right candidate is among the
    best k, and with the expected rank. So a model whose scores are all equal gets what chance gives. A score that is
    not a number is below all others.

    Args:
        blocks: pairs of scores [Q, N] and of which candidates are right [Q, N] bool; some queries each.

    Raises:
        ValueError: without a query, or when one has no right candidate.
    """
    found: list[list[float]] = []
    by_chance: list[list[float]] = []
    candidates = 0
    for scores_QN, right_QN in blocks:
        scores_QN = np.where(np.isnan(scores_QN), -np.inf, scores_QN)
        candidates = scores_QN.shape[1]
        if not right_QN.any(axis=1).all():
            raise ValueError("a query has no right candidate")
        best_Q1 = np.where(right_QN, scores_QN, -np.inf).max(axis=1, keepdims=True)
        above_Q = (scores_QN > best_Q1).sum(axis=1)  # all of them wrong
        tied_QN = scores_QN == best_Q1
        right_Q, wrong_Q = (tied_QN & right_QN).sum(axis=1), (tied_QN & ~right_QN).sum(axis=1)
        for above, right, wrong in zip(above_Q.tolist(), right_Q.tolist(), wrong_Q.tolist(), strict=True):
            found.append(_expected(above, right, wrong))
        by_chance += [_expected(0, right, candidates - right) for right in right_QN.sum(axis=1).tolist()]
    if not found:
        raise ValueError("there is no query")
    recalls, chances = np.array(found), np.array(by_chance)
    return Recall(
        queries=len(found),
        candidates=candidates,
        recall=dict(zip(CUTOFFS, recalls[:, :-1].mean(axis=0).tolist(), strict=True)),
        median_rank=float(np.median(recalls[:, -1])),
        chance_recall=dict(zip(CUTOFFS, chances[:, :-1].mean(axis=0).tolist(), strict=True)),
        chance_median_rank=float(np.median(chances[:, -1])),
    )


def _expected(above: int, right: int, wrong: int) -> list[float]:
    """Of a query with so many candidates above its best right one and so many, right and wrong, that are its equals:
    the probabilities of a right one among the best k, for each k, and the expected rank of the first right one."""
    total = right + wrong
    found = []
    for k in CUTOFFS:
        places = min(max(k - above, 0), total)  # of those that are equal
        found.append(1 - math.comb(wrong, places) / math.comb(total, places))
    return [*found, above + (total + 1) / (right + 1)]
