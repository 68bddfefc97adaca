"""Files of examples: what is read, what is counted, and what is refused with one message."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from moe_scale.data.examples.example import ExampleReport
from moe_scale.data.examples.files import MAX_CHARACTERS
from moe_scale.data.examples.sources import check_examples, read_source
from moe_scale.errors import ConfigError
from tests.unit.data.examples.conftest import Settings, some_texts, write_json_lines


def read(config: Any) -> tuple[list[tuple[Any, ...]], ExampleReport]:
    report = ExampleReport()
    return [(e.texts, e.label) for e in read_source(config, report).training], report


def problem_of(config: Any) -> str:
    with pytest.raises(ConfigError) as refused:
        read_source(config, ExampleReport())
    (problem,) = refused.value.problems
    return str(problem)


EXPECTED = [(("a , b",), 0), (('said " so "',), 1)]


def test_every_kind_of_file(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('\ufefftext,label\r\n"A, b",0\r\n"said ""so""",1\r\n', encoding="utf-8")
    (tmp_path / "a.tsv").write_text('label\ttext\n0\tA, b\n1\tsaid "so"\n')
    lines = "".join(json.dumps(r) + "\n" for r in ({"text": "A, b", "label": 0}, {"label": "1", "text": 'said "so"'}))
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for name in ("a.csv", "a.tsv", "a.jsonl", "a.jsonl.gz"):
        config = settings(source=str(tmp_path / name))
        assert check_examples(config) == []
        found, report = read(config)
        assert found == EXPECTED, name
        assert report.read == {"training": 2}


