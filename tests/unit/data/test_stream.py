"""Streamed text: exact resume anywhere, through shuffling, workers and network errors; held-out text stays out."""

from __future__ import annotations

import itertools
import json
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from moe_scale.config import TextDataConfig
from moe_scale.data import stream
from moe_scale.data.stream import BlockReader, Position, Retry, StreamedText, is_transient, share_of
from moe_scale.data.text import Batch, TrainLoader, eval_batches, open_text, train_loader
from moe_scale.data.tokenizer import load_tokenizer
from moe_scale.errors import ConfigError
from tests.unit.data.streams import document, documents, flaky_source, local_source, record_source

QUICK = Retry(tries=3, first_wait=0.001)


def streamed(source: Any, tmp_path: Path | str = ".", **changes: Any) -> StreamedText:
    settings = {"source": "fineweb-edu", "seq_len": 32, "num_workers": 0, "shuffle_buffer": 40, "holdout_fraction": 0.1}
    config = TextDataConfig(**(settings | {"cache_dir": str(tmp_path)} | changes))
    return StreamedText(config, load_tokenizer("gpt2"), source, QUICK)


def loader(text: StreamedText, rank: int = 0, world_size: int = 1, seed: int = 7) -> TrainLoader:
    return train_loader(text, text.config, micro_batch=2, rank=rank, world_size=world_size, seed=seed)


def take(batches: TrainLoader, count: int) -> list[Batch]:
    return [next(batches) for _ in range(count)]


def same(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, b) for x, y in zip(left, right, strict=True) for a, b in zip(x, y, strict=True)
    )


def read_text(text: StreamedText, rank: int = 0, world_size: int = 1) -> list[str]:
    """One rank's training documents of the first epoch, before they are shuffled."""
    reader = BlockReader(text, rank=rank, world_size=world_size, heldout=False, block_size=text.config.shuffle_buffer)
    position, texts = Position(), []
    while position.epoch == 0:
        block = reader.read(position)
        texts += block.texts
        position = block.next_position
    return texts


def test_stream_is_the_packed_shuffled_documents() -> None:
    """Against a slow version: the token stream, joined from overlapping sequences, holds each document whole."""
    text = streamed(local_source(100))
    kept = [t for t in documents(100) if not text.is_heldout(t)]
    assert 2 < 100 - len(kept) < 20
    rows = [row for b in take(loader(text), 150) for row in torch.cat([b.ids_BS, b.targets_BS[:, -1:]], 1).tolist()]
    assert all(before[-1] == after[0] for before, after in itertools.pairwise(rows))
    flat = [*rows[0], *(token for row in rows[1:] for token in row[1:])]
    decoded = text.tokenizer.decode(flat).split("<|endoftext|>")[1:-1]  # the last one is cut off
    first_block, rest = decoded[:40], decoded[40 : len(kept)]
    assert first_block != kept[:40]
    assert sorted(first_block) == sorted(kept[:40])  # a block is shuffled within itself
    assert sorted(rest[:40]) == sorted(kept[40:80])
    second_epoch = decoded[len(kept) : 2 * len(kept)]
    assert sorted(second_epoch) == sorted(kept)
    assert second_epoch != decoded[: len(kept)]


def test_document_ids_and_targets() -> None:
    text = streamed(local_source(50))
    for batch in take(loader(text), 20):
        assert torch.equal(batch.targets_BS[:, :-1], batch.ids_BS[:, 1:])
        starts_BS = (batch.ids_BS == text.tokenizer.eot_id).long()
        starts_BS[:, 0] = 0
        assert torch.equal(batch.document_ids_BS, starts_BS.cumsum(1))


@pytest.mark.parametrize("shards", [1, 3])
def test_resume_is_exact_after_every_batch(shards: int) -> None:
    text = streamed(local_source(60, shards), shuffle_buffer=17)
    original = loader(text)
    states, batches = [], []
    for _ in range(110):  # more than two epochs, so that block and epoch boundaries are crossed
        states.append(json.loads(json.dumps(original.state_dict())))
        batches.append(next(original))
    assert states[-1]["position"]["epoch"] >= 2
    assert states[-1]["samples"] == 109 * 2
    for start in [*range(0, 100, 3), 100]:
        restored = loader(text)
        restored.load_state_dict(states[start])
        assert restored.state_dict() == states[start]
        assert same(take(restored, 4), batches[start : start + 4]), start


