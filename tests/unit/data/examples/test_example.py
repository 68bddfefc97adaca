"""What makes two examples the same, how texts are tidied, and what is counted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_scale.data.examples.example import Example, ExampleReport, cleaned, fold


def text(*texts: str, label: int = 0) -> Example:
    return Example("here", texts, None, label)


@pytest.mark.parametrize(
    ("given_text", "expected"),
    [
        ("It's GOOD, isn't it?", "it's good , isn't it ?"),
        ("Lovely &amp; Amazing", "lovely & amazing"),
        ("the ''Conan'' of \u201cour\u201d days\u2026", 'the " conan " of " our " days \u2026'),
        ("well-made -- mostly", "well-made -- mostly"),
        ("  a\n\tb ", "a b"),
        ("$5.50", "$ 5 . 50"),
    ],
)
def test_fold(given_text: str, expected: str) -> None:
    assert fold(given_text) == expected


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_folding_twice_is_folding_once_where_no_html_is_in_it(given_text: str) -> None:
    once = fold(given_text.replace("&", " "))
    assert fold(once) == once


def test_texts_are_the_same_by_letters_and_digits() -> None:
    assert text("It's GOOD!").key == text("its good", label=1).key
    assert text("its good").key != text("its not good").key
    assert text("a b", "c").key != text("a", "b c").key, "where one text ends and the next begins counts"
    assert text("!!!").key != text("???").key, "what has no letters is compared as it is"


def test_features_are_the_same_by_their_bytes() -> None:
    first = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert Example("a", (), first, 0).key == Example("b", (), first.copy(), 1).key
    assert Example("a", (), first, 0).key != Example("b", (), first + 1, 0).key


def test_texts_that_are_none_are_counted() -> None:
    report = ExampleReport()
    given_texts: list[tuple] = [("good",), ("",), (" \n ",), (None,), (3,), ("good", ""), ("\ud800",)]
    for number, texts in enumerate(given_texts):
        cleaned(f"line {number}", texts, 0, report, as_is=False)
    assert report.skipped == {"empty text": 3, "not text": 2, "not valid Unicode": 1}
    assert report.examples["not text"] == ["line 3 (NoneType)", "line 4 (int)"]
    found = cleaned("here", ("It's &lt;GOOD&gt;",), 1, report, as_is=True)
    assert found is not None
    assert (found.texts, found.label) == (("It's <GOOD>",), 1)


def test_what_the_report_says() -> None:
    report = ExampleReport(read={"training": 1200, "held-out": 30})
    report.remove("because", 2)
    report.remove("because", 1)
    report.remove("never", 0)
    report.skip("empty text", "a.csv, line 3")
    report.kept = {"train": [600, 400], "valid": [50, 47], "test": [20, 10]}
    report.cut = {"train": 7, "valid": 0, "test": 0}
    assert str(report).splitlines() == [
        "1,200 training, 30 held-out examples read; 1,000 train, 97 valid, 30 test",
        "left out: 3 because",
        "skipped: 1 empty text [a.csv, line 3]",
        "longer than max_len, and cut off there: 7 train",
    ]
