"""Prepared pairs: what is in the files, what was left out, and that nothing is made twice."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moe_scale.config import PairDataConfig
from moe_scale.data import cache
from moe_scale.data.pairs import prepare
from moe_scale.data.pairs.prepare import PreparedPairs, pairs_fingerprint, prepare_pairs
from moe_scale.data.pairs.report import SPLITS, PairReport
from moe_scale.data.pairs.sentences import sentence_key
from moe_scale.data.pairs.sources import read_pairs
from moe_scale.errors import ConfigError


def sentence(number: int) -> str:
    return " ".join(f"word{(number * 7 + k * k) % 97}" for k in range(3 + number % 4)) + f" {number}"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """300 pairs, of which two come twice, one has a side of two hundred words and one a side of a megabyte."""
    rows = [(sentence(n), sentence(n + 1000)) for n in range(298)]
    rows += [rows[5], rows[6], ("long one", "very " * 200), ("longer one", "x" * 10**6)]
    path = tmp_path / "data" / "pairs.tsv"
    path.parent.mkdir()
    path.write_text("en\tde\n" + "".join(f"{a}\t{b}\n" for a, b in rows), encoding="utf-8")
    return path


def config_for(source: Path, **settings: object) -> PairDataConfig:
    defaults = {"pairs": ("en-de",), "tokenizer": "bpe", "max_len": 50, "valid_fraction": 0.1, "test_fraction": 0.1}
    defaults["cache_dir"] = str(source.parent.parent / "cache")
    return PairDataConfig(source=str(source), **(defaults | settings))


def test_every_pair_is_in_one_split_or_counted(source: Path) -> None:
    config = config_for(source)
    prepared = prepare_pairs(config, 400)
    report = prepared.report
    assert report.read == {"en-de": 302}
    assert report.duplicates == {"en-de": 2}
    assert sum(count for counts in report.too_long.values() for count in counts.values()) == 2
    assert not report.leaked
    assert sum(counts["en-de"] for counts in report.kept.values()) == 298
    found = [split.text(i) for split in map(prepared.split, SPLITS) for i in range(len(split))]
    expected = [pair for pair in read_pairs(config, PairReport()) if "long" not in pair.source]
    assert sorted(found) == sorted(set(expected))
    train = [prepared.split("train").text(i) for i in range(len(prepared.split("train")))]
    assert train == [pair for pair in dict.fromkeys(expected) if pair in set(train)]  # in the order of the source
    for split in map(prepared.split, SPLITS):
        for index in range(len(split)):
            pair = split.text(index)
            assert prepared.tokenizer.encode(pair.source) == split.source_ids(index).tolist()
            assert prepared.tokenizer.decode(split.target_ids(index)) == pair.target
            assert len(split.source_ids(index)) == split.source_lengths_M[index] <= 50
            assert len(split.target_ids(index)) == split.target_lengths_M[index] <= 50
    assert "longer than max_len" in str(report)
    assert "repeated, kept once: en-de 2" in str(report)


def test_long_pairs_are_counted_where_they_would_be(source: Path) -> None:
    whole = prepare_pairs(config_for(source), 400)
    median = int(np.median(whole.split("train").source_lengths_M))
    prepared = prepare_pairs(config_for(source, max_len=median), 400)
    assert prepared.tokenizer.fingerprint == whole.tokenizer.fingerprint  # which pairs are too long changes no split
    for name in SPLITS:
        split = whole.split(name)
        longer = int((np.maximum(split.source_lengths_M, split.target_lengths_M) > median).sum())
        assert longer > 0
        before = whole.report.too_long[name].get("en-de", 0)
        assert prepared.report.too_long[name] == {"en-de": longer + before}
        assert len(prepared.split(name)) == len(split) - longer
    assert f"left out of test, as longer than max_len: en-de {prepared.report.too_long['test']['en-de']}" in str(
        prepared.report
    )


def test_directions_of_the_sample_share_no_held_out_sentence(sample_pairs: PreparedPairs) -> None:
    assert sample_pairs.directions == ["de-en", "en-de", "fr-el"]
    texts = {name: [split.text(i) for i in range(len(split))] for name, split in sample_pairs.splits.items()}
    sources = {name: {sentence_key(pair.source) for pair in pairs} for name, pairs in texts.items()}
    assert not sources["valid"] & sources["test"]
    trained = {sentence_key(text) for pair in texts["train"] for text in (pair.source, pair.target)}
    assert not trained & (sources["valid"] | sources["test"])
    assert sample_pairs.report.leaked["de-en"] > 100  # the held-out sentences of en-de, the other way round
    assert sample_pairs.tokenizer.languages == ["de", "el", "en"]
    for name in ("valid", "test"):
        assert min(sample_pairs.report.kept[name].values()) > 50
    first = [pair.source[:1] for pair in texts["valid"] if pair.direction == "en-de"][:50]
    assert len(set(first)) > 12  # in no alphabetical order: the first ones are as good as drawn


def test_second_call_opens_what_the_first_made(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare_pairs(config_for(source), 400)
    monkeypatch.setattr(prepare, "_build", lambda *args: pytest.fail("built again"))
    second = prepare_pairs(config_for(source, batch_tokens=7, pair_temperature=5.0), 400)
    assert (second.folder, second.fingerprint) == (first.folder, first.fingerprint)
    assert dataclasses.asdict(second.report) == dataclasses.asdict(first.report)
    assert str(second.report) == str(first.report)


def test_equal_content_elsewhere_is_equal(source: Path, tmp_path: Path) -> None:
    first = prepare_pairs(config_for(source), 400)
    again = prepare_pairs(config_for(source, cache_dir=str(tmp_path / "other")), 400)
    assert first.folder != again.folder
    assert first.fingerprint == again.fingerprint
    for file in first.folder.iterdir():
        assert file.read_bytes() == (again.folder / file.name).read_bytes(), file.name
    assert not list(first.folder.glob("all_texts*"))


def test_fingerprint_changes_with_all_that_matters(source: Path) -> None:
    names = {pairs_fingerprint(config_for(source), 400), pairs_fingerprint(config_for(source), 401)}
    for change in ({"pairs": ("de-en",)}, {"tokenizer": "unigram"}, {"max_len": 49}, {"valid_fraction": 0.2}):
        names.add(pairs_fingerprint(config_for(source, **change), 400))
    names.add(pairs_fingerprint(config_for(source, test_fraction=0.2), 400))
    stat = source.stat()
    source.write_text(source.read_text().replace("word1", "word2"))
    os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size, same time: only the content tells
    names.add(pairs_fingerprint(config_for(source), 400))
    hub = PairDataConfig(source="opus_books", pairs=("en-de",))
    names |= {pairs_fingerprint(hub, 400), pairs_fingerprint(dataclasses.replace(hub, pairs=("de-en",)), 400)}
    assert len(names) == 10


def test_discovered_directions_are_sorted(source: Path) -> None:
    prepared = prepare_pairs(config_for(source, pairs=()), 400)
    assert prepared.directions == ["de-en", "en-de"]
    split = prepared.split("train")
    for index in range(len(split)):
        english = split.text(index).source if split.direction_M[index] == 1 else split.text(index).target
        assert int(english.split()[-1]) < 1000
    assert prepared.report.leaked


def test_damaged_files_are_named(source: Path) -> None:
    folder = prepare_pairs(config_for(source), 400).folder
    tokens = folder / "valid_tokens.bin"
    tokens.write_bytes(tokens.read_bytes()[:-10])
    with pytest.raises(
        ConfigError, match=r"data.cache_dir: the prepared pairs in .* are damaged \(valid_tokens.bin has"
    ):
        prepare_pairs(config_for(source), 400)


def test_refusals_leave_nothing_behind(source: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.max_len: 1 leaves no pair|data.pairs: no pair of en-de is left"):
        prepare_pairs(config_for(source, max_len=1), 400)
    with pytest.raises(ConfigError, match=r"model.vocab_size: 60000 is more than the training text gives"):
        prepare_pairs(config_for(source), 60_000)
    folder = Path(config_for(source).cache_dir) / "pairs"
    assert not [path for path in folder.iterdir() if path.suffix != ".lock"]
    with pytest.raises(ConfigError, match=r"data.cache_dir: cannot write"):
        prepare_pairs(config_for(source, cache_dir=str(source)), 400)


def test_no_torch_to_prepare(source: Path) -> None:
    code = "import sys, moe_scale.data.pairs.prepare; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_progress_is_said(source: Path) -> None:
    lines: list[str] = []
    prepare_pairs(config_for(source), 400, lines.append)
    assert lines[0].startswith("training a bpe tokenizer of 400 entries on ")
    assert lines[-1].startswith(f"prepared {source}: 302 pairs read (en-de 302); ")
    assert (prepare_pairs(config_for(source), 400).folder / cache.MANIFEST).is_file()
