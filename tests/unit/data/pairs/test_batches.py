"""Batches: what is in them, how full they are, and that their order is one for all ranks, exactly resumable."""

from __future__ import annotations

import dataclasses
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_scale.config import PairDataConfig
from moe_scale.data.packing import IGNORE
from moe_scale.data.pairs.batches import (
    NO_PAIR,
    PairBatch,
    PairItem,
    eval_pair_batches,
    make_batch,
    pair_loader,
    token_budget,
)
from moe_scale.data.pairs.order import EpochOrder, direction_quotas, fill_batches
from moe_scale.data.pairs.prepare import PreparedPairs
from moe_scale.errors import ConfigError

BUDGET = 400


def loader(pairs: PreparedPairs, config: PairDataConfig, rank: int = 0, world_size: int = 1, seed: int = 3):
    return pair_loader(pairs, config, micro_batch=4, rank=rank, world_size=world_size, seed=seed)


def equal(a: PairBatch, b: PairBatch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def lengths(sources: list[int], targets: list[int], directions: list[int] | None = None) -> SimpleNamespace:
    """What the order wants to know of a split."""
    direction_M = np.array(directions or [0] * len(sources), dtype=np.int64)
    names = [f"en-x{d}" for d in range(direction_M.max(initial=0) + 1)]
    return SimpleNamespace(
        directions=names,
        direction_M=direction_M,
        source_lengths_M=np.array(sources),
        target_lengths_M=np.array(targets),
    )


def test_make_batch() -> None:
    batch = make_batch([PairItem([11, 12], [21], 7, 1, 5), PairItem([], None, 8), PairItem([13], [], 9, 2, 6)])
    assert batch.source_BS.tolist() == [[7, 11, 12, 3], [8, 3, 0, 0], [9, 13, 3, 0]]
    assert batch.inputs_BT.tolist() == [[2, 21], [2, 0], [2, 0]]
    assert batch.targets_BT.tolist() == [[21, 3], [IGNORE, IGNORE], [3, IGNORE]]
    assert batch.directions_B.tolist() == [1, 0, 2]
    assert batch.indices_B.tolist() == [5, NO_PAIR, 6]
    assert (batch.num_source, batch.num_target) == (9, 3)
    assert all(tensor.dtype == torch.int64 for tensor in batch)
    assert batch.to("meta").source_BS.device.type == "meta"
    assert PairBatch(*batch[:4]).to("cpu").indices_B.shape == (0,)


def test_batches_hold_the_pairs(sample_pairs: PreparedPairs, sample_config: PairDataConfig) -> None:
    split, tokenizer = sample_pairs.split("train"), sample_pairs.tokenizer
    tags = [tokenizer.tag_id(language) for language in ("en", "de", "el")]
    for batch in itertools.islice(loader(sample_pairs, sample_config), 30):
        for row, index in enumerate(batch.indices_B.tolist()):
            pair, direction = split.text(index), int(batch.directions_B[row])
            assert sample_pairs.directions[direction] == pair.direction
            assert batch.source_BS[row, 0] == tags[direction]
            assert tokenizer.decode(batch.source_BS[row].tolist()) == pair.source
            assert tokenizer.decode(batch.inputs_BT[row].tolist()) == pair.target
            targets = batch.targets_BT[row]
            real = targets != IGNORE
            assert torch.equal(targets[real][:-1], batch.inputs_BT[row, 1:][real[1:]])
            assert targets[real][-1] == tokenizer.eos_id
            assert ((batch.inputs_BT[row] != tokenizer.pad_id) == real).all()


def test_an_epoch_has_every_pair_once_in_full_batches(sample_pairs: PreparedPairs, sample_config) -> None:
    split = sample_pairs.split("train")
    order = EpochOrder(split, budget=BUDGET, temperature=1.0, seed=3)
    epochs = [order.epoch(epoch) for epoch in (0, 1)]
    for batches in epochs:
        assert sorted(batches.pairs_P) == list(range(len(split)))
        padded = 0
        for index in range(len(batches)):
            members = batches.batch(index)
            source = int(split.source_lengths_M[members].max()) + 2
            target = int(split.target_lengths_M[members].max()) + 1
            padded += len(members) * (source + target)
            assert len(members) * (source + target) <= BUDGET
            real = split.source_lengths_M[members].sum() + split.target_lengths_M[members].sum() + 3 * len(members)
            assert batches.tokens_N[index] == real
        assert batches.tokens_N.sum() / padded > 0.9
    together = [{tuple(sorted(b.batch(i))) for i in range(len(b))} for b in epochs]
    assert len(together[0] & together[1]) < 0.1 * len(together[0])  # other batches, not only another order of them
    assert not np.array_equal(
        epochs[0].pairs_P, EpochOrder(split, budget=BUDGET, temperature=1.0, seed=4).epoch(0).pairs_P
    )


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), max_size=80), st.integers(43, 300))
def test_fill_batches(sides: list[tuple[int, int]], budget: int) -> None:
    split = lengths([a for a, _ in sides], [b for _, b in sides])
    batches = fill_batches(split, np.arange(len(sides)), budget)
    found = [batches.batch(i).tolist() for i in range(len(batches))]
    assert sorted(itertools.chain(*found)) == list(range(len(sides)))
    for members, tokens in zip(found, batches.tokens_N, strict=True):
        longest = max(sides[i][0] + 2 for i in members) + max(sides[i][1] + 1 for i in members)
        assert 0 < len(members) * longest <= budget
        assert tokens == sum(sum(sides[i]) + 3 for i in members)


