"""Which pairs are in which batch: directions by temperature, sentences of similar length together.

Everything is a function of (seed, epoch) alone, so every rank knows all batches. Shape suffixes: M pairs of the
split, P pairs of an epoch, N batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_scale.data.packing import SampleOrder
from moe_scale.data.pairs.prepare import PairSplit
from moe_scale.data.pairs.sentences import stable_hash

SOURCE_EXTRA = 2
"""Tokens of a source beside its text: the language tag and the end."""

TARGET_EXTRA = 1
"""Tokens of a target beside its text: the begin of its inputs, or the end of its targets."""


@dataclass(frozen=True)
class BatchList:
    """Batches of pairs.

    Attributes:
        pairs_P: [P] int64, the pairs of all batches, one batch after the other.
        starts_N1: [N + 1] int64, where each batch begins in ``pairs_P``, and the end.
        tokens_N: [N] int64 tokens of each batch, both sides, without padding.
    """

    pairs_P: np.ndarray
    starts_N1: np.ndarray
    tokens_N: np.ndarray

    def __len__(self) -> int:
        return len(self.starts_N1) - 1

    def batch(self, index: int) -> np.ndarray:
        """The pairs of one batch, [B] int64."""
        return self.pairs_P[self.starts_N1[index] : self.starts_N1[index + 1]]


def direction_quotas(counts_D: np.ndarray, temperature: float) -> np.ndarray:
    """Pairs of each direction in an epoch, [D] int64, in proportion to n^(1/temperature) (arXiv 1907.05019).

    An epoch has as many pairs as the split. At temperature 1 a direction has as many as there are of it, so every
    pair comes once; above 1 those of small directions come more often and those of large ones not in every epoch.
    """
    weights_D = np.exp(np.log(counts_D) / temperature - np.log(counts_D.max()) / temperature)  # at most 1: no overflow
    exact_D = counts_D.sum() * weights_D / weights_D.sum()
    quotas_D = np.floor(exact_D + 1e-9).astype(np.int64)
    rest = int(counts_D.sum() - quotas_D.sum())
    quotas_D[np.argsort(quotas_D - exact_D, kind="stable")[:rest]] += 1  # the largest remainders
    return np.maximum(quotas_D, 1)


class EpochOrder:
    """The batches of every epoch of a split.

    Args:
        split: what to draw from; every direction has a pair.
        budget: tokens of a batch at most, both sides, padding included; room for one longest pair at least.
        temperature: see :func:`direction_quotas`.
        seed: of the order.
    """

    def __init__(self, split: PairSplit, *, budget: int, temperature: float, seed: int):
        self.split = split
        self.budget = budget
        self.seed = seed
        self._members = [np.flatnonzero(split.direction_M == d) for d in range(len(split.directions))]
        self._quotas_D = direction_quotas(np.array([len(m) for m in self._members]), temperature)
        self._orders = [
            # A seed for each direction, or directions of equal size would draw the same sentences in each epoch.
            SampleOrder(len(members), stable_hash(f"{seed} {name}"))
            for members, name in zip(self._members, split.directions, strict=True)
        ]
        self._held: dict[int, BatchList] = {}

    def epoch(self, epoch: int) -> BatchList:
        """The batches of one epoch; the last few that were asked for are kept."""
        if epoch not in self._held:
            while len(self._held) > 1:
                self._held.pop(next(iter(self._held)))
            self._held[epoch] = self._batches(epoch)
        return self._held[epoch]

    def _batches(self, epoch: int) -> BatchList:
        # Each direction goes through its pairs in permutation after permutation, a quota an epoch.
        drawn = [
            members[order.span(epoch * int(quota), int(quota))]
            for members, order, quota in zip(self._members, self._orders, self._quotas_D, strict=True)
        ]
        random = np.random.RandomState([self.seed & 0xFFFFFFFF, self.seed >> 32, epoch, 1])
        pairs_P = random.permutation(np.concatenate(drawn))  # so that pairs of equal lengths meet in other batches
        batches = fill_batches(self.split, pairs_P, self.budget)
        return _reordered(batches, random.permutation(len(batches)))


def fill_batches(split: PairSplit, pairs_P: np.ndarray, budget: int) -> BatchList:
    """Batches of pairs of similar length, shortest first, each filled as far as its tokens fit ``budget``.

    A batch of b pairs has b * (longest source + longest target) tokens, padding included. Pairs are sorted by the
    longer of their sides, then by the source, alternately up and down, so that neighbours differ little in both.
    """
    source_P = split.source_lengths_M[pairs_P] + SOURCE_EXTRA
    target_P = split.target_lengths_M[pairs_P] + TARGET_EXTRA
    longer_P = np.maximum(source_P, target_P)
    zigzag_P = np.where(longer_P % 2, source_P - target_P, target_P - source_P)
    order_P = np.lexsort((zigzag_P, longer_P))
    starts = [0]
    longest_source = longest_target = 0
    sides = zip(source_P[order_P].tolist(), target_P[order_P].tolist(), strict=True)
    for place, (source, target) in enumerate(sides):
        longest_source, longest_target = max(longest_source, source), max(longest_target, target)
        if (place + 1 - starts[-1]) * (longest_source + longest_target) > budget and place > starts[-1]:
            starts.append(place)
            longest_source, longest_target = source, target
    starts_N1 = np.array([*starts, len(pairs_P)] if len(pairs_P) else [0], dtype=np.int64)
    ends_P1 = np.concatenate([[0], np.cumsum((source_P + target_P)[order_P])])
    return BatchList(pairs_P[order_P], starts_N1, np.diff(ends_P1[starts_N1]))


def _reordered(batches: BatchList, order_N: np.ndarray) -> BatchList:
    sizes_N = np.diff(batches.starts_N1)[order_N]
    starts_N1 = np.concatenate([[0], np.cumsum(sizes_N)])
    # Places of the batches' pairs: where each batch was, and counting on from there.
    places_P = np.repeat(batches.starts_N1[:-1][order_N] - starts_N1[:-1], sizes_N) + np.arange(starts_N1[-1])
    return BatchList(batches.pairs_P[places_P], starts_N1, batches.tokens_N[order_N])