def test_resume_with_a_worker_that_reads_ahead() -> None:
    expected = take(loader(streamed(local_source(60), shuffle_buffer=17)), 30)
    text = streamed(local_source(60), shuffle_buffer=17, num_workers=2)
    original = loader(text)
    assert same(take(original, 12), expected[:12])  # the worker changes nothing
    state = json.loads(json.dumps(original.state_dict()))
    assert same(take(original, 3), expected[12:15])
    original.load_state_dict(state)  # what was prefetched is forgotten
    assert same(take(original, 18), expected[12:30])
    original.close()
    assert original.state_dict()["samples"] == 60


def test_error_in_a_worker_arrives_whole() -> None:
    text = streamed(record_source([{"body": "x"}]), num_workers=1)
    with pytest.raises(ConfigError) as caught:
        next(loader(text))
    (problem,) = caught.value.problems
    assert problem.where == "data.source"
    assert "no text in field 'text'; it has 'body'" in problem.what
    assert str(caught.value) == str(problem)


@pytest.mark.parametrize(("world_size", "shards"), [(2, 1), (2, 4), (4, 3), (3, 100)])
def test_ranks_share_the_documents(world_size: int, shards: int) -> None:
    text = streamed(local_source(200, shards))
    per_rank = [read_text(text, rank, world_size) for rank in range(world_size)]
    kept = [t for t in documents(200) if not text.is_heldout(t)]
    assert sorted(itertools.chain(*per_rank)) == sorted(kept)
    assert min(map(len, per_rank)) > len(kept) / world_size / 2


