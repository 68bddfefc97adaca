"""Prepared text: what is in the files, how it is split, and that many processes may ask for it at once."""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_scale.config import TextDataConfig
from moe_scale.data import cache, prepare, tokenizing
from moe_scale.data.prepare import PreparedText, choose_heldout, prepare_text, source_fingerprint
from moe_scale.data.sources import content_hash, read_documents
from moe_scale.data.tokenizer import TextTokenizer, load_tokenizer
from moe_scale.errors import ConfigError
from tests.unit.data.builders import build_in_process
from tests.unit.data.streams import documents


@pytest.fixture(scope="module")
def gpt2() -> TextTokenizer:
    return load_tokenizer("gpt2")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """60 documents of unequal length, of which two are the same."""
    source = tmp_path / "texts"
    source.mkdir()
    texts = documents(59)
    for index, text in enumerate([*texts, texts[17]]):
        (source / f"{index:02}.txt").write_text(text, encoding="utf-8")
    return source


def config_for(folder: Path, **settings: object) -> TextDataConfig:
    defaults = {"cache_dir": str(folder.parent / "cache"), "seq_len": 16, "holdout_fraction": 0.2, "num_workers": 0}
    return TextDataConfig(source=str(folder), **(defaults | settings))


def split_documents(text: PreparedText, split: str, tokenizer: TextTokenizer) -> list[str]:
    """The documents of one split, read back from the token files."""
    tokens_T = (text.train if split == "train" else text.heldout).tokens_T
    starts = text.document_starts(split)
    assert starts[-1] == len(tokens_T)
    assert (tokens_T[starts[:-1]] == tokenizer.eot_id).all()
    assert (tokens_T == tokenizer.eot_id).sum() == len(starts) - 1
    return [tokenizer.decode(tokens_T[a + 1 : b]) for a, b in itertools.pairwise(starts)]


def test_files_hold_every_document_once_and_in_order(folder: Path, gpt2: TextTokenizer) -> None:
    config = config_for(folder)
    text = prepare_text(config, gpt2)
    train, heldout = (split_documents(text, split, gpt2) for split in ("train", "heldout"))
    source = list(read_documents(config))
    assert train == [t for t in source if t in set(train)]
    assert heldout == [t for t in source if t in set(heldout)]
    assert sorted(train + heldout) == sorted(source)
    assert not set(train) & set(heldout)  # the document that occurs twice is on one side, twice
    assert text.train.tokens_T.dtype == np.uint16
    assert text.report.documents == 60
    assert text.manifest["bytes"]["heldout"] == sum(len(t.encode()) for t in heldout)
    share = text.manifest["bytes"]["heldout"] / text.report.bytes
    assert share == pytest.approx(0.2, abs=0.02)


def test_sample(gpt2: TextTokenizer, tmp_path: Path) -> None:
    config = TextDataConfig(cache_dir=str(tmp_path))
    lines: list[str] = []
    text = prepare_text(config, gpt2, lines.append)
    assert "42 documents" in lines[-1]
    assert sum(text.manifest["documents"].values()) == 42
    assert text.train.num_tokens + text.heldout.num_tokens == 1_565_959 + 42
    assert text.manifest["bytes"]["heldout"] / text.report.bytes == pytest.approx(0.05, abs=0.01)
    heldout = split_documents(text, "heldout", gpt2)
    assert max(len(t) for t in heldout) > 80_000  # at least one whole play, not only short poems
    assert heldout == [t for t in read_documents(config) if t in heldout]


def test_second_call_opens_what_the_first_made(folder: Path, gpt2: TextTokenizer, monkeypatch) -> None:
    first = prepare_text(config_for(folder), gpt2)
    monkeypatch.setattr(prepare, "_build", lambda *args: pytest.fail("built again"))
    second = prepare_text(config_for(folder, seq_len=99, num_workers=3), gpt2)
    assert (second.folder, second.fingerprint) == (first.folder, first.fingerprint)
    assert dataclasses.asdict(second.report) == dataclasses.asdict(first.report)
    moved = folder.with_name("moved")
    shutil.copytree(folder, moved)  # new time stamps, same content
    assert prepare_text(config_for(moved), gpt2).folder == first.folder


