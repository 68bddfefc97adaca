"""opus_books, on a stand-in for the hub."""

from __future__ import annotations

import datasets
import pytest

from moe_scale.config import PairDataConfig
from moe_scale.data.pairs.hub import OPUS_BOOKS_LANGUAGES, OPUS_BOOKS_PAIRS
from moe_scale.data.pairs.report import PairReport
from moe_scale.data.pairs.sources import check_pair_source, read_pairs
from moe_scale.errors import ConfigError

ROWS = {
    "de-en": [("Guten Tag.", "Good day."), ("Nichts", ""), ("Zwei\nZeilen", "Two  lines")],
    "en-fr": [("Good day.", "Bonjour.")],
}


def config(*pairs: str) -> PairDataConfig:
    return PairDataConfig(source="opus_books", pairs=pairs)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the configurations that were loaded."""
    names: list[str] = []

    def load_dataset(path: str, name: str, split: str) -> datasets.Dataset:
        assert (path, split) == ("Helsinki-NLP/opus_books", "train")
        names.append(name)
        first, second = name.split("-")
        rows = [{first: a, second: b} for a, b in ROWS[name]]
        return datasets.Dataset.from_dict({"id": [str(i) for i in range(len(rows))], "translation": rows})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return names


def test_several_directions_of_one_configuration_load_it_once(asked: list[str]) -> None:
    report = PairReport()
    pairs = list(read_pairs(config("en-de", "de-en", "fr-en"), report))
    assert asked == ["de-en", "en-fr"]
    assert ("en-de", "Two lines", "Zwei Zeilen") in pairs
    assert ("de-en", "Zwei Zeilen", "Two lines") in pairs
    assert ("fr-en", "Bonjour.", "Good day.") in pairs
    assert report.read == {"en-de": 2, "de-en": 2, "fr-en": 1}
    assert report.skipped == {"empty source": 1, "empty target": 1}
    assert report.examples["empty source"] == ["opus_books de-en, row 2 (en-de)"]


def test_the_table_of_configurations() -> None:
    assert len(OPUS_BOOKS_PAIRS) == 64
    assert len(OPUS_BOOKS_LANGUAGES) == 16
    assert all(pair == "-".join(sorted(pair.split("-"))) for pair in OPUS_BOOKS_PAIRS)
    assert set(check_pair_source(config(*OPUS_BOOKS_PAIRS))) == set()
    assert check_pair_source(config("ende", "de-de")) == [], "the settings tell of names that are none"


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ((), "data.pairs: none given, and opus_books has 64 pairs of languages; choose among ca-de, ca-en"),
        (("en-ja",), "opus_books has no language ja; choose from ca, de, el, en"),
        (("sv-de",), "opus_books has no sv-de; it has sv with en, fr, it"),
    ],
)
def test_what_the_hub_does_not_have_is_refused_unasked(asked: list[str], pairs: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        list(read_pairs(config(*pairs), PairReport()))
    assert message in str(refused.value)
    assert asked == []


def test_no_network_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: object, **kwargs: object) -> None:
        raise ConnectionError("Couldn't reach 'Helsinki-NLP/opus_books' on the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ConfigError) as refused:
        list(read_pairs(config("en-de"), PairReport()))
    (problem,) = refused.value.problems
    assert problem.where == "data.source"
    assert "cannot load Helsinki-NLP/opus_books de-en (Couldn't reach" in str(problem)
    assert "\n" not in str(problem)
