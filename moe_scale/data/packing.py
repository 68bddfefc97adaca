"""Documents to fixed-length sequences: a stream of tokens, cut every S tokens.

Every document is [EOT] + its tokens; the documents of a split follow one another in one stream. Sequence i covers
stream tokens i*S to i*S + S, the last of which is only a target, so consecutive sequences share one token and every
token but the first is a target exactly once. Shape suffixes: B batch, S sequence, T tokens of a stream.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from moe_scale.errors import ConfigError, Problem

IGNORE = -100
"""Target of a position without a loss: the index that ``torch.nn.functional.cross_entropy`` ignores."""


class Batch(NamedTuple):
    """Sequences with their next tokens.

    Attributes:
        ids_BS: input tokens, [B, S] int64.
        targets_BS: the token after each input, [B, S] int64; -100 where there is none. The last token of a document
            has the next document's EOT as its target, which teaches the model to stop.
        document_ids_BS: which document of its sequence a token belongs to, [B, S] int64: 0, 1, 2... from the left;
            -1 for padding.
    """

    ids_BS: torch.Tensor
    targets_BS: torch.Tensor
    document_ids_BS: torch.Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch on ``device``."""
        return Batch(*(tensor.to(device, non_blocking=non_blocking) for tensor in self))


class TokenStream:
    """The tokens of one split, [T], read in place from disk.

    Args:
        tokens_T: unsigned integers; a memory map costs no memory until it is read.
        eot_id: the token that starts every document.
    """

    def __init__(self, tokens_T: np.ndarray, eot_id: int):
        self.tokens_T = tokens_T
        self.eot_id = eot_id

    @classmethod
    def open(cls, path: Path, dtype: str, eot_id: int) -> TokenStream:
        """Map the file ``path`` of flat tokens into memory."""
        if not path.stat().st_size:  # an empty file cannot be mapped
            return cls(np.empty(0, dtype=dtype), eot_id)
        return cls(np.memmap(path, dtype=dtype, mode="r"), eot_id)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens_T)

    def num_sequences(self, seq_len: int) -> int:
        """Whole sequences in the stream; what is left after the last of them is shorter than ``seq_len``."""
        return max(0, (self.num_tokens - 1) // seq_len)

    def batch(self, indices: np.ndarray | list[int], seq_len: int) -> Batch:
        """The whole sequences with these numbers, [B, S]."""
        rows = np.empty((len(indices), seq_len + 1), dtype=np.int64)
        for row, index in zip(rows, indices, strict=True):
            start = int(index) * seq_len
            row[:] = self.tokens_T[start : start + seq_len + 1]
        return pack(rows, self.eot_id)


def pack(tokens_BS1: np.ndarray, eot_id: int) -> Batch:
    """A batch of [B, S + 1] stream tokens: inputs, shifted targets and the documents they belong to."""
    ids_BS = tokens_BS1[:, :-1]
    document_ids_BS = np.cumsum(ids_BS == eot_id, axis=1, dtype=np.int64)
    # A sequence that starts inside a document and one that starts with an EOT both begin at 0.
    document_ids_BS -= document_ids_BS[:, :1].copy()
    arrays = (ids_BS, tokens_BS1[:, 1:], document_ids_BS)
    return Batch(*(torch.from_numpy(np.ascontiguousarray(a, dtype=np.int64)) for a in arrays))


def padded_batches(
    stream: TokenStream, seq_len: int, *, micro_batch: int, rank: int, world_size: int, max_tokens: int
) -> Iterator[Batch]:
    """The stream in order for evaluation, sequence j on rank j % world_size, the same number of batches on all ranks.

    Ranks without a sequence get one of padding (ids EOT, targets -100, documents -1), because the forward pass of a
    sharded model is collective. The last sequence may be partial and is padded the same way.

    Args:
        max_tokens: tokens scored over all ranks together, at most.
    """
    scored = min(max_tokens, stream.num_tokens - 1)  # every token but the first is a target once
    total = math.ceil(scored / seq_len)
    batches = math.ceil(total / (world_size * micro_batch))
    for first in range(0, batches * micro_batch, micro_batch):
        ids_BS = torch.full((micro_batch, seq_len), stream.eot_id, dtype=torch.int64)
        targets_BS = torch.full_like(ids_BS, IGNORE)
        document_ids_BS = torch.full_like(ids_BS, -1)
        for row in range(micro_batch):
            start = ((first + row) * world_size + rank) * seq_len
            length = min(seq_len, scored - start)
            if length > 0:
                tokens_1S1 = np.asarray(stream.tokens_T[start : start + length + 1], dtype=np.int64)[None]
                one = pack(tokens_1S1, stream.eot_id)
                ids_BS[row, :length], targets_BS[row, :length], document_ids_BS[row, :length] = (t[0] for t in one)
        yield Batch(ids_BS, targets_BS, document_ids_BS)


class SampleOrder:
    """An endless order of ``num_sequences`` sequences: a fresh permutation each epoch.

    The order is a function of the seed alone, so any rank can look up any global sample; one epoch's permutation is
    held at a time. ``RandomState`` is used because numpy promises its numbers never change between releases.
    """

    def __init__(self, num_sequences: int, seed: int):
        self.num_sequences = num_sequences
        self.seed = seed
        self._epoch = -1
        self._permutation = np.empty(0, dtype=np.int64)

    def __getitem__(self, sample: int) -> int:
        """The sequence that is the global sample number ``sample``, counted from 0 over all epochs."""
        epoch, index = divmod(sample, self.num_sequences)
        return int(self._permuted(epoch)[index])

    def span(self, first: int, count: int) -> np.ndarray:
        """The sequences that are the global samples ``first`` to ``first + count``, [count] int64."""
        parts = [np.empty(0, dtype=np.int64)]
        while count:
            epoch, index = divmod(first, self.num_sequences)
            parts.append(self._permuted(epoch)[index : index + count])
            first, count = first + len(parts[-1]), count - len(parts[-1])
        return np.concatenate(parts)

    def _permuted(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            random = np.random.RandomState([self.seed & 0xFFFFFFFF, self.seed >> 32, epoch])
            self._permutation = random.permutation(self.num_sequences)
            self._epoch = epoch
        return self._permutation


def require_sequences(stream: TokenStream, seq_len: int) -> int:
    """Whole sequences of the training stream; a :class:`ConfigError` at ``data.seq_len`` if there are none."""
    count = stream.num_sequences(seq_len)
    if not count:
        raise ConfigError(
            Problem(
                "data.seq_len",
                f"{seq_len} is longer than the training text, which has {stream.num_tokens} tokens",
                f"choose at most {max(1, stream.num_tokens - 1)}, or more text",
            )
        )
    return count
