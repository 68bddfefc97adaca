"""Sentence pairs to padded batches, for training, evaluation and translation.

Shape suffixes: B batch, S source tokens, T target tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from moe_scale.config import PairDataConfig
from moe_scale.data.loader import TrainLoader, require_same
from moe_scale.data.packing import IGNORE
from moe_scale.data.pairs.order import SOURCE_EXTRA, TARGET_EXTRA, EpochOrder, fill_batches
from moe_scale.data.pairs.prepare import PairSplit, PreparedPairs
from moe_scale.data.pairs.tokenizer import BOS_ID, EOS_ID, PAD_ID, PairTokenizer
from moe_scale.errors import ConfigError, Problem

NO_PAIR = -1
"""Index of a pair that only fills a batch."""


class PairBatch(NamedTuple):
    """Pairs, padded on the right.

    Attributes:
        source_BS: tag of the target language, source tokens, EOS; [B, S] int64, PAD after it.
        inputs_BT: BOS, target tokens; [B, T] int64, PAD after it.
        targets_BT: target tokens, EOS: what follows each input; [B, T] int64, -100 after it.
        directions_B: place of each pair's direction in ``PreparedPairs.directions``, [B] int64.
        indices_B: place of each pair in its split, [B] int64; -1 for one that only fills the batch.
    """

    source_BS: torch.Tensor
    inputs_BT: torch.Tensor
    targets_BT: torch.Tensor
    directions_B: torch.Tensor
    indices_B: torch.Tensor = torch.empty(0, dtype=torch.int64)  # where nobody asks for the pairs' places

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PairBatch:
        """The batch on ``device``."""
        return PairBatch(*(tensor.to(device, non_blocking=non_blocking) for tensor in self))

    @property
    def num_source(self) -> int:
        """Source tokens without padding, tags and ends included. Waits for the device, if the batch is on one."""
        return int((self.source_BS != PAD_ID).sum())

    @property
    def num_target(self) -> int:
        """Targets with a loss, ends included. Waits for the device, if the batch is on one."""
        return int((self.targets_BT != IGNORE).sum())


class PairItem(NamedTuple):
    """One row of a batch.

    Attributes:
        source_ids, target_ids: tokens without tag, begin and end; no target to translate, or None for a row that
            only fills the batch.
        tag_id: tag of the target language.
        direction: place of the direction in ``PreparedPairs.directions``; 0 where there is none.
        pair: place in the split, or -1.
    """

    source_ids: Sequence[int] | np.ndarray
    target_ids: Sequence[int] | np.ndarray | None
    tag_id: int
    direction: int = 0
    pair: int = NO_PAIR


def make_batch(items: Sequence[PairItem]) -> PairBatch:
    """The batch of ``items``, as wide as the longest of them."""
    num_source = max(len(item.source_ids) for item in items) + SOURCE_EXTRA
    num_target = max(len(item.target_ids) if item.target_ids is not None else 0 for item in items) + TARGET_EXTRA
    source_BS = np.full((len(items), num_source), PAD_ID, dtype=np.int64)
    inputs_BT = np.full((len(items), num_target), PAD_ID, dtype=np.int64)
    targets_BT = np.full((len(items), num_target), IGNORE, dtype=np.int64)
    for row, item in enumerate(items):
        end = len(item.source_ids) + 1
        source_BS[row, 0] = item.tag_id
        source_BS[row, 1:end] = item.source_ids
        source_BS[row, end] = EOS_ID
        inputs_BT[row, 0] = BOS_ID
        if item.target_ids is not None:
            end = len(item.target_ids)
            inputs_BT[row, 1 : end + 1] = item.target_ids
            targets_BT[row, :end] = item.target_ids
            targets_BT[row, end] = EOS_ID
    directions_B = torch.tensor([item.direction for item in items], dtype=torch.int64)
    indices_B = torch.tensor([item.pair for item in items], dtype=torch.int64)
    source, inputs, targets = (torch.from_numpy(array) for array in (source_BS, inputs_BT, targets_BT))
    return PairBatch(source, inputs, targets, directions_B, indices_B)


def split_batch(split: PairSplit, indices: np.ndarray, tags: Sequence[int]) -> PairBatch:
    """The batch of the pairs ``indices`` of a split.

    Args:
        tags: tag of each direction's target language, as of :func:`direction_tags`.
    """
    return make_batch(
        [
            PairItem(
                split.source_ids(index),
                split.target_ids(index),
                tags[direction := int(split.direction_M[index])],
                direction,
                index,
            )
            for index in map(int, indices)
        ]
    )


def direction_tags(directions: Sequence[str], tokenizer: PairTokenizer) -> list[int]:
    """Tag of each direction's target language."""
    return [tokenizer.tag_id(direction.split("-")[1]) for direction in directions]


