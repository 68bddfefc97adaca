"""SentencePiece vocabularies of sentence pairs: with a tag for every target language. Nothing here imports torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

from moe_scale.data.subwords import (
    BOS_ID,
    EOS_ID,
    MAX_PIECE_LENGTH,
    PAD_ID,
    UNK_ID,
    SubwordTokenizer,
    train_model,
)
from moe_scale.errors import ConfigError, Problem

__all__ = ["BOS_ID", "EOS_ID", "MAX_PIECE_LENGTH", "PAD_ID", "UNK_ID", "PairTokenizer", "train_tokenizer"]

_TAG = re.compile(r"<2([a-z]{2,3})>")


class PairTokenizer(SubwordTokenizer):
    """A vocabulary of sentence pairs.

    Attributes:
        languages: target languages, each with a tag ``<2xx>`` that begins a source (arXiv 1611.04558).
    """

    def __init__(self, model: bytes):
        super().__init__(model)
        self._tags = {
            match[1]: index
            for index in range(self.vocab_size)
            if self._processor.is_control(index) and (match := _TAG.fullmatch(self._processor.id_to_piece(index)))
        }
        self.languages = sorted(self._tags)

    def tag_id(self, language: str) -> int:
        """The token that begins a source to be translated into ``language``.

        Raises:
            ConfigError: at ``to``, for a language that the vocabulary has no tag for.
        """
        if language not in self._tags:
            known = ", ".join(self.languages)
            raise ConfigError(Problem("to", f"no translation into {language!r} was learned", f"choose from {known}"))
        return self._tags[language]

    def _lacks(self) -> str:
        return super()._lacks() or ("" if self.languages else "it has no language tags")


def train_tokenizer(
    sentences: Iterable[str], languages: Iterable[str], *, kind: Literal["unigram", "bpe"], vocab_size: int
) -> PairTokenizer:
    """Train a vocabulary. The same sentences in the same order give the same one, bit for bit.

    Every distinct sentence counts once: a sentence with 15 translations is not 15 times as important as each of them.
    Of more than two million, as many are drawn evenly.

    Args:
        sentences: cleaned text.
        languages: target languages, which get a tag each.
        vocab_size: entries, special ones included.

    Raises:
        ConfigError: at ``model.vocab_size``, when the text does not give so many entries, or they do not hold its
            alphabet; says the largest or least possible.
    """
    tags = [f"<2{language}>" for language in sorted(languages)]
    return PairTokenizer(train_model(sentences, kind=kind, vocab_size=vocab_size, control_symbols=tags))
