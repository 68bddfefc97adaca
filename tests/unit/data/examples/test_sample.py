"""The installed sample: what is in it, and that no held-out sentence that is scored is one of training."""

from __future__ import annotations

import csv
import html
import importlib.metadata
import tarfile
from pathlib import Path

import pytest
from rapidfuzz import fuzz, process

from moe_scale.data.examples import sample
from moe_scale.data.examples.prepare import PreparedExamples, prepare_examples
from moe_scale.data.examples.sources import check_examples
from moe_scale.data.report import SkipReport
from moe_scale.errors import ConfigError
from tests.unit.data.examples.conftest import Settings


def letters(text: str) -> str:
    """Letters and digits, written here once more: the test does not lean on what it tests."""
    return "".join(char for char in html.unescape(text).casefold() if char.isalnum())


@pytest.fixture(scope="module")
def reviews() -> list[tuple[str, int]]:
    path = sample.installed_file(sample.REVIEWS)
    assert path is not None
    with open(path, encoding="utf-8", newline="") as file:
        return [(r["text"], int(r["label"])) for r in csv.DictReader(file) if r["source"] == "rotten_tomatoes"]


@pytest.fixture(scope="module")
def ratings() -> list[tuple[str, float]]:
    path = sample.installed_file(sample.RATINGS)
    assert path is not None
    with tarfile.open(path) as archive:
        member = archive.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        assert member is not None
        rows = [line.split("\t") for line in member.read().decode().splitlines()]
    return [(text, float(rating)) for _, rating, text in rows]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedExamples:
    from moe_scale.config import ClassifierConfig, ClassifierModelConfig, ExampleDataConfig

    data = ExampleDataConfig(tokenizer="bpe", cache_dir=str(tmp_path_factory.mktemp("cache")))
    return prepare_examples(ClassifierConfig(model=ClassifierModelConfig(vocab_size=1000), data=data))


def test_what_the_files_hold(reviews: list, ratings: list) -> None:
    assert len(reviews) == 8530
    assert sum(label for _, label in reviews) == 4265
    assert len(ratings) == 10605
    assert [tuple(found[1:]) for found in sample.review_records()] == reviews
    report = SkipReport()
    assert [tuple(found[1:]) for found in sample.rating_records(report)] == [
        (text, int(rating > 0)) for text, rating in ratings if rating != 0
    ]
    assert list(report.skipped.values()) == [sum(rating == 0 for _, rating in ratings)]


def test_nothing_that_is_scored_was_trained_on(prepared: PreparedExamples, reviews: list, ratings: list) -> None:
    """The two sets overlap by four fifths. The raw files are compared here, not what the reader made of them."""
    known = {letters(text) for text, _ in reviews}
    unseen = [(text, rating) for text, rating in ratings if letters(text) not in known]
    scored = {letters(text) for text in prepared.split("test").texts()}
    trained = {letters(text) for name in ("train", "valid") for text in prepared.split(name).texts()}
    assert not scored & trained
    assert not scored & known, "nor with a sentence that was left out of training"
    assert trained <= known
    assert scored == {letters(text) for text, rating in unseen if rating != 0}, "and nothing unseen is left out"
    # 2,136 differ from every sentence of training in their letters; of 16 that is so for an &amp; alone.
    literally = {"".join(c for c in text.casefold() if c.isalnum()) for text, _ in reviews}
    assert sum("".join(c for c in text.casefold() if c.isalnum()) not in literally for text, _ in ratings) == 2136
    assert (len(unseen), len(scored), len(prepared.split("test"))) == (2120, 2112, 2112)


def test_no_scored_sentence_is_nearly_one_of_training(prepared: PreparedExamples) -> None:
    """A few short ones share a phrase, and mostly say the opposite; none is a copy with a letter changed."""
    trained = [letters(text) for name in ("train", "valid") for text in prepared.split(name).texts()]
    test = [letters(text) for text in prepared.split("test").texts()]
    near = process.cdist(test[::8], trained, scorer=fuzz.ratio, score_cutoff=92, dtype="uint8")
    assert not near.any()


def test_labels_of_the_scored(prepared: PreparedExamples, ratings: list) -> None:
    by_text = {letters(text): int(rating > 0) for text, rating in ratings}
    test = prepared.split("test")
    assert [by_text[letters(text)] for text in test.texts()] == test.labels_M.tolist()
    assert prepared.report.kept["test"] == [1057, 1055]
    assert sum(sum(counts) for counts in prepared.report.kept.values()) == 8528 + 2112


def test_the_report_accounts_for_every_sentence(prepared: PreparedExamples) -> None:
    report = prepared.report
    assert report.read == {"training": 8530, "held-out": 10605 - 37}
    kept = {name: sum(counts) for name, counts in report.kept.items()}
    assert sum(kept.values()) + sum(report.removed.values()) == sum(report.read.values())
    assert report.removed["held-out examples that are in training as well: not scored"] == 8454


def test_a_missing_package_is_one_problem_for_each_file(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    found = check_examples(settings(tokenizer="encoder", model_embeddings="encoder"))
    assert [problem.where for problem in found] == ["data.source"] * 2 + ["data.tokenizer"] * 2
    assert all("-r requirements-samples.txt" in p.allowed and p.this_host_only for p in found)
    with pytest.raises(ConfigError):
        list(sample.review_records())
    with pytest.raises(ConfigError):
        sample.encoder_vectors()


def test_a_wheel_without_the_archive_is_told(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """As pip builds it when it is not asked for the archive, or finds one of these in its cache."""
    real = importlib.metadata.files
    monkeypatch.setattr(
        importlib.metadata, "files", lambda name: [p for p in real(name) or [] if not p.name.endswith(".tar.gz")]
    )
    (problem,) = check_examples(settings())
    assert "hutto_ICWSM_2014.tar.gz" in problem.what
    assert "--no-cache-dir --force-reinstall" in problem.allowed


def test_a_damaged_archive(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    damaged = tmp_path / "hutto.tar.gz"
    damaged.write_bytes(b"no archive")
    monkeypatch.setattr(sample, "installed_file", lambda place: damaged)
    with pytest.raises(ConfigError, match=r"^data.source: .*hutto.tar.gz cannot be read"):
        list(sample.rating_records(SkipReport()))


def test_the_sentence_encoder() -> None:
    from moe_scale.config.classifier import ENCODER_VOCABULARY, ENCODER_WIDTH
    from moe_scale.data.examples.vocabulary import make_vocabulary

    assert sample.encoder_vectors().shape == (ENCODER_VOCABULARY, ENCODER_WIDTH)
    vocabulary = make_vocabulary("encoder", [], 0)
    assert vocabulary.vocab_size == ENCODER_VOCABULARY
    assert vocabulary.encode_batch(["hello world", "Hello  World!", ""]) == [[7592, 2088], [7592, 2088, 999], []]
    assert vocabulary.separator_id == 102