def token_budget(config: PairDataConfig, micro_batch: int) -> int:
    """Tokens of a micro-batch at most, both sides, padding included.

    Raises:
        ConfigError: at ``data.batch_tokens``, when one pair of ``max_len`` does not fit; says the least value.
    """
    budget, longest = micro_batch * config.batch_tokens, 2 * config.max_len + SOURCE_EXTRA + TARGET_EXTRA
    if budget < longest:
        raise ConfigError(
            Problem(
                "data.batch_tokens",
                f"a micro-batch has room for {micro_batch} * {config.batch_tokens} = {budget} tokens, and one pair of "
                f"data.max_len = {config.max_len} takes {longest}",
                f"choose at least {math.ceil(longest / micro_batch)}, or a larger micro-batch, or a lower data.max_len",
            )
        )
    return budget


def pair_loader(
    pairs: PreparedPairs, config: PairDataConfig, *, micro_batch: int, rank: int, world_size: int, seed: int
) -> PairLoader:
    """The training batches of one rank, endless.

    Every epoch is a list of batches that is a function of (seed, epoch) alone, of all directions together: see
    :mod:`moe_scale.data.pairs.order`. The m-th batch of rank r is number m * world_size + r of the epochs' lists, one
    after the other; so ranks together see the same batches whatever their number.

    Args:
        micro_batch: that of the DeepSpeed JSON: a batch has up to ``micro_batch * data.batch_tokens`` tokens.
        rank, world_size: of the data-parallel group.
        seed: of the order.

    Raises:
        ConfigError: as :func:`token_budget`.
    """
    return PairLoader(pairs, config, token_budget(config, micro_batch), rank, world_size, seed)


class PairLoader(TrainLoader[PairBatch]):
    """Reads in this process: a batch is a copy of a few kilobytes from a memory map, quicker than a queue."""

    def __init__(
        self, pairs: PreparedPairs, config: PairDataConfig, budget: int, rank: int, world_size: int, seed: int
    ):
        self.split = pairs.split("train")
        self.rank = rank
        self.world_size = world_size
        self.order = EpochOrder(self.split, budget=budget, temperature=config.pair_temperature, seed=seed)
        self._tags = direction_tags(pairs.directions, pairs.tokenizer)
        self._identity = {
            "kind": "pairs",
            "seed": seed,
            "budget": budget,
            "pair_temperature": config.pair_temperature,
            "fingerprint": pairs.fingerprint,
        }
        self._epoch = self._batch = 0  # the next global batch: its epoch, and its place in the epoch's list
        self._tokens = 0

    def __next__(self) -> PairBatch:
        mine: PairBatch | None = None
        for rank in range(self.world_size):
            batches = self.order.epoch(self._epoch)
            if rank == self.rank:
                mine = split_batch(self.split, batches.batch(self._batch), self._tags)
            self._tokens += int(batches.tokens_N[self._batch])
            self._batch += 1
            if self._batch == len(batches):
                self._epoch, self._batch = self._epoch + 1, 0
        assert mine is not None, f"rank {self.rank} of {self.world_size}"
        return mine

    def take_tokens(self) -> int:
        """Tokens without padding, both sides, of all ranks' batches since the last call; equal on all ranks."""
        taken, self._tokens = self._tokens, 0
        return taken

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "batch": self._batch, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``, of any number of ranks: the position is the same on all."""
        require_same(state, self._identity)
        self._epoch, self._batch = int(state["epoch"]), int(state["batch"])
        self._tokens = 0


def eval_pair_batches(
    split: PairSplit,
    tokenizer: PairTokenizer,
    *,
    budget: int,
    rank: int,
    world_size: int,
    limit_per_direction: int = 0,
) -> Iterator[PairBatch]:
    """The pairs of a held-out split in the order of their length, each once over all ranks.

    Batch j goes to rank j % world_size. Every rank gets the same number of batches, because the forward pass of a
    sharded model is collective: one without pairs left gets a batch of one row with an empty source, targets -100 and
    index -1. ``indices_B`` tells which pair of the split a row is.

    Args:
        budget: tokens of a batch at most, as of :func:`token_budget`.
        limit_per_direction: pairs of each direction, the first ones of the split, which is in no special order; 0
            means all.
    """
    members = [np.flatnonzero(split.direction_M == d) for d in range(len(split.directions))]
    chosen_P = np.concatenate([m[: limit_per_direction or len(m)] for m in members])
    batches = fill_batches(split, chosen_P, budget)
    tags = direction_tags(split.directions, tokenizer)
    for first in range(0, len(batches), world_size):
        mine = first + rank
        if mine < len(batches):
            yield split_batch(split, batches.batch(mine), tags)
        else:
            yield make_batch([PairItem([], None, tags[0])])