def test_fingerprint_changes_with_the_content(folder: Path, gpt2: TextTokenizer, monkeypatch) -> None:
    names = {source_fingerprint(config_for(folder), gpt2)}
    names.add(source_fingerprint(config_for(folder, holdout_fraction=0.3), gpt2))
    names.add(source_fingerprint(config_for(folder, text_field="body"), gpt2))
    file = folder / "00.txt"
    stat = file.stat()
    file.write_text(file.read_text()[::-1])
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size, same time: only the content tells
    names.add(source_fingerprint(config_for(folder), gpt2))
    file.rename(folder / "zz.txt")
    names.add(source_fingerprint(config_for(folder), gpt2))
    monkeypatch.setattr(cache, "_HASHED_BYTES", 0)  # a large source goes by size and time
    names.add(by_time := source_fingerprint(config_for(folder), gpt2))
    os.utime(folder / "zz.txt", ns=(1, 1))
    assert source_fingerprint(config_for(folder), gpt2) != by_time
    assert len(names) == 6


def test_worker_processes_change_nothing(folder: Path, gpt2: TextTokenizer, monkeypatch, tmp_path: Path) -> None:
    alone = prepare_text(config_for(folder), gpt2)
    monkeypatch.setattr(prepare, "_BYTES_WORTH_WORKERS", 0)
    monkeypatch.setattr(prepare, "_CHUNK_BYTES", 1000)
    calls: list[int] = []
    original = tokenizing.ProcessPoolExecutor
    monkeypatch.setattr(tokenizing, "ProcessPoolExecutor", lambda n, *a: calls.append(n) or original(n, *a))
    workers = prepare_text(config_for(folder, num_workers=2, cache_dir=str(tmp_path / "other")), gpt2)
    assert calls == [2]
    for split in ("train", "heldout"):
        assert (getattr(workers, split).tokens_T == getattr(alone, split).tokens_T).all()
    assert workers.fingerprint == alone.fingerprint


def test_dead_worker_is_explained(gpt2: TextTokenizer) -> None:
    class Deadly(TextTokenizer):
        def __reduce__(self):
            return os._exit, (3,)

    deadly = Deadly(gpt2.backend, gpt2.eot_id)
    with pytest.raises(ConfigError, match=r"data\.num_workers: a tokenizing process died"):
        list(tokenizing.tokenize(deadly, [["text"]], "<u2", 1))


