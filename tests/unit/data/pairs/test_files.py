"""Pairs in files of every kind, and what becomes of files and records that are not as they should be."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from moe_scale.config import PairDataConfig
from moe_scale.data.pairs.report import Pair, PairReport
from moe_scale.data.pairs.sources import check_pair_source, read_pairs
from moe_scale.errors import ConfigError

EN_DE = [Pair("en-de", "One house", "Ein Haus"), Pair("en-de", "Two houses", "Zwei Häuser")]


def read(path: Path, *pairs: str) -> tuple[list[Pair], PairReport]:
    report = PairReport()
    return list(read_pairs(PairDataConfig(source=str(path), pairs=pairs), report)), report


def refusal(path: Path, *pairs: str) -> str:
    with pytest.raises(ConfigError) as refused:
        read(path, *pairs)
    return str(refused.value)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def json_lines(*records: object) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def test_every_kind_gives_the_same_pairs(tmp_path: Path) -> None:
    records = [{"en": a, "de": b} for _, a, b in EN_DE]
    kinds = [
        write(tmp_path / "a.tsv", "en\tde\nOne house\tEin Haus\nTwo houses\tZwei Häuser\n"),
        write(tmp_path / "windows.tsv", "\ufeffde\ten\r\nEin Haus\tOne house\r\nZwei Häuser\tTwo houses"),
        write(tmp_path / "b.jsonl", json_lines(*records)),
        write(tmp_path / "hub.jsonl", json_lines(*({"id": "7", "translation": record} for record in records))),
        write(tmp_path / "c.jsonl.gz", gzip.compress(json_lines(*records).encode())),
        write(tmp_path / "books.v1.en", "One  house \nTwo houses\n"),
    ]
    write(tmp_path / "books.v1.de", "\ufeffEin Haus\nZwei\u00a0Häuser")
    write(tmp_path / "books.v2.de", "of another stem\n")
    for path in kinds:
        pairs, report = read(path, "en-de")
        assert pairs == EN_DE, path
        assert report.read == {"en-de": 2}
        assert not report.skipped, path


def test_without_named_pairs_both_ways_of_all_languages(tmp_path: Path) -> None:
    write(tmp_path / "three.tsv", "en\tde\tfr\nDay\tTag\tJour\n")
    write(tmp_path / "more.jsonl", json_lines({"id": "5", "url": "x", "en": "Night", "de": "Nacht", "note": 3}))
    _, report = read(tmp_path)
    assert report.read == {"en-de": 2, "de-en": 2, "en-fr": 1, "fr-en": 1, "de-fr": 1, "fr-de": 1}
    assert not report.skipped


def test_a_folder_mixes_kinds_and_reports_what_it_left(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    write(tmp_path / ".hidden" / "x.tsv", "en\tde\nnot\tread\n")
    write(tmp_path / "README.md", "no data")
    write(tmp_path / "sub" / "a.tsv", "en\tde\nDay\tTag\n")
    write(tmp_path / "other.tsv", "fr\tit\nJour\tGiorno\n")
    write(tmp_path / "b.en", "Night\n")
    write(tmp_path / "b.de", "Nacht\n")
    write(tmp_path / "alone.en", "Nobody\n")
    pairs, report = read(tmp_path, "de-en")
    assert sorted(pairs) == [("de-en", "Nacht", "Night"), ("de-en", "Tag", "Day")]
    assert report.examples == {
        "text file without a partner": ["alone.en"],
        "file without a direction of data.pairs": ["other.tsv (fr, it)"],
    }


def test_bad_records_are_counted_with_file_and_line(tmp_path: Path) -> None:
    lines = [
        b"en\tde",
        b"good\tgut",
        b"",
        b"only one",
        b"\tleer",
        b"empty\t ",
        b"\t",
        b"latin-1\tgr\xfc\xdfe",
        b"a\tb\tc",
    ]
    write(tmp_path / "a.tsv", b"\n".join([*lines, b"also good\tauch gut"]))
    pairs, report = read(tmp_path, "en-de")
    assert [pair.source for pair in pairs] == ["good", "also good"]
    assert report.examples == {
        "empty line": ["a.tsv, line 3", "a.tsv, line 7"],
        "wrong number of columns": ["a.tsv, line 4 (1, not 2)", "a.tsv, line 9 (3, not 2)"],
        "empty source": ["a.tsv, line 5 (en-de)"],
        "empty target": ["a.tsv, line 6 (en-de)"],
        "not UTF-8": ["a.tsv, line 8 (byte 10 of the line)"],
    }
    assert sum(report.skipped.values()) + report.read["en-de"] == 9


def test_bad_json_is_counted(tmp_path: Path) -> None:
    records = ['{"en": "good", "de": "gut"}', '{"en": "cut', "[1]", '{"en": "one-sided"}', '{"en": "null", "de": null}']
    records += ['{"en": "half \\ud800", "de": "halb"}', '{"translation": "none"}', "", '{"fr": "oui", "it": "si"}']
    write(tmp_path / "a.jsonl", "\n".join(records).encode() + b'\n{"en": "\xff"}\n')
    pairs, report = read(tmp_path, "en-de")
    assert [pair.source for pair in pairs] == ["good"]
    reasons = {"not JSON": 1, "not a JSON object": 2, "missing field": 2, "not text": 1, "not valid Unicode": 1}
    assert report.skipped == reasons | {"empty line": 1, "not UTF-8": 1}
    assert report.examples["missing field"] == ["a.jsonl, line 4 (only en)", "a.jsonl, line 9 (only other fields)"]
    assert "a.jsonl, line 5 (de)" in str(report)


def test_a_cut_off_archive_gives_what_came_before(tmp_path: Path) -> None:
    whole = gzip.compress(json_lines(*({"en": f"e{i * 7919}", "de": f"d{i * 104729}"} for i in range(5000))).encode())
    write(tmp_path / "a.jsonl.gz", whole[: len(whole) // 2])
    pairs, report = read(tmp_path, "en-de")
    assert 0 < len(pairs) < 5000
    assert report.examples == {
        "file whose rest is lost": [f"a.jsonl.gz (the file is cut off after line {len(pairs):,})"]
    }
    write(tmp_path / "a.jsonl.gz", whole[: len(whole) // 2] + b"\xff" * 4000)
    _, report = read(tmp_path, "en-de")
    assert "a.jsonl.gz (the file cannot be read after line " in str(report)
    write(tmp_path / "a.jsonl.gz", b"no archive")
    assert "data.source" in refusal(tmp_path, "en-de")


def test_parallel_text_of_unequal_length_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "books.en", "one\ntwo\nthree\n")
    write(tmp_path / "books.de", "eins\nzwei\n")
    assert "lines do not correspond: books.de has 2, books.en has 3" in refusal(tmp_path, "en-de")


def test_parallel_text_with_bad_lines(tmp_path: Path) -> None:
    write(tmp_path / "books.en", b"one\n\ngr\xfc\nfour\n")
    write(tmp_path / "books.de", b"eins\nzwei\ndrei\nvier\n")
    pairs, report = read(tmp_path / "books.de", "de-en")
    assert pairs == [("de-en", "eins", "one"), ("de-en", "vier", "four")]
    assert report.examples == {
        "empty target": ["books.{de,en}, line 2 (de-en)"],
        "not UTF-8": ["books.en, line 3 (byte 2 of the line)"],
    }


@pytest.mark.parametrize(
    ("files", "source", "pairs", "message"),
    [
        ({}, "nothing", (), "data.source: '{0}/nothing' does not exist; choose sample, opus_books, or give a .tsv"),
        ({"a.txt": "x"}, "", (), "has no file of a supported kind"),
        ({"a.txt": "x"}, "a.txt", (), "a.txt is of no supported kind"),
        ({"books.en": "x"}, "books.en", (), "books.en has no partner; put books.XX beside it"),
        ({"books.en": "x", "books.fr": "y"}, "", ("en-de",), "put books.XX beside it, where XX is one of de"),
        ({"a.tsv": "One\tEins\n"}, "a.tsv", (), "begins with the line 'One\\tEins'; the first line names the language"),
        ({"a.tsv": "en\n"}, "a.tsv", (), "begins with the line 'en'"),
        ({"a.tsv": "en\ten\n"}, "a.tsv", (), "begins with the line 'en\\ten'"),
        ({"a.tsv": ""}, "a.tsv", (), "begins with the line ''"),
        ({"a.jsonl": ""}, "", (), "has only empty files"),
        ({"a.tsv": "en\tde\nx\ty\n"}, "", ("en-de", "de-fr"), "data.pairs: {0}/ has no de-fr; it has de-en, en-de"),
        ({"a.tsv": "en\tde\nx\ty\n".encode("utf-16")}, "", (), "not UTF-8; it is UTF-16: convert it by iconv"),
        ({"a.tsv": "en\tde\nx\ty\n".encode("utf-32")}, "", (), "it is UTF-32: convert it by iconv -f UTF-32"),
        ({"a.tsv": "en\tde\nx\ty\n"}, "", ("en-dee1", "fr-de"), "data.pairs: {0}/ has no fr-de"),
    ],
)  # fmt: skip
def test_a_quick_look_refuses(
    tmp_path: Path, files: dict[str, str | bytes], source: str, pairs: tuple[str, ...], message: str
) -> None:
    for name, content in files.items():
        write(tmp_path / name, content)
    (problem,) = check_pair_source(PairDataConfig(source=f"{tmp_path}/{source}", pairs=pairs))
    assert message.format(tmp_path) in str(problem)
    assert problem.this_host_only


def test_what_only_reading_tells_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", json_lines({"en": "one-sided"}, {"en": "x", "de": ""}))
    message = refusal(path, "en-de")
    assert "has no sentence pair that can be used; skipped: 1 missing field [a.jsonl, line 1 (only en)]" in message
    write(path, json_lines({"en": "x", "de": "y"}))
    assert "data.pairs" in (message := refusal(path, "en-de", "en-fr"))
    assert "has no en-fr; it has en-de" in message
    write(path, json_lines({"en": "x", "de": "y"}).encode("utf-16"))
    assert "a.jsonl is not UTF-8; it is UTF-16: convert it by iconv" in refusal(path, "en-de")
