"""Scores of sentences whose values are known, and the nearest sentence by hand."""

from __future__ import annotations

from moe_scale.evaluate.text_metrics import nearest_translations, signatures, text_scores


def test_scores_at_both_ends() -> None:
    said = ["the cat sat on the mat", "a dog barked at the old man"]
    same = text_scores(said, said)
    assert (round(same.bleu, 6), round(same.chrf, 6), same.sentences) == (100, 100, 2)
    assert text_scores(["x y z w", "q q q q"], said).bleu < 1
    assert text_scores([], []).sentences == 0
    assert all("version:" in signature for signature in signatures().values())


def test_nearest_is_by_edits_relative_to_the_longer_text() -> None:
    known, targets = ["abcd", "abcdefghij", "xbcd", "abcx"], ["four", "ten", "x first", "x last"]
    assert nearest_translations(["abcd"], known, targets) == ["four"]
    assert nearest_translations(["abcdefgh"], ["abcdefg" * 2, "abcdefghij"], ["far", "near"]) == ["near"]
    assert nearest_translations(["ybcd"], known, targets) == ["four"], "the earliest of equally near ones"
    many = [f"number {n}" for n in range(600)]
    assert nearest_translations(many, many, many) == many, "over several blocks"