def test_quotas() -> None:
    counts = np.array([1000, 10, 100])
    assert direction_quotas(counts, 1.0).tolist() == [1000, 10, 100]
    for temperature in (2.0, 5.0, 1e6):
        quotas = direction_quotas(counts, temperature)
        assert quotas.sum() == 1110
        expected = counts ** (1 / temperature) / (counts ** (1 / temperature)).sum() * 1110
        assert np.abs(quotas - expected).max() < 1
    assert direction_quotas(counts, 1e6).tolist() == [370, 370, 370]
    assert direction_quotas(counts, 0.01).tolist() == [1110, 1, 1]  # none is left out altogether


def test_temperature_goes_through_large_directions_over_several_epochs() -> None:
    split = lengths([3] * 110, [3] * 110, [0] * 100 + [1] * 10)
    order = EpochOrder(split, budget=90, temperature=1e6, seed=0)
    drawn = [order.epoch(epoch).pairs_P for epoch in range(4)]
    for pairs in drawn:
        assert (split.direction_M[pairs] == 0).sum() == 55
        small = np.bincount(pairs[pairs >= 100] - 100)
        assert set(small) == {5, 6} or set(small) == {5} or sum(small) == 55
    large = np.concatenate([pairs[pairs < 100] for pairs in drawn])
    assert np.bincount(large[:110]).max() <= 2
    assert (np.bincount(large, minlength=100) >= 2).all()  # 220 draws go through all 100 twice


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_one_order_and_count_the_same_tokens(sample_pairs, sample_config, world_size: int) -> None:
    alone = loader(sample_pairs, sample_config)
    ranks = [loader(sample_pairs, sample_config, rank, world_size) for rank in range(world_size)]
    for _ in range(20):
        real = 0
        for one in ranks:
            batch, expected = next(one), next(alone)
            assert equal(batch, expected)
            real += batch.num_source + batch.num_target
        assert {one.take_tokens() for one in ranks} == {real}
        assert {json.dumps(one.state_dict()) for one in ranks} == {json.dumps(alone.state_dict())}
        alone.take_tokens()
    assert ranks[0].take_tokens() == 0


def test_resume_is_exact_with_any_number_of_ranks(sample_pairs, sample_config) -> None:
    first = loader(sample_pairs, sample_config)
    steps = len(first.order.epoch(0)) - 5  # so that the next steps cross into the second epoch
    for _ in range(steps):
        next(first)
    state = json.loads(json.dumps(first.state_dict()))
    following = [next(first) for _ in range(12)]
    for world_size in (1, 2, 3, 12):
        ranks = [loader(sample_pairs, sample_config, rank, world_size) for rank in range(world_size)]
        for one in ranks:
            one.load_state_dict(state)
        found = [next(one) for _ in range(12 // world_size) for one in ranks]
        assert all(equal(a, b) for a, b in zip(found, following, strict=True))
        assert all(one.state_dict() == first.state_dict() for one in ranks)


def test_more_ranks_than_an_epoch_has_batches() -> None:
    split = lengths([3] * 5, [3] * 5)
    order = EpochOrder(split, budget=20, temperature=1.0, seed=0)
    assert len(order.epoch(0)) == 3
    assert [sorted(order.epoch(e).pairs_P) for e in (0, 5, 2, 5)] == [list(range(5))] * 4


def test_a_state_of_another_order_is_refused(sample_pairs, sample_config) -> None:
    state = loader(sample_pairs, sample_config).state_dict()
    other = dataclasses.replace(sample_config, pair_temperature=2.0)
    for one, name in (
        (loader(sample_pairs, sample_config, seed=4), "seed was 3 and is 4"),
        (loader(sample_pairs, other), "pair_temperature was 1.0 and is 2.0"),
        (loader(sample_pairs, dataclasses.replace(sample_config, batch_tokens=200)), "budget was 400 and is 800"),
    ):
        with pytest.raises(ConfigError, match=name):
            one.load_state_dict(state)


def test_a_budget_below_one_pair_is_refused_with_the_least(sample_config) -> None:
    config = dataclasses.replace(sample_config, batch_tokens=20)  # max_len 40: a pair takes 83
    with pytest.raises(ConfigError, match=r"data.batch_tokens: .* 4 \* 20 = 80 tokens.* takes 83; choose at least 21"):
        token_budget(config, 4)
    assert token_budget(dataclasses.replace(config, batch_tokens=21), 4) == 84


@pytest.mark.parametrize("world_size", [1, 2, 5])
@pytest.mark.parametrize("limit", [0, 7])
def test_evaluation_has_every_pair_once(sample_pairs: PreparedPairs, world_size: int, limit: int) -> None:
    split, tokenizer = sample_pairs.split("valid"), sample_pairs.tokenizer
    ranks = [
        list(
            eval_pair_batches(
                split, tokenizer, budget=BUDGET, rank=rank, world_size=world_size, limit_per_direction=limit
            )
        )
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    seen = [index for batches in ranks for batch in batches for index in batch.indices_B.tolist()]
    real = [index for index in seen if index != NO_PAIR]
    assert len(real) == len(set(real)) == (3 * limit if limit else len(split))
    for direction in range(3):
        members = np.flatnonzero(split.direction_M == direction)[: limit or None]
        assert set(members) <= set(real)
    for batch in itertools.chain(*ranks):
        filler = batch.indices_B == NO_PAIR
        if filler.any():
            assert batch.num_target == 0
            assert len(batch.indices_B) == 1
        else:
            assert len(batch.indices_B) * (batch.source_BS.shape[1] + batch.targets_BT.shape[1]) <= BUDGET
