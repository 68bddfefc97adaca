"""Texts with spans cut out: nothing is lost, and who asks again gets the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_scale.config import SwitchConfig, SwitchModelConfig, SwitchTextDataConfig
from moe_scale.data.packing import IGNORE, pack
from moe_scale.data.sentinels import encode_with_sentinels, with_sentinels
from moe_scale.data.span_corruption import CorruptedLoader, SpanCorruption, restore
from moe_scale.data.text import open_text, train_loader
from moe_scale.data.tokenizer import TextTokenizer, load_tokenizer
from moe_scale.errors import ConfigError

FIRST = 257


def settings(tokens: int, density: float = 0.15, span: float = 3.0, **data: Any) -> SwitchConfig:
    model = SwitchModelConfig(
        objective="span_corruption", noise_density=density, mean_span_length=span, num_sentinels=10_000
    )
    return SwitchConfig(model=model, data=SwitchTextDataConfig(seq_len=tokens, num_workers=0, **data))


def text_of(tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, FIRST, tokens).astype(np.int64)


@given(
    tokens=st.integers(2, 300),
    density=st.floats(0.01, 0.99),
    span=st.floats(1.0, 50.0),
    number=st.integers(0, 2**40),
    seed=st.integers(0, 2**62),
)
def test_text_and_target_give_back_the_whole(tokens: int, density: float, span: float, number: int, seed: int) -> None:
    config = settings(tokens, density, span)
    corruption, text_L = SpanCorruption(config, FIRST, seed), text_of(tokens)
    found = corruption.corrupt(text_L, number)
    assert restore(found.input.tolist(), found.target.tolist(), FIRST) == text_L.tolist()
    assert len(found.input) == config.prefix_length
    assert len(found.input) + len(found.target) - 1 == config.sequence_length
    cut = found.target[found.target < FIRST]
    assert len(cut) == corruption.noise == min(max(round(tokens * density), 1), tokens - 1)
    assert (found.target[found.target >= FIRST] == FIRST + np.arange(corruption.spans + 1)).all()
    assert (found.input[found.input >= FIRST] == FIRST + np.arange(corruption.spans)).all()
    assert found.target[0] == FIRST, "no two spans touch, and each has a token"
    again = SpanCorruption(config, FIRST, seed).corrupt(text_L, number)
    assert all((one == two).all() for one, two in zip(found, again, strict=True))


def test_the_shares_are_those_of_the_paper() -> None:
    noise, spans = settings(512).model.span_lengths(512)
    assert (noise, spans) == (77, 26)


def test_every_place_is_cut_as_often() -> None:
    corruption = SpanCorruption(settings(20, 0.3, 2.0), FIRST, 0)
    text_L = np.arange(20)
    times = np.zeros(20)
    for number in range(3000):
        target = corruption.corrupt(text_L, number).target
        times[target[target < FIRST]] += 1
    assert times.sum() == 3000 * 6
    assert times.min() / 3000 > 0.15
    assert times.max() / 3000 < 0.4


def test_a_model_may_write_what_it_likes() -> None:
    text = [1, FIRST, 2, FIRST + 1, 3]
    assert restore(text, [FIRST, 7, 8, FIRST + 1, FIRST + 2], FIRST) == [1, 7, 8, 2, 3]
    assert restore(text, [9, FIRST + 1, 7], FIRST) == [1, FIRST, 2, 7, 3], "what is before a sentinel belongs to none"
    assert restore(text, [FIRST, 7, FIRST, 8], FIRST) == [1, 7, 8, 2, FIRST + 1, 3]


def test_a_batch_is_text_then_target() -> None:
    config = settings(16)
    corruption = SpanCorruption(config, FIRST, 5)
    texts = np.stack([text_of(17, seed) for seed in (1, 2)])
    batch = corruption.batch(pack(texts, 256), [3, 4])
    for row, number in enumerate((3, 4)):
        one = corruption.corrupt(texts[row, :16], number)
        joined = np.concatenate(one)
        assert batch.ids_BS[row].tolist() == joined[:-1].tolist()
        counts = batch.targets_BS[row] != IGNORE
        assert batch.targets_BS[row][counts].tolist() == one.target.tolist()
        assert counts.nonzero()[0].item() == len(one.input) - 1
    assert batch.document_ids_BS.tolist() == [[0] * config.sequence_length] * 2


def test_a_text_with_padding_is_left_out() -> None:
    corruption = SpanCorruption(settings(8), FIRST, 5)
    batch = pack(text_of(9)[None], 256)
    batch.document_ids_BS[0, 6:] = -1
    found = corruption.batch(batch, [0])
    assert (found.targets_BS == IGNORE).all()
    assert (found.document_ids_BS == -1).all()


@pytest.fixture
def config(tmp_path: Path) -> SwitchConfig:
    lines = [json.dumps({"text": f"line {n} of a text that is not long"}) + "\n" for n in range(40)]
    (tmp_path / "text.jsonl").write_text("".join(lines))
    return settings(24, source=str(tmp_path / "text.jsonl"), cache_dir=str(tmp_path / "cache"), holdout_fraction=0.5)


def loader(config: SwitchConfig, rank: int = 0, world_size: int = 1, micro_batch: int = 4) -> CorruptedLoader:
    text = open_text(config.data, load_tokenizer("bytes"))
    texts = train_loader(text, config.data, micro_batch=micro_batch, rank=rank, world_size=world_size, seed=config.seed)
    return CorruptedLoader(texts, SpanCorruption(config, FIRST, config.seed), micro_batch=micro_batch, rank=rank)


def ids(batches: CorruptedLoader, count: int) -> torch.Tensor:
    return torch.cat([next(batches).ids_BS for _ in range(count)])


def test_ranks_together_see_one_order_and_a_resumed_run_goes_on(config: SwitchConfig) -> None:
    whole = ids(loader(config), 30)
    left, right = (loader(config, rank, 2, 2) for rank in (0, 1))
    together = torch.cat([torch.cat([next(left).ids_BS, next(right).ids_BS]) for _ in range(30)])
    assert torch.equal(whole, together)
    first = loader(config)
    ids(first, 11)
    second = loader(config)
    second.load_state_dict(first.state_dict())
    assert torch.equal(ids(second, 19), whole[44:])


def test_each_pass_over_a_text_has_other_spans(config: SwitchConfig) -> None:
    batches = loader(config, micro_batch=1)
    length = batches.texts.order.num_sequences
    of_place = {}
    for sample in range(2 * length):
        of_place.setdefault(batches.texts.order[sample], []).append(next(batches).ids_BS)
    differ = [not torch.equal(*twice) for twice in of_place.values()]
    assert sum(differ) > 0.9 * len(differ)


def test_the_position_of_another_objective_is_refused(config: SwitchConfig) -> None:
    batches = loader(config)
    with pytest.raises(ConfigError, match="another objective"):
        batches.load_state_dict(batches.texts.state_dict())


def test_sentinels_follow_the_vocabulary_and_are_spelled_out() -> None:
    plain = load_tokenizer("bytes")
    tokenizer = with_sentinels(plain, 100)
    assert (plain.vocab_size, tokenizer.vocab_size) == (257, 357)
    text = "say <extra_id_0> or <extra_id_99>"
    assert max(tokenizer.encode(text)) < 257, "text never becomes a sentinel"
    found = encode_with_sentinels(tokenizer, text, 257)
    assert [token for token in found if token >= 257] == [257, 356]
    assert tokenizer.decode(found) == text
    assert tokenizer.token_bytes()[257:].sum() == 0
    with pytest.raises(ConfigError, match="<extra_id_0> to <extra_id_99>"):
        encode_with_sentinels(tokenizer, "<extra_id_100>", 257)


def test_a_tokenizer_with_sentinels_of_its_own_is_refused() -> None:
    backend = tokenizers.Tokenizer.from_str(load_tokenizer("bytes").backend.to_str())
    backend.add_special_tokens(["<extra_id_0>"])
    with pytest.raises(ConfigError, match=r"data\.tokenizer: its entries cannot be followed"):
        with_sentinels(TextTokenizer(backend, 256), 10)
