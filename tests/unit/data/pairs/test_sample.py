"""The installed sample: which messages there are, and that accelerators go while placeholders stay."""

from __future__ import annotations

import re

import pytest

from moe_scale.config import PairDataConfig
from moe_scale.data.pairs import sample
from moe_scale.data.pairs.report import PairReport
from moe_scale.data.pairs.sources import SAMPLE_LANGUAGES, check_pair_source, read_pairs
from moe_scale.errors import ConfigError


def test_all_languages_against_english_by_default() -> None:
    report = PairReport()
    pairs = list(read_pairs(PairDataConfig(), report))
    assert len(pairs) == 105_835
    assert len(report.read) == 15
    assert report.read["en-el"] == 5221
    assert {direction: count for direction, count in report.read.items() if count < 7000} == {"en-el": 5221}
    assert report.skipped == {"empty target": 1}  # a Polish separator that is one blank
    assert ("en-de", "Add", "Hinzufügen") in pairs
    assert all(text == " ".join(text.split()) for pair in pairs for text in pair)
    assert not any("\x04" in pair.source for pair in pairs)


def test_two_translations_meet_over_the_english_message() -> None:
    english = {lang: {} for lang in ("de", "fr")}
    for language, texts in english.items():
        for _, source, target in read_pairs(PairDataConfig(pairs=(f"en-{language}",)), PairReport()):
            texts.setdefault(source, set()).add(target)
    report = PairReport()
    both = list(read_pairs(PairDataConfig(pairs=("de-fr",)), report))
    assert len(both) > 7000
    known = {
        (de, fr) for source in english["de"] for de in english["de"][source] for fr in english["fr"].get(source, ())
    }
    assert {(pair.source, pair.target) for pair in both} <= known
    assert sum(report.read.values()) + sum(report.skipped.values()) >= 7190  # every message of either is accounted for


@pytest.mark.parametrize(
    ("message", "translation", "stripped"),
    [
        ("_Add", "_Hinzufügen", "Hinzufügen"),
        ("Select file _type:", "Datei_typ auswählen:", "Dateityp auswählen:"),
        ("E_dge", "E_cke", "Ecke"),  # inside a word, and the word exists
        ("_Open %(file_name)s", "%(file_name)s ö_ffnen", "%(file_name)s öffnen"),
        ("_Keep {number_of}", "{number_of} _behalten", "{number_of} behalten"),
        ("enclosed_by", "Teil_von", None),  # a name: there is no word "enclosedby"
        ("Not_Related", "Nicht_verwandt", None),
        ("%(first_name)s Date", "%(first_name)s Datum", None),
        ("dates with ______", "Daten mit ______", None),
        ("Merge_two_people", "Zwei_Personen_vereinen", None),
    ],
)
def test_accelerators(message: str, translation: str, stripped: str | None) -> None:
    words = {"edge", "notrelated"}
    assert sample.has_accelerator(message, words) == (stripped is not None)
    if stripped is not None:
        assert sample.without_accelerator(translation) == stripped


def test_accelerators_of_the_real_messages() -> None:
    texts = dict(sample.sample_records(["en", "de"]))
    stripped = [(where, text["en"]) for where, text in texts.items() if "_" in where and "_" not in text["en"]]
    assert len(stripped) > 200
    left = [text["en"] for text in texts.values() if re.search(r"(?<![\w(<{%.-])_[a-zA-Z]\w* ", text["en"])]
    assert left == []  # none is left at a word's start


def test_unknown_language_is_refused_with_those_there_are() -> None:
    (problem,) = check_pair_source(PairDataConfig(pairs=("en-de", "en-ja", "ende", "EN-DE", "de-de")))
    assert problem.where == "data.pairs"
    assert "en-ja: the sample has no language ja" in str(problem)
    assert ", ".join(SAMPLE_LANGUAGES) in problem.allowed
    assert len(SAMPLE_LANGUAGES) == 16


def test_missing_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "SAMPLE_PACKAGE", "no_such_package_anywhere")
    sample.catalogue_files.cache_clear()
    try:
        (problem,) = check_pair_source(PairDataConfig())
        assert sample.SAMPLE_INSTALL in problem.allowed
        with pytest.raises(ConfigError, match="not installed"):
            next(read_pairs(PairDataConfig(), PairReport()))
    finally:
        sample.catalogue_files.cache_clear()
