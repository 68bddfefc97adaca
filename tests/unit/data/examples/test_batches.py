"""Batches: padding, one order whatever the ranks, exact positions, and as many for every rank."""

from __future__ import annotations

import itertools

import pytest
import torch

from moe_scale.config import ClassifierConfig, ClassifierModelConfig, ExampleDataConfig
from moe_scale.data.examples.batches import ExampleBatch, ExampleLoader, eval_batches, make_batch
from moe_scale.data.examples.prepare import PreparedExamples, prepare_examples
from moe_scale.errors import ConfigError
from tests.unit.data.examples.conftest import some_texts, write_json_lines


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> PreparedExamples:
    made = tmp_path_factory.mktemp("texts")
    path = write_json_lines(made / "a.jsonl", some_texts(60))
    data = ExampleDataConfig(source=path, tokenizer="bpe", cache_dir=str(made / "cache"), test_fraction=0.3)
    return prepare_examples(ClassifierConfig(model=ClassifierModelConfig(vocab_size=300), data=data))


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> PreparedExamples:
    cache = str(tmp_path_factory.mktemp("cache"))
    data = ExampleDataConfig(source="synthetic", synthetic_examples=60, max_len=9, cache_dir=cache)
    return prepare_examples(ClassifierConfig(model=ClassifierModelConfig(input_size=5), data=data))


def loader(examples: PreparedExamples, batch: int, rank: int = 0, world_size: int = 1, seed: int = 7) -> ExampleLoader:
    return ExampleLoader(
        examples.split("train"), batch=batch, rank=rank, world_size=world_size, seed=seed,
        fingerprint=examples.fingerprint,
    )  # fmt: skip


def same(first: ExampleBatch, second: ExampleBatch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_rows_are_the_examples(texts: PreparedExamples, features: PreparedExamples) -> None:
    for examples in (texts, features):
        split = examples.split("train")
        batch = make_batch(split, [4, -1, 2])
        assert batch.labels_B.tolist() == [split.labels_M[4], -100, split.labels_M[2]]
        assert batch.indices_B.tolist() == [4, -1, 2]
        for row, index in ((0, 4), (2, 2)):
            length = split.lengths_M[index]
            assert batch.valid_BS[row].sum() == length
            assert batch.inputs[row, :length].tolist() == split.inputs(index).tolist()
        assert not batch.inputs[~batch.valid_BS].any()
        assert batch.inputs.shape[1] == max(split.lengths_M[[4, 2]])
    assert make_batch(texts.split("train"), [-1]).inputs.shape == (1, 1)


def test_ranks_together_see_the_batches_of_one(texts: PreparedExamples) -> None:
    alone = loader(texts, 6)
    ranks = [loader(texts, 3, rank, 2) for rank in (0, 1)]
    for _ in range(15):  # past the first epoch
        expected, parts = next(alone), [next(rank) for rank in ranks]
        assert expected.indices_B.tolist() == [index for part in parts for index in part.indices_B.tolist()]
    assert alone.take_tokens() == ranks[0].take_tokens() == ranks[1].take_tokens()
    assert alone.take_tokens() == 0


def test_every_epoch_has_each_example_once(texts: PreparedExamples) -> None:
    size = len(texts.split("train"))
    order = list(itertools.chain(*(batch.indices_B.tolist() for batch in itertools.islice(loader(texts, 1), 2 * size))))
    assert sorted(order[:size]) == sorted(order[size:]) == list(range(size))
    assert order[:size] != order[size:]
    assert next(loader(texts, size, seed=8)).indices_B.tolist() != order[:size]


def test_a_position_is_exact_and_holds_for_another_number_of_ranks(texts: PreparedExamples) -> None:
    first = loader(texts, 4)
    for _ in range(13):
        next(first)
    state = first.state_dict()
    again = loader(texts, 4)
    again.load_state_dict(state)
    ranks = [loader(texts, 2, rank, 2) for rank in (0, 1)]
    for rank in ranks:
        rank.load_state_dict(state)
    for _ in range(5):
        expected = next(first)
        assert same(next(again), expected)
        parts = [next(rank).indices_B.tolist() for rank in ranks]
        assert parts[0] + parts[1] == expected.indices_B.tolist()
    with pytest.raises(ConfigError, match="seed was 7 and is 8"):
        loader(texts, 4, seed=8).load_state_dict(state)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("limit", [0, 5, 1, 1000])
def test_evaluation_has_as_many_batches_on_every_rank(texts: PreparedExamples, world_size: int, limit: int) -> None:
    split = texts.split("test")
    ranks = [list(eval_batches(split, batch=4, rank=r, world_size=world_size, limit=limit)) for r in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    assert {len(batch.labels_B) for batches in ranks for batch in batches} == {4}
    found = [index for batches in ranks for batch in batches for index in batch.indices_B.tolist()]
    expected = min(limit or len(split), len(split))
    assert sorted(index for index in found if index >= 0) == list(range(expected))
    assert len(found) < expected + 4 * world_size, "no more empty rows than it takes"