def test_fields_of_other_names_several_texts_and_case(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("first,second,class\nA,B?,0\nC,D,1\n")
    how = {"text_fields": ("second", "first"), "label_field": "class", "text_form": "as_is"}
    found, _ = read(settings(source=str(tmp_path / "a.csv"), **how))
    assert found == [(("B?", "A"), 0), (("D", "C"), 1)]


def test_records_that_give_no_example_are_counted(settings: Settings, tmp_path: Path) -> None:
    lines = [*map(json.dumps, some_texts(4)), "", "{", "[1]", json.dumps({"text": "x"}), json.dumps({"label": 0})]
    lines += [json.dumps({"text": " ", "label": 0}), json.dumps({"text": ["x"], "label": 0})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    found, report = read(settings(source=str(tmp_path / "a.jsonl")))
    assert len(found) == 4
    assert report.skipped == {
        "empty line": 1, "not JSON": 1, "not a JSON object": 1, "missing field": 2, "empty text": 1, "not text": 1,
    }  # fmt: skip
    (tmp_path / "a.csv").write_text("text,label\ngood,1\nbad,0,extra\n\nbad,0\n")
    found, report = read(settings(source=str(tmp_path / "a.csv")))
    assert len(found) == 2
    assert report.skipped == {"wrong number of columns": 1, "empty line": 1}
    assert report.examples["wrong number of columns"] == ["a.csv, line 3 (3, not 2)"]


def test_a_text_of_any_length_is_read_and_lines_are_told_by_where_records_begin(
    settings: Settings, tmp_path: Path
) -> None:
    text = "word " * 40_000  # more characters than Python's csv takes by itself
    (tmp_path / "a.csv").write_text(f'text,label\n"two\nlines",0,more\n"{text}",1\n"b\nb",0\n"open,0\nc,1\n')
    with pytest.raises(ConfigError, match="line 7: the record that begins there"):
        read(settings(source=str(tmp_path / "a.csv")))
    (tmp_path / "a.csv").write_text(f'text,label\n"two\nlines",0,more\n"{text}",1\n"b\nb",0\n')
    found, report = read(settings(source=str(tmp_path / "a.csv")))
    assert found == [((text.strip(),), 1), (("b b",), 0)]
    assert report.examples["wrong number of columns"] == ["a.csv, line 2 (3, not 2)"]


@pytest.mark.parametrize(
    ("name", "content", "given", "where", "what"),
    [
        ("a.csv", "text,label\na,pos\nb,neg\nc,1.0\nd,-1\n", {}, "data.label_field", "4 labels are no whole numbers"),
        ("a.jsonl", '{"text": "a", "label": true}\n{"text": "b", "label": 1.5}\n', {}, "data.label_field", "2 labels"),
        ("a.csv", "text,label\na,0\nb,7\n", {}, "model.output_size", "2, and the training examples have labels 0, 7"),
        ("a.csv", "text,label\na,1\nb,1\n", {}, "data.source", "all 2 training examples are of class 1"),
        ("a.csv", "text,label\n,1\n ,0\n", {}, "data.source", "no example that can be used; skipped: 2 empty text"),
        ("a.csv", "text,label\n", {}, "data.source", "has no record"),
        ("a.csv", "", {}, "data.source", "has no record"),
        ("a.csv", "sentence,y\na,1\n", {"label_field": "y"}, "data.text_fields", "no column 'text'; it has sen"),
        ("a.csv", "text;label\na;1\n", {"text_fields": ("text",), "label_field": "text;label"},
         "data.text_fields", "first line is 'text;label', and columns of a .csv are separated by commas"),
        ("a.csv", "text,text,label\na,b,1\n", {}, "data.source", "several columns 'text'; give each a name of its own"),
        ("a.jsonl", '{"text": "a"}\n', {}, "data.label_field", "no field 'label'; it has text"),
        ("a.csv", 'text,label\n"a,1\n', {}, "data.source", "line 2: the record that begins there cannot be"),
        ("a.csv", "text,label\n" + "a" * (MAX_CHARACTERS + 1) + ",1\n", {}, "data.source", "at most 16,777,216 chara"),
        ("a.jsonl", '{"f": [[1]], "label": 1}\n', {}, "data.text_fields", "in f, set data.features_field f"),
        ("a.jsonl", '{"f": [[1]], "label": 1}\n', {"features_field": "f", "model_input_size": 2}, "data.source",
         "f is to be a list of positions, each a list of model.input_size = 2 numbers"),
        ("a.csv", b"text,label\n\xff,1\n", {}, "data.source", "not UTF-8"),
        ("a.csv", "text,label\na,1\n".encode("utf-16"), {}, "data.source", "it is UTF-16: convert it by iconv"),
        ("a.jsonl.gz", b"no gzip", {}, "data.source", "cannot be read after line 0: Not a gzipped file"),
        ("a.parquet", "", {}, "data.source", "of no supported kind"),
        ("a.csv", "text,label\na,1\n", {"features_field": "x"}, "data.source", "is a table, which holds no features"),
    ],
)  # fmt: skip
def test_what_is_refused(
    name: str, content: str | bytes, given: dict, where: str, what: str, settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    found = problem_of(settings(source=str(tmp_path / name), **given))
    assert found.startswith(f"{where}: ")
    assert what in found


def test_an_archive_that_is_cut_off_is_refused_as_that(settings: Settings, tmp_path: Path) -> None:
    whole = "".join(f'{{"text": "{n * 7919}", "label": 1}}\n' for n in range(5000)).encode()
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(whole)[:9000])
    found = problem_of(settings(source=str(path)))
    assert re.fullmatch(rf"{path}: a.jsonl.gz: the file is cut off after line [0-9],[0-9]+; give the whole file", found)


def test_files_that_are_not_there(settings: Settings, tmp_path: Path) -> None:
    (problem,) = check_examples(settings(source="no/where.csv"))
    assert str(problem).startswith("data.source: 'no/where.csv' does not exist; choose sample, glue/sst2, synthetic")
    texts = write_json_lines(tmp_path / "a.jsonl", some_texts(4))
    (problem,) = check_examples(settings(source=texts, heldout="no/where.csv"))
    assert str(problem).startswith("data.heldout: 'no/where.csv' does not exist; give a .csv or .tsv file")
    (problem,) = check_examples(settings(source=str(tmp_path)))
    assert problem.where == "data.source"


def test_a_held_out_file_has_to_fit_too(settings: Settings, tmp_path: Path) -> None:
    texts = write_json_lines(tmp_path / "a.jsonl", some_texts(4))
    held = write_json_lines(tmp_path / "b.jsonl", [{"text": "x", "label": 5}])
    assert "the held-out examples have labels 5" in problem_of(settings(source=texts, heldout=held))
    held = write_json_lines(tmp_path / "b.jsonl", [{"text": "", "label": 0}])
    assert problem_of(settings(source=texts, heldout=held)).startswith(f"data.heldout: {held} has no example")


def test_features(settings: Settings, tmp_path: Path) -> None:
    good = [{"x": [[n, 1.0], [2, 3]], "label": n % 2} for n in range(4)]
    bad: list[Any] = [[[1, float("nan")]], [[1, 1e39]], [[1, 2], [3]], [[1, 2, 3]], [], [1, 2], "text", None]
    records = good + [{"x": value, "label": 0} for value in bad]
    config = settings(source=write_json_lines(tmp_path / "a.jsonl", records), features_field="x", model_input_size=2)
    report = ExampleReport()
    found = read_source(config, report).training
    assert [e.features_SI.tolist() for e in found] == [[[n, 1.0], [2, 3]] for n in range(4)]
    assert report.skipped == {
        "features that are not finite numbers": 2,
        "features of unequal width": 1,
        "features that are no list of lists of numbers": 4,
        "features of another width than model.input_size": 1,
    }
    assert report.examples["features that are not finite numbers"] == [
        "a.jsonl, line 5 (nan, number 2 of position 1)",
        "a.jsonl, line 6 (inf, number 2 of position 1)",
    ]
    assert report.examples["features of unequal width"] == ["a.jsonl, line 7 (1 to 2 numbers a position)"]