def test_parquet_files_are_dealt_out_by_row_group(tmp_path: Path) -> None:
    """Three files cannot be dealt to two ranks, so their row groups are; the position is exact there too."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    for k in range(3):
        table = pa.table({"text": documents(120, start=120 * k)})
        pq.write_table(table, tmp_path / f"{k}.parquet", row_group_size=10)

    def open_files() -> datasets.IterableDataset:
        files = sorted(str(path) for path in tmp_path.glob("*.parquet"))
        return datasets.load_dataset(
            "parquet", data_files=files, split="train", streaming=True, cache_dir=str(tmp_path / "hf")
        )

    assert open_files().num_shards == 3
    assert share_of(open_files(), 0, 2).num_shards == 18
    text = streamed(open_files)
    kept = [t for t in documents(360) if not text.is_heldout(t)]
    assert sorted(itertools.chain(*(read_text(text, r, 2) for r in range(2)))) == sorted(kept)
    original = loader(text, rank=1, world_size=2)
    take(original, 40)
    state = json.loads(json.dumps(original.state_dict()))
    restored = loader(text, rank=1, world_size=2)
    restored.load_state_dict(state)
    assert same(take(restored, 20), take(original, 20))


def test_order_depends_on_seed_and_rank() -> None:
    text = streamed(local_source(100))
    assert same(take(loader(text), 3), take(loader(text), 3))
    assert not same(take(loader(text), 3), take(loader(text, seed=8), 3))
    assert not same(take(loader(text), 3), take(loader(text, rank=1, world_size=2), 3))


def test_another_number_of_ranks_begins_a_new_pass_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    text = streamed(local_source(100))
    first = loader(text)
    seen = take(first, 3)
    resumed = loader(text, world_size=2)
    resumed.load_state_dict(first.state_dict())
    assert "that of 1 ranks: these 2 begin a new pass" in caplog.text
    assert not same(take(resumed, 3), seen)
    assert resumed.samples == first.samples + 3 * 2 * 2, "samples are counted on"


def test_state_of_another_rank_or_order_is_refused() -> None:
    text = streamed(local_source(100))
    state = loader(text).state_dict()
    with pytest.raises(ConfigError, match="that of rank 0"):
        loader(text, rank=1, world_size=2).load_state_dict(state | {"world_size": 2})
    with pytest.raises(ConfigError, match="fingerprint was"):
        loader(streamed(local_source(100), shuffle_buffer=41)).load_state_dict(state)


def test_heldout_documents_are_evaluated_and_never_trained_on(tmp_path: Path) -> None:
    text = streamed(local_source(200), tmp_path)
    heldout = [t for t in documents(200) if text.is_heldout(t)]
    assert not set(heldout) & {t for rank in range(2) for t in read_text(text, rank, 2)}

    kept = text.heldout(10**6)
    tokens = sum(1 + len(text.tokenizer.encode(t)) for t in heldout)
    assert kept.num_tokens == tokens
    assert text.tokenizer.decode(kept.tokens_T).split("<|endoftext|>")[1:] == heldout
    per_rank = [
        list(eval_batches(text, text.config, micro_batch=2, rank=r, world_size=2, max_tokens=10**6)) for r in range(2)
    ]
    assert len(per_rank[0]) == len(per_rank[1])
    assert sum(int((b.targets_BS != -100).sum()) for batches in per_rank for b in batches) == tokens - 1

    few = list(eval_batches(text, text.config, micro_batch=1, rank=0, world_size=1, max_tokens=50))
    assert sum(int((b.targets_BS != -100).sum()) for b in few) == 50
    offline = StreamedText(text.config, text.tokenizer, lambda: pytest.fail("read again"))
    assert offline.heldout(50).num_tokens == text.heldout(50).num_tokens


def test_network_errors_are_mended_exactly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = take(loader(streamed(local_source(150), shuffle_buffer=60)), 60)
    flaky = streamed(flaky_source(150, 23, tmp_path / "broken"), shuffle_buffer=60)
    original = loader(flaky)
    with caplog.at_level(logging.WARNING, stream.__name__):
        assert same(take(original, 60), expected)
    assert len((tmp_path / "broken").read_text().split()) == 6
    assert "ConnectionError: reset at record 22; try 2 of 3" in caplog.text


def test_giving_up_says_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(stream.time, "sleep", waits.append)

    def unreachable() -> None:
        raise ConnectionError("no route\nto host")

    text = streamed(unreachable)
    text = StreamedText(text.config, text.tokenizer, unreachable, Retry(tries=5, first_wait=1, longest_wait=5))
    with pytest.raises(ConfigError) as caught:
        next(loader(text))
    assert waits == [1, 2, 4, 5]
    (problem,) = caught.value.problems
    assert problem.where == "data.source"
    assert "cannot reach fineweb-edu: 5 tries in a row failed" in problem.what
    assert "ConnectionError: no route" in problem.what
    assert "or choose sample or a path" in problem.allowed


def test_lasting_errors_are_not_tried_again() -> None:
    calls: list[int] = []

    def missing() -> None:
        calls.append(1)
        raise FileNotFoundError("no such data set")

    with pytest.raises(ConfigError, match=r"cannot read fineweb-edu.*no such data set"):
        next(loader(streamed(missing)))
    assert len(calls) == 1


def test_which_errors_are_transient() -> None:
    assert is_transient(ConnectionError())
    assert is_transient(TimeoutError())
    assert is_transient(httpx.ReadTimeout("slow"))
    assert not is_transient(ValueError())
    assert not is_transient(PermissionError())
    assert not is_transient(type("DatasetNotFoundError", (FileNotFoundError,), {})())


def test_records_that_are_no_text_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    records = [{"text": document(i)} for i in range(10)]
    records[3:3] = [{"text": None}, {"other": "x"}, {"text": " "}, {"text": "\ud800"}]
    text = streamed(record_source(records), holdout_fraction=0.01)
    reader = BlockReader(text, rank=0, world_size=1, heldout=False, block_size=100)
    block = reader.read(Position())
    assert block.texts == documents(10)
    assert (reader.report.documents, reader.report.skipped) == (10, 4)
    assert "no text in field 'text'" in caplog.text


def test_a_field_that_no_record_has() -> None:
    text = streamed(record_source([{"body": "x"}] * 10_001))
    with pytest.raises(ConfigError, match=r"data\.text_field"):
        next(loader(text))


def test_more_ranks_than_documents() -> None:
    with pytest.raises(ConfigError, match="no document in share 7 of 8"):
        next(loader(streamed(local_source(3), holdout_fraction=0.01), rank=7, world_size=8))


def test_open_text_of_a_stream_touches_no_network() -> None:
    text = open_text(TextDataConfig(source="fineweb-edu"), load_tokenizer("gpt2"))
    assert isinstance(text, StreamedText)
