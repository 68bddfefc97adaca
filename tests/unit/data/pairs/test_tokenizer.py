"""SentencePiece vocabularies: exact both ways, tags that no text makes, the same at every training."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_scale.data import subwords
from moe_scale.data.pairs.prepare import PreparedPairs
from moe_scale.data.pairs.sentences import clean
from moe_scale.data.pairs.tokenizer import PairTokenizer, train_tokenizer
from moe_scale.errors import ConfigError

SENTENCES = [f"sentence number {n} of {n * n} about häuser and {'abcdefgh'[n % 8] * 3}" for n in range(300)]


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> PairTokenizer:
    return train_tokenizer(SENTENCES, ["de", "fr"], kind=request.param, vocab_size=400)


def test_round_trip(tokenizer: PairTokenizer) -> None:
    text_of = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"))

    @settings(max_examples=300, deadline=None)
    @given(text_of)
    def check(text: str) -> None:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == clean(text)
        assert tokenizer.encode_batch([text, ""]) == [ids, []]
        assert tokenizer.unk_id not in ids
        assert len(clean(text)) <= len(ids) * subwords.MAX_PIECE_LENGTH  # what spares huge lines

    check()


def test_special_tokens_are_never_made_from_text(tokenizer: PairTokenizer) -> None:
    text = "<2de> <pad> <unk> <s> </s> <0x41> <2fr>"
    special = {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.tag_id("de"), tokenizer.tag_id("fr")}
    assert len(special) == 5
    ids = tokenizer.encode(text)
    assert not special & set(ids)
    assert tokenizer.decode(ids) == text


def test_decode_stops_at_the_end(tokenizer: PairTokenizer) -> None:
    one, two = tokenizer.encode("one"), tokenizer.encode("two")
    t = tokenizer
    assert t.decode([t.tag_id("de"), t.bos_id, *one, t.pad_id, t.eos_id, *two]) == "one"
    assert t.decode([]) == ""


def test_unknown_language(tokenizer: PairTokenizer) -> None:
    assert tokenizer.languages == ["de", "fr"]
    with pytest.raises(ConfigError, match=r"^to: no translation into 'en' was learned; choose from de, fr$"):
        tokenizer.tag_id("en")


def test_saved_and_pickled(tokenizer: PairTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "t.model")
    for other in (PairTokenizer.load(tmp_path / "t.model"), pickle.loads(pickle.dumps(tokenizer))):
        assert other.fingerprint == tokenizer.fingerprint
        assert other.vocab_size == tokenizer.vocab_size == 400
        assert other.encode("sentence of häuser") == tokenizer.encode("sentence of häuser")


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_training_is_deterministic_and_counts_a_sentence_once(kind, capfd: pytest.CaptureFixture[str]) -> None:
    once = train_tokenizer(SENTENCES, ["fr", "de"], kind=kind, vocab_size=400)
    again = train_tokenizer(iter(SENTENCES + SENTENCES[:100] * 9), ["de", "fr"], kind=kind, vocab_size=400)
    assert once.fingerprint == again.fingerprint
    assert once.fingerprint != train_tokenizer(SENTENCES, ["de"], kind=kind, vocab_size=400).fingerprint
    assert capfd.readouterr() == ("", "")  # SentencePiece keeps its log to itself


def test_many_sentences_are_drawn_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = subwords._draw([str(n) for n in range(10_000)], 1000)
    assert drawn == subwords._draw([str(n) for n in range(10_000)], 1000)
    assert len(set(drawn)) == 1000
    assert sum(map(int, drawn)) / 1000 == pytest.approx(5000, abs=3 * 2887 / 1000**0.5)  # 3 standard errors
    monkeypatch.setattr(subwords, "_MAX_SENTENCES", 100)
    assert train_tokenizer(SENTENCES, ["de"], kind="bpe", vocab_size=330).vocab_size == 330


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_impossible_sizes_name_the_possible_one(kind) -> None:
    for size, direction in ((5000, "at most"), (270, "at least")):
        with pytest.raises(ConfigError) as refused:
            train_tokenizer(SENTENCES, ["de"], kind=kind, vocab_size=size)
        (problem,) = refused.value.problems
        assert problem.where == "model.vocab_size"
        assert direction in problem.allowed
        possible = int(problem.allowed.split(direction)[1].split(",")[0])
        assert train_tokenizer(SENTENCES, ["de"], kind=kind, vocab_size=possible).vocab_size == possible


def test_files_that_are_no_vocabulary(tmp_path: Path, sample_pairs: PreparedPairs) -> None:
    whole = (sample_pairs.folder / "tokenizer.model").read_bytes()
    other = subwords.train_model(SENTENCES, kind="bpe", vocab_size=320)
    (tmp_path / "folder.model").mkdir()
    for name, content, what in (
        ("bad.model", b"no model", "its 8 bytes are no whole vocabulary: the file is cut off or damaged"),
        ("empty.model", b"", "its 0 bytes are no whole vocabulary"),
        ("cut.model", whole[:5000], "its 5,000 bytes are no whole vocabulary"),
        ("other.model", other, "not a vocabulary of this kind: it has no language tags"),
        ("folder.model", None, "the vocabulary cannot be read: Is a directory"),
        ("missing.model", None, "the vocabulary is not there"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError) as refused:
            PairTokenizer.load(tmp_path / name)
        (problem,) = refused.value.problems
        assert str(problem).startswith(f"{tmp_path / name}: {what}")
        assert str(problem).endswith("; a run writes its vocabulary into its folder: copy it from there")
    assert PairTokenizer.load(sample_pairs.folder / "tokenizer.model").languages == ["de", "el", "en"]
