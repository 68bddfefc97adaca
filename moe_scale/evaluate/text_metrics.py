"""BLEU and chrF of translations, by sacrebleu, and the two baselines that a translation has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAX_COMPARED = 200_000_000
"""Pairs of sentences that :func:`nearest_translations` compares in some minutes; more are not worth the wait."""


@dataclass(frozen=True)
class TextScores:
    """Corpus scores of translations against one reference each, 0 to 100."""

    bleu: float
    """BLEU (Papineni et al. 2002) as sacrebleu defines it (arXiv 1804.08771)."""
    chrf: float
    """chrF, character n-gram F-score (Popovic 2015)."""
    sentences: int


def text_scores(translations: Sequence[str], references: Sequence[str]) -> TextScores:
    """Scores of a corpus; 0 for one without a sentence."""
    from sacrebleu.metrics import BLEU, CHRF

    if not translations:
        return TextScores(0.0, 0.0, 0)
    bleu, chrf = BLEU().corpus_score(translations, [references]), CHRF().corpus_score(translations, [references])
    return TextScores(bleu.score, chrf.score, len(translations))


def signatures() -> dict[str, str]:
    """What sacrebleu computes under these names: without this two BLEU figures cannot be compared."""
    from sacrebleu.metrics import BLEU, CHRF

    metrics = {"bleu": BLEU(), "chrf": CHRF()}
    for metric in metrics.values():
        metric.corpus_score(["a"], [["a"]])  # a metric knows its signature only after its first use
    return {name: str(metric.get_signature()) for name, metric in metrics.items()}


def nearest_translations(
    sources: Sequence[str], known_sources: Sequence[str], known_targets: Sequence[str]
) -> list[str]:
    """For each source the translation of the known sentence that is nearest to it, by Levenshtein distance over
    characters relative to the longer of the two; the earliest of equally near ones.

    What a translation memory would give.
    """
    from rapidfuzz import process
    from rapidfuzz.distance import Levenshtein

    found: list[str] = []
    for first in range(0, len(sources), 256):  # one block of distances at a time
        block = process.cdist(
            sources[first : first + 256], known_sources, scorer=Levenshtein.normalized_distance, dtype=np.float32
        )
        found += [known_targets[index] for index in block.argmin(axis=1)]
    return found
