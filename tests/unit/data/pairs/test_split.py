"""That no held-out source sentence, or a near-copy of it, is on any side of a training pair."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_scale.data.pairs.sentences import clean, sentence_key, stable_hash
from moe_scale.data.pairs.split import LEAKED, TEST, TRAIN, VALID, assign_splits
from moe_scale.errors import ConfigError


@pytest.mark.parametrize("copy", ["Add", "_Add...", "ADD", "add!", " (add) ", "Ａｄｄ"])
def test_near_copies_have_one_key(copy: str) -> None:
    assert sentence_key(copy) == "add"


def test_keys_of_other_sentences_differ() -> None:
    assert sentence_key("Straße") == sentence_key("STRASSE")
    assert sentence_key("Add 1") != sentence_key("Add 2")
    assert sentence_key("...") == "..."
    assert sentence_key("...") != sentence_key("?")


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_keys_and_clean_texts_are_stable(text: str) -> None:
    try:
        cleaned = clean(text)
    except UnicodeEncodeError:
        return
    assert clean(cleaned) == cleaned
    key = sentence_key(cleaned)
    assert bool(key) == bool(cleaned)
    if any(char.isalnum() for char in key):
        assert sentence_key(f"_{cleaned}...") == key


WORDS = st.sampled_from(
    [f"{mark}{word}{end}" for word in "abcdefghij" for mark in ("", "_") for end in ("", "...", "!")]
)
FRACTIONS = st.floats(0.01, 0.5)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=60), st.booleans(), FRACTIONS, FRACTIONS)
def test_no_split_shares_a_source_sentence(
    pairs: list[tuple[str, str]], both_ways: bool, valid: float, test: float
) -> None:
    pairs = pairs + [(b, a) for a, b in pairs] if both_ways else pairs
    sources, targets = (np.array([stable_hash(sentence_key(t)) for t in side], np.uint64) for side in zip(*pairs))  # noqa: B905
    try:
        split = assign_splits(sources, targets, valid_fraction=valid, test_fraction=test)
    except ConfigError:
        return  # too few sentences
    normal = [tuple(text.strip("_.!") for text in pair) for pair in pairs]
    members = {s: [pair for pair, one in zip(normal, split, strict=True) if one == s] for s in range(4)}
    source_of = {s: {source for source, _ in members[s]} for s in range(4)}
    heldout = source_of[VALID] | source_of[TEST]
    assert not source_of[VALID] & source_of[TEST]
    assert not heldout & {text for pair in members[TRAIN] for text in pair}
    assert all(target in heldout and source not in heldout for source, target in members[LEAKED])
    assert members[TRAIN]
    assert members[VALID]
    assert members[TEST]
    distinct = len({source for source, _ in normal})
    assert len(source_of[TEST]) == max(1, np.ceil(test * distinct - 1e-9))
    assert len(source_of[VALID]) == max(1, np.ceil(valid * distinct - 1e-9))


def test_a_sentence_stays_where_it_is_when_others_change_order() -> None:
    sources = np.array([stable_hash(str(n)) for n in range(1000)], dtype=np.uint64)
    targets = sources[::-1] + np.uint64(1)
    split = assign_splits(sources, targets, valid_fraction=0.1, test_fraction=0.05)
    assert [(split == s).sum() for s in range(4)] == [850, 100, 50, 0]
    back = assign_splits(sources[::-1], targets[::-1], valid_fraction=0.1, test_fraction=0.05)
    assert (back[::-1] == split).all()


def test_too_few_sentences() -> None:
    keys = np.array([1, 2, 2], dtype=np.uint64)
    with pytest.raises(ConfigError, match="1 sentences for the test and 1 for validation leave no pair to train on"):
        assign_splits(keys, keys + np.uint64(5), valid_fraction=0.02, test_fraction=0.02)
