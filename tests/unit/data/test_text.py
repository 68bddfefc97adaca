"""The order of training on prepared text: independent of the ranks, exactly resumable, free of held-out text."""

from __future__ import annotations

import json

import pytest
import torch

from moe_scale.config import TextDataConfig
from moe_scale.data.prepare import PreparedText
from moe_scale.data.text import Batch, TrainLoader, eval_batches, open_text, train_loader
from moe_scale.data.tokenizer import load_tokenizer
from moe_scale.errors import ConfigError
from tests.unit.data.streams import documents


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TextDataConfig:
    folder = tmp_path_factory.mktemp("text")
    with open(folder / "texts.jsonl", "w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in documents(100))
    return TextDataConfig(source=str(folder), cache_dir=str(folder / "cache"), seq_len=64, num_workers=0)


@pytest.fixture(scope="module")
def text(config: TextDataConfig) -> PreparedText:
    prepared = open_text(config, load_tokenizer("gpt2"))
    assert isinstance(prepared, PreparedText)
    return prepared


def loader(
    text: PreparedText, config: TextDataConfig, rank: int = 0, world_size: int = 1, **changes: int
) -> TrainLoader:
    settings = {"micro_batch": 2, "seed": 1234} | changes
    return train_loader(text, config, rank=rank, world_size=world_size, **settings)


def take(batches: TrainLoader, count: int) -> list[Batch]:
    return [next(batches) for _ in range(count)]


def same(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, b) for x, y in zip(left, right, strict=True) for a, b in zip(x, y, strict=True)
    )


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_together_see_one_order(text: PreparedText, config: TextDataConfig, world_size: int) -> None:
    count = 2 * text.train.num_sequences(config.seq_len)  # samples; into a second epoch and beyond
    single = torch.cat([b.ids_BS for b in take(loader(text, config, micro_batch=1), count)])
    ranks = [loader(text, config, rank, world_size) for rank in range(world_size)]
    together = [next(rank).ids_BS for _ in range(count // (2 * world_size)) for rank in ranks]
    assert torch.equal(torch.cat(together), single[: 2 * len(together)])
    assert {rank.state_dict()["samples"] for rank in ranks} == {2 * len(together)}


def test_each_epoch_has_every_sequence_once(text: PreparedText, config: TextDataConfig) -> None:
    count = text.train.num_sequences(config.seq_len)
    batches = loader(text, config, micro_batch=1)
    epochs = [sorted(tuple(next(batches).ids_BS[0].tolist()) for _ in range(count)) for _ in range(2)]
    assert epochs[0] == epochs[1]
    everything = text.train.batch(range(count), config.seq_len).ids_BS
    assert epochs[0] == sorted(map(tuple, everything.tolist()))


@pytest.mark.parametrize("before", [0, 3, 50, 400])
def test_resume_is_exact(text: PreparedText, config: TextDataConfig, before: int) -> None:
    assert 400 * 2 > 2 * text.train.num_sequences(config.seq_len) > 0
    original = loader(text, config)
    take(original, before)
    state = json.loads(json.dumps(original.state_dict()))
    expected = take(original, 20)
    restored = loader(text, config)
    take(restored, 5)  # a loader that was used already forgets where it was
    restored.load_state_dict(state)
    assert same(take(restored, 20), expected)


def test_resume_at_another_world_size(text: PreparedText, config: TextDataConfig) -> None:
    ranks = [loader(text, config, rank, 4) for rank in range(4)]
    for rank in ranks:
        take(rank, 5)
    state = ranks[3].state_dict()
    assert state == ranks[0].state_dict()
    single = loader(text, config)
    take(single, 20)
    restored = [loader(text, config, rank, 2) for rank in range(2)]
    for rank in restored:
        rank.load_state_dict(state)
    assert same([next(rank) for _ in range(3) for rank in restored], take(single, 6))


def test_state_of_another_order_is_refused(text: PreparedText, config: TextDataConfig) -> None:
    state = loader(text, config).state_dict()
    with pytest.raises(ConfigError, match="seed was 1234 and is 5"):
        loader(text, config, seed=5).load_state_dict(state)
    with pytest.raises(ConfigError, match="fingerprint was 'other'"):
        loader(text, config).load_state_dict(state | {"fingerprint": "other"})


def test_nothing_held_out_is_trained_on(text: PreparedText, config: TextDataConfig) -> None:
    tokenizer = load_tokenizer("gpt2")
    batches = loader(text, config, micro_batch=1)
    trained = "".join(
        tokenizer.decode(next(batches).ids_BS[0].tolist()) for _ in range(text.train.num_sequences(config.seq_len))
    )
    heldout = tokenizer.decode(text.heldout.tokens_T)
    names = [f"Document {i}: " for i in range(100)]
    assert [n for n in names if n in heldout]
    assert not [n for n in names if n in heldout and n in trained]


def test_less_text_than_one_global_batch_repeats(text: PreparedText, config: TextDataConfig) -> None:
    long = TextDataConfig(**{**vars(config), "seq_len": text.train.num_tokens // 2 - 1})
    assert text.train.num_sequences(long.seq_len) == 2
    batch = next(loader(text, long, rank=1, world_size=2, micro_batch=4))
    assert len({tuple(row) for row in batch.ids_BS.tolist()}) == 2


def test_text_shorter_than_a_sequence(text: PreparedText, config: TextDataConfig) -> None:
    long = TextDataConfig(**{**vars(config), "seq_len": text.train.num_tokens})
    with pytest.raises(ConfigError, match=rf"data\.seq_len.*has {text.train.num_tokens} tokens"):
        loader(text, long)


@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_scores_every_heldout_token_once(
    text: PreparedText, config: TextDataConfig, world_size: int
) -> None:
    tokenizer = load_tokenizer("gpt2")
    bytes_V = torch.from_numpy(tokenizer.token_bytes())
    per_rank = [
        list(eval_batches(text, config, micro_batch=2, rank=r, world_size=world_size, max_tokens=10**9))
        for r in range(world_size)
    ]
    assert len({len(batches) for batches in per_rank}) == 1
    targets = torch.cat([b.targets_BS.flatten() for batches in per_rank for b in batches])
    targets = targets[targets != -100]
    assert len(targets) == text.heldout.num_tokens - 1
    # The first token of the stream is an EOT, which stands for no text: so all of the text's bytes are scored.
    assert int(bytes_V[targets].sum()) == text.manifest["bytes"]["heldout"]


def test_evaluation_stops_at_max_tokens(text: PreparedText, config: TextDataConfig) -> None:
    batches = list(eval_batches(text, config, micro_batch=2, rank=0, world_size=1, max_tokens=100))
    assert sum(int((b.targets_BS != -100).sum()) for b in batches) == 100
