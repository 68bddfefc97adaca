"""Labelled examples to padded batches, for training and evaluation.

Shape suffixes: B batch, S sequence, I width of features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from moe_scale.data.examples.prepare import ExampleSplit
from moe_scale.data.examples.vocabulary import PAD
from moe_scale.data.loader import TrainLoader, require_same
from moe_scale.data.packing import IGNORE, SampleOrder

NO_EXAMPLE = -1
"""Index of a row that only fills a batch."""


class ExampleBatch(NamedTuple):
    """Examples, padded on the right.

    Attributes:
        inputs: token ids [B, S] int64, or features [B, S, I] float32; zero after the sequence's end.
        valid_BS: bool, False for padding.
        labels_B: int64; -100 for a row that only fills the batch.
        indices_B: place of each example in its split, int64; -1 for a row that only fills the batch.
    """

    inputs: torch.Tensor
    valid_BS: torch.Tensor
    labels_B: torch.Tensor
    indices_B: torch.Tensor


def make_batch(split: ExampleSplit, indices: Sequence[int]) -> ExampleBatch:
    """The batch of these examples of a split, as wide as the longest of them; -1 stands for an empty row."""
    rows = [split.inputs(index) if index != NO_EXAMPLE else split.inputs(0)[:0] for index in indices]
    longest = max(1, *(len(row) for row in rows))
    dtype = np.float32 if rows[0].ndim == 2 else np.int64
    inputs = np.full((len(rows), longest, *rows[0].shape[1:]), PAD, dtype=dtype)
    valid_BS = np.zeros((len(rows), longest), dtype=bool)
    for place, row in enumerate(rows):
        inputs[place, : len(row)] = row
        valid_BS[place, : len(row)] = True
    labels_B = [int(split.labels_M[index]) if index != NO_EXAMPLE else IGNORE for index in indices]
    return ExampleBatch(
        torch.from_numpy(inputs), torch.from_numpy(valid_BS), torch.tensor(labels_B), torch.tensor(list(indices))
    )


class ExampleLoader(TrainLoader[ExampleBatch]):
    """The training batches of one rank, endless: every epoch is a fresh permutation of the split.

    The m-th batch of rank r has the examples from (m * world_size + r) * batch on, of the epochs' permutations one
    after the other; so ranks together see the same examples whatever their number.

    Args:
        batch: examples of a micro-batch.
        seed: of the order.
    """

    def __init__(self, split: ExampleSplit, *, batch: int, rank: int, world_size: int, seed: int, fingerprint: str):
        self.split, self.batch, self.rank, self.world_size = split, batch, rank, world_size
        self.order = SampleOrder(len(split), seed)
        self._identity = {"kind": "examples", "seed": seed, "fingerprint": fingerprint}
        self._done = 0  # examples handed out, over all ranks
        self._tokens = 0

    def __next__(self) -> ExampleBatch:
        everyones = self.order.span(self._done, self.batch * self.world_size)
        self._done += len(everyones)
        self._tokens += int(self.split.lengths_M[everyones].sum())
        mine = everyones[self.rank * self.batch : (self.rank + 1) * self.batch]
        return make_batch(self.split, mine.tolist())

    def take_tokens(self) -> int:
        """Positions without padding of all ranks' batches since the last call; equal on all ranks."""
        taken, self._tokens = self._tokens, 0
        return taken

    def state_dict(self) -> dict[str, Any]:
        return {"examples": self._done, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``, of any number of ranks: the position is the same on all."""
        require_same(state, self._identity)
        self._done, self._tokens = int(state["examples"]), 0


def eval_batches(
    split: ExampleSplit, *, batch: int, rank: int, world_size: int, limit: int = 0
) -> Iterator[ExampleBatch]:
    """The examples of a split in the order of their length, each once over all ranks.

    Every rank gets the same number of batches of the same number of rows, because the forward pass of a sharded model
    is collective: rows without an example are empty, with label -100 and index -1.

    Args:
        limit: examples at most, the first ones of the split, which is in no special order; 0 means all.
    """
    count = min(limit or len(split), len(split))
    order = np.argsort(split.lengths_M[:count], kind="stable")
    total = math.ceil(count / (batch * world_size)) * batch * world_size
    padded = np.concatenate([order, np.full(total - count, NO_EXAMPLE)])
    for first in range(rank * batch, total, batch * world_size):
        yield make_batch(split, padded[first : first + batch].tolist())