def test_two_preparations_at_once(folder: Path, gpt2: TextTokenizer) -> None:
    texts: list[PreparedText] = []
    config = config_for(folder)
    threads = [threading.Thread(target=lambda: texts.append(prepare_text(config, gpt2))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts[0].fingerprint == texts[1].fingerprint
    assert len([path for path in texts[0].folder.parent.iterdir() if path.is_dir()]) == 1


def test_two_processes_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    target = tmp_path / "name"
    processes = [context.Process(target=build_in_process, args=(target, barrier, results)) for _ in range(2)]
    for process in processes:
        process.start()
    assert sorted(results.get(timeout=60) for _ in processes) == [(0, "complete"), (1, "complete")]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0


@pytest.mark.parametrize("locks", [True, False])
def test_builders_at_once_leave_one_complete_folder(tmp_path: Path, monkeypatch, locks: bool) -> None:
    """Without locks all of them build, and the first to finish wins; with locks only one builds."""
    built: list[Path] = []
    together = threading.Barrier(1 if locks else 4)

    def build(folder: Path) -> None:
        built.append(folder)
        together.wait(10)
        (folder / "data").write_text("complete")
        (folder / cache.MANIFEST).write_text("{}")

    if not locks:
        import contextlib

        monkeypatch.setattr(cache, "_lock", lambda path, say: contextlib.nullcontext(False))
    said: list[str] = []
    target = tmp_path / "cache" / "name"
    threads = [threading.Thread(target=cache.build_once, args=(target, build, said.append)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == (1 if locks else 4)
    assert (target / "data").read_text() == "complete"
    assert {path.name for path in target.parent.iterdir()} <= {"name", "name.lock"}


def test_a_failed_build_leaves_nothing_and_leftovers_are_removed(tmp_path: Path) -> None:
    def fails(folder: Path) -> None:
        (folder / "data").write_text("half")
        raise KeyboardInterrupt

    target = tmp_path / "name"
    with pytest.raises(KeyboardInterrupt):
        cache.build_once(target, fails, print)
    assert [path.name for path in tmp_path.iterdir()] == ["name.lock"]
    leftover = tmp_path / f"name.tmp-{cache.socket.gethostname()}-dead"
    leftover.mkdir()
    cache.build_once(target, lambda folder: (folder / cache.MANIFEST).write_text("{}"), print)
    assert not leftover.exists()
    assert target.is_dir()


def test_cache_that_cannot_be_written(folder: Path, gpt2: TextTokenizer) -> None:
    blocked = folder.parent / "blocked"
    blocked.write_text("a file where the folder should be")
    with pytest.raises(ConfigError, match=r"data\.cache_dir: cannot write to"):
        prepare_text(config_for(folder, cache_dir=str(blocked)), gpt2)


def test_damaged_cache_is_noticed(folder: Path, gpt2: TextTokenizer) -> None:
    text = prepare_text(config_for(folder), gpt2)
    with open(text.folder / "train.bin", "r+b") as file:
        file.truncate(10)
    with pytest.raises(ConfigError, match=r"is damaged \(train.bin has 5 tokens.*delete that folder"):
        prepare_text(config_for(folder), gpt2)


def test_text_that_cannot_be_split(tmp_path: Path, gpt2: TextTokenizer) -> None:
    source = tmp_path / "texts"
    source.mkdir()
    (source / "a.txt").write_text("the same")
    (source / "b.txt").write_text("the same")
    with pytest.raises(ConfigError, match=r"data\.holdout_fraction: the source has only one document"):
        prepare_text(config_for(source), gpt2)
    (source / "b.txt").write_text("another")
    text = prepare_text(config_for(source), gpt2)
    assert text.manifest["documents"] == {"train": 1, "heldout": 1}


def test_bad_records_are_remembered_with_the_prepared_text(tmp_path: Path, gpt2: TextTokenizer) -> None:
    source = tmp_path / "texts.jsonl"
    source.write_text('{"text": "one"}\n{"text": \n{"text": "two"}\n')
    for _ in range(2):  # made, then opened
        report = prepare_text(config_for(source), gpt2).report
        assert (report.documents, report.skipped) == (2, 1)
        assert report.examples[0].startswith("texts.jsonl, line 2: not JSON")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 1000)), min_size=2, max_size=60), st.floats(0.01, 0.99))
def test_choice_of_heldout_documents(pairs: list[tuple[int, int]], fraction: float) -> None:
    # The same content has the same size.
    sizes_of = dict(pairs)
    hashes = np.asarray([content_hash(str(key)) for key, _ in pairs], dtype=np.uint64)
    sizes = np.asarray([sizes_of[key] for key, _ in pairs])
    if len(sizes_of) < 2:
        with pytest.raises(ConfigError):
            choose_heldout(hashes, sizes, fraction)
        return
    heldout = choose_heldout(hashes, sizes, fraction)
    assert heldout.any()
    assert not heldout.all()
    assert not set(hashes[heldout]) & set(hashes[~heldout])
    order = np.random.default_rng(0).permutation(len(pairs))
    assert (choose_heldout(hashes[order], sizes[order], fraction) == heldout[order]).all()
    # Off the goal by no more than the largest group of equal documents.
    group = max(int(sizes[hashes == h].sum()) for h in set(hashes))
    assert abs(sizes[heldout].sum() - fraction * sizes.sum()) <= group


def test_heldout_share_of_many_documents() -> None:
    hashes = np.asarray([content_hash(str(i)) for i in range(20_000)], dtype=np.uint64)
    sizes = np.random.default_rng(0).integers(100, 10_000, len(hashes))
    heldout = choose_heldout(hashes, sizes, 0.05)
    assert sizes[heldout].sum() / sizes.sum() == pytest.approx(0.05, rel=0.02)
    assert sizes[heldout].mean() == pytest.approx(sizes.mean(), rel=0.1)  # no preference for short ones
