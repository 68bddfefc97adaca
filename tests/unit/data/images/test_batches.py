"""Batches: their form, one order whatever the ranks and workers, exact positions, and as many for every rank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from moe_scale.config import ImageTextDataConfig
from moe_scale.data.images.batches import ImageTextBatch, eval_batches, eval_items, eval_languages
from moe_scale.data.images.loader import BLOCK, BlockOrder, ImageTextLoader, train_loader
from moe_scale.data.images.prepare import PreparedImageText, prepare_image_text
from moe_scale.data.report import SkipReport
from moe_scale.errors import ConfigError
from tests.unit.data.images.conftest import folder_of_pictures, write_shard


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedImageText:
    made = tmp_path_factory.mktemp("pictures")
    path = folder_of_pictures(made / "p", 60, ("en", "de", "fr"))
    config = ImageTextDataConfig(
        source=str(path), image_size=16, cache_dir=str(made / "cache"), tokenizer="bpe", unseen_languages=("fr",),
        num_workers=0, batch_examples=1, test_fraction=0.2,
    )  # fmt: skip
    return prepare_image_text(config, 330)


def loader(data: PreparedImageText, batch: int, rank: int = 0, world_size: int = 1, **how: Any) -> ImageTextLoader:
    seed = how.pop("seed", 7)
    config = replace(data.config, **how)
    return train_loader(data, config, micro_batch=batch, rank=rank, world_size=world_size, seed=seed)


def rows(*batches: ImageTextBatch) -> list[tuple[Any, ...]]:
    """Each row by itself, without its padding."""
    found = []
    for batch in batches:
        assert batch.images_BCHW is not None
        for row in range(len(batch.items_B)):
            ids = batch.ids_BS[row, batch.valid_BS[row]].tolist()
            found.append((int(batch.items_B[row]), ids, batch.images_BCHW[row].numpy().tobytes()))
    return found


def test_form(data: PreparedImageText) -> None:
    batch = next(loader(data, 5))
    assert batch.images_BCHW is not None
    assert batch.images_BCHW.shape == (5, 3, 16, 16)
    assert batch.images_BCHW.dtype == torch.float32
    assert (batch.ids_BS.dtype, batch.valid_BS.dtype, batch.items_B.dtype) == (torch.int64, torch.bool, torch.int64)
    assert (batch.ids_BS[:, 0] == data.vocabulary.bos_id).all()
    assert not batch.ids_BS[~batch.valid_BS].any()
    assert batch.valid_BS[:, 1:].le(batch.valid_BS[:, :-1]).all(), "padding is on the right"
    assert batch.present_B.all()
    assert batch.segments_BS is None
    assert batch.labels_B is None
    assert batch.to("cpu").ids_BS.equal(batch.ids_BS)


def test_ranks_together_see_the_samples_of_one(data: PreparedImageText) -> None:
    alone = loader(data, 6)
    ranks = [loader(data, 2, rank, 3) for rank in range(3)]
    for _ in range(12):  # past the first epoch
        assert rows(next(alone)) == rows(*map(next, ranks))
    assert alone.take_tokens() == ranks[0].take_tokens() == ranks[2].take_tokens() > 0
    assert alone.take_tokens() == 0


def test_every_epoch_has_each_image_once_with_captions_and_views_of_its_own(data: PreparedImageText) -> None:
    size = len(data.split("train"))
    everything = loader(data, size)
    first, second = rows(next(everything)), rows(next(everything))
    assert sorted(row[0] for row in first) == sorted(row[0] for row in second) == list(range(size))
    assert [row[0] for row in first] != [row[0] for row in second]
    again = {row[0]: row for row in second}
    assert 0.2 < sum(row[1] != again[row[0]][1] for row in first) / size < 0.8, "two languages, one drawn"
    assert all(row[2] != again[row[0]][2] for row in first)
    assert rows(next(loader(data, size, seed=8))) != first


def test_a_position_is_exact_and_holds_for_another_number_of_ranks(data: PreparedImageText) -> None:
    first = loader(data, 4)
    for _ in range(14):
        next(first)
    state = first.state_dict()
    ranks = [loader(data, 2, rank, 2) for rank in (0, 1)]
    for rank in ranks:
        rank.load_state_dict(state)
    for _ in range(4):
        assert rows(next(first)) == rows(*map(next, ranks))
    with pytest.raises(ConfigError, match="seed was 7 and is 8"):
        loader(data, 4, seed=8).load_state_dict(state)
    with pytest.raises(ConfigError, match=r"color was 0.2 and is 0.5"):
        loader(data, 4, color=0.5).load_state_dict(state)


@pytest.mark.slow
def test_workers_give_the_same_batches(data: PreparedImageText) -> None:
    plain, worked = loader(data, 4), loader(data, 4, num_workers=2)
    try:
        for _ in range(5):
            assert rows(next(worked)) == rows(next(plain))
        assert worked.state_dict() == plain.state_dict(), "of the batches handed out, not of those made ahead"
    finally:
        worked.close()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_has_each_caption_once_and_as_many_batches_on_every_rank(
    data: PreparedImageText, world_size: int
) -> None:
    split = data.split("test")
    for batches_of in (
        lambda rank: eval_items(
            data, split, data.config, language="fr", batch=4, rank=rank, world_size=world_size, captions=0
        ),
        lambda rank: eval_batches(data, split, data.config, batch=4, rank=rank, world_size=world_size),
    ):
        ranks = [list(batches_of(rank)) for rank in range(world_size)]
        assert len({len(batches) for batches in ranks}) == 1
        present = [row for batches in ranks for batch in batches for row, p in zip(rows(batch), batch.present_B) if p]  # noqa: B905
        texts = {tuple(row[1]) for row in present}
        assert len(texts) == len(present) in (len(split), split.num_texts)
        for batch in (batch for batches in ranks for batch in batches):
            assert batch.images_BCHW is not None
            assert len(batch.ids_BS) == 4
            assert (batch.items_B[~batch.present_B] == -1).all()
            assert not batch.images_BCHW[~batch.present_B].any()
            assert (batch.valid_BS[~batch.present_B].sum(dim=1) == 1).all()


def test_languages_and_limits(data: PreparedImageText) -> None:
    split = data.split("test")
    assert eval_languages(data, split) == {"de": True, "en": True, "fr": False}
    (batch,) = eval_items(data, split, data.config, language="en", batch=9, rank=0, world_size=1, limit=5)
    assert int(batch.present_B.sum()) == 5
    words = [data.vocabulary.decode(ids.tolist()) for ids in batch.ids_BS[batch.present_B]]
    assert all(text.startswith("en picture") for text in words)


def test_shards_are_read_in_blocks_and_a_lost_image_is_an_empty_row(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(3):
        write_shard(tmp_path / f"{number}.tar", 20 * number, 20)
    config = ImageTextDataConfig(
        source=str(tmp_path), image_size=16, cache_dir=str(tmp_path / "cache"), tokenizer="bpe", cache_gib=0.0,
        num_workers=0, batch_examples=1,
    )  # fmt: skip
    data = prepare_image_text(config, 290)
    whole = (tmp_path / "1.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(b"\0" * len(whole))  # it is lost after it was prepared
    size = len(data.split("train"))
    everything = loader(data, size)
    batch = next(everything)
    lost = int((~batch.present_B).sum())
    assert 10 < lost <= 20
    assert everything.report.skipped == {"no image that Pillow knows": lost}
    assert "1.tar, bytes" in caplog.text
    report = SkipReport()
    for _ in eval_batches(data, data.split("test"), config, batch=4, rank=0, world_size=1, report=report):
        pass
    assert lost + sum(report.skipped.values()) <= 20


def test_a_block_order_reads_neighbours_together() -> None:
    order = BlockOrder(1000, seed=3, buffer=256)
    first, second = order.span(0, 1000), order.span(1000, 1000)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(1000))
    assert first.tolist() != second.tolist()
    for epoch in (first, second):
        assert len({int(place) // BLOCK for place in epoch[:256]}) <= 5, "of 16 blocks"
        assert abs(epoch[1:256] - epoch[:255]).min() >= 1
        assert (epoch[1:256] - epoch[:255] == 1).mean() < 0.2, "and they are shuffled"
    assert BlockOrder(1000, seed=3, buffer=256).span(995, 10).tolist() == [*first[995:], *second[:5]]


def test_pairs_of_glue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(repository: str, task: str, split: str) -> list[dict[str, Any]]:
        return [
            {"sentence1": f"{split} {n} is first", "sentence2": f"so {n * n} is second", "label": n % 5 / 2}
            for n in range(30)
        ]

    monkeypatch.setattr(datasets, "load_dataset", load)
    config = ImageTextDataConfig(
        source="glue/stsb", cache_dir=str(tmp_path), tokenizer="bpe", batch_examples=1, num_workers=0
    )
    data = prepare_image_text(config, 290)
    batch = next(loader(data, 6))
    assert batch.images_BCHW is None
    assert batch.labels_B is not None
    assert batch.labels_B.dtype == torch.float32
    assert batch.segments_BS is not None
    split = data.split("train")
    for row, item in enumerate(batch.items_B.tolist()):
        assert float(batch.labels_B[row]) == split.labels_T[item]
        second = batch.ids_BS[row, batch.segments_BS[row] == 1].tolist()
        assert data.vocabulary.decode(second) == split.text(item).split(" | ")[1]
    assert not (batch.segments_BS.bool() & ~batch.valid_BS).any()
    (filled,) = eval_batches(data, data.split("valid"), config, batch=4, rank=0, world_size=1)
    assert filled.labels_B is not None
    assert filled.labels_B.isnan().equal(~filled.present_B)
