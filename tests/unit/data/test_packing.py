"""Packing against a slow, obvious version of it, on documents of random lengths."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_scale.data.packing import SampleOrder, TokenStream, padded_batches, require_sequences
from moe_scale.errors import ConfigError

EOT = 9

documents_strategy = st.lists(st.lists(st.integers(0, 8), max_size=7), min_size=1, max_size=12)


def stream_of(documents: list[list[int]]) -> TokenStream:
    flat = [token for document in documents for token in [EOT, *document]]
    return TokenStream(np.asarray(flat, dtype=np.uint16), EOT)


def reference(documents: list[list[int]], seq_len: int) -> list[list[tuple[int, int, int]]]:
    """All sequences, the last one partial, as (input, target, document of the sequence)."""
    flat = [(token, n) for n, document in enumerate(documents) for token in [EOT, *document]]
    sequences = []
    for start in range(0, len(flat) - 1, seq_len):
        first_document = flat[start][1]
        sequence = []
        for k in range(start, min(start + seq_len, len(flat) - 1)):
            sequence.append((flat[k][0], flat[k + 1][0], flat[k][1] - first_document))
        sequences.append(sequence)
    return sequences


@settings(max_examples=100, deadline=None)
@given(documents_strategy, st.integers(1, 9))
def test_whole_sequences(documents: list[list[int]], seq_len: int) -> None:
    stream = stream_of(documents)
    expected = [s for s in reference(documents, seq_len) if len(s) == seq_len]
    assert stream.num_sequences(seq_len) == len(expected)
    if not expected:
        return
    batch = stream.batch(range(len(expected)), seq_len)
    assert all(t.dtype == torch.int64 and t.shape == (len(expected), seq_len) for t in batch)
    assert torch.stack(list(batch), dim=-1).tolist() == [[list(t) for t in s] for s in expected]


@settings(max_examples=100, deadline=None)
@given(documents_strategy, st.integers(1, 9), st.integers(1, 3), st.integers(1, 4), st.integers(1, 100))
def test_evaluation_batches(
    documents: list[list[int]], seq_len: int, micro_batch: int, world_size: int, max_tokens: int
) -> None:
    stream = stream_of(documents)
    flat = [pair for sequence in reference(documents, seq_len) for pair in sequence][:max_tokens]
    settings = {"micro_batch": micro_batch, "world_size": world_size, "max_tokens": max_tokens}
    per_rank = [list(padded_batches(stream, seq_len, rank=rank, **settings)) for rank in range(world_size)]
    assert len({len(batches) for batches in per_rank}) == 1  # a collective forward needs every rank
    assert all(t.shape == (micro_batch, seq_len) for batches in per_rank for b in batches for t in b)
    # Sequence j is on rank j % world_size: undo that.
    by_rank = [torch.cat([torch.stack(list(b), dim=-1) for b in batches]) for batches in per_rank if batches]
    got = []
    for j in range(len(by_rank[0]) * world_size if by_rank else 0):
        sequence = by_rank[j % world_size][j // world_size].tolist()
        for input_token, target, document in sequence:
            if target == -100:
                assert (input_token, document) == (EOT, -1)
            else:
                got.append((input_token, target, document))
    assert got == flat


def test_the_end_of_a_document_is_a_target() -> None:
    batch = stream_of([[1, 2], [3], [4, 5]]).batch([0], 7)
    assert batch.ids_BS.tolist() == [[EOT, 1, 2, EOT, 3, EOT, 4]]
    assert batch.targets_BS.tolist() == [[1, 2, EOT, 3, EOT, 4, 5]]
    assert batch.document_ids_BS.tolist() == [[0, 0, 0, 1, 1, 2, 2]]


def test_too_little_text() -> None:
    with pytest.raises(
        ConfigError, match=r"data\.seq_len: 5 is longer than the training text, which has 5 tokens.*most 4"
    ):
        require_sequences(stream_of([[1, 2, 3, 4]]), 5)
    assert require_sequences(stream_of([[1, 2, 3, 4]]), 4) == 1


def test_order_is_a_new_permutation_each_epoch() -> None:
    order = SampleOrder(100, seed=7)
    epochs = [[order[i] for i in range(100 * e, 100 * e + 100)] for e in range(3)]
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [SampleOrder(100, seed=7)[i] for i in range(250, 260)] == epochs[2][50:60]
    assert [SampleOrder(100, seed=8)[i] for i in range(100)] != epochs[0]
    SampleOrder(3, seed=2**40)[5]


def test_order_stays_the_same_between_releases() -> None:
    order = SampleOrder(10, seed=1234)
    epochs = [[0, 5, 2, 7, 3, 4, 8, 1, 6, 9], [4, 7, 9, 0, 5, 6, 2, 8, 3, 1]]
    assert [[order[10 * e + i] for i in range(10)] for e in range(2)] == epochs
