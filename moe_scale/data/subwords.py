"""SentencePiece vocabularies, trained on a run's own training text.

Unigram language model (arXiv 1804.10959) or byte-pair encoding (arXiv 1508.07909), as implemented by SentencePiece
(arXiv 1808.06226). Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import io
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import sentencepiece

from moe_scale.data.pairs.sentences import clean, stable_hash
from moe_scale.errors import ConfigError, Problem

PAD_ID, UNK_ID, BOS_ID, EOS_ID = range(4)
"""The same in every vocabulary that is trained here, so that a batch can be told from its padding."""

MAX_PIECE_LENGTH = 16
"""Characters of a piece, at most: a text of more than ``16 * n`` characters has more than n tokens."""

_MAX_SENTENCES = 2_000_000  # more change a vocabulary little, and its training takes memory
_MAX_CHARACTERS = 1000  # of a sentence, for training: SentencePiece leaves long ones out
_TOO_LARGE = re.compile(r"Vocabulary size too high.*<= (\d+)", re.DOTALL)
_TOO_SMALL = re.compile(r"Vocabulary size is smaller than required_chars\. \d+ vs (\d+)")


class SubwordTokenizer:
    """Text to token ids and back, with no special token ever made from text.

    Characters outside the vocabulary become their UTF-8 bytes, so :meth:`decode` gives back every cleaned text
    exactly (but for U+2581, SentencePiece's mark for a blank, which becomes one). Pickles.

    Attributes:
        vocab_size: V.
        pad_id, unk_id, bos_id, eos_id: padding, unknown (which never occurs), begin and end of a sentence.
        fingerprint: 16 hex digits that change whenever the encoding of any text could.
    """

    pad_id, unk_id, bos_id, eos_id = PAD_ID, UNK_ID, BOS_ID, EOS_ID

    def __init__(self, model: bytes):
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size: int = self._processor.get_piece_size()
        self.fingerprint = hashlib.sha256(model).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, cleaned first; without tag, begin or end."""
        return self._processor.encode(clean(text))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, in one thread."""
        return self._processor.encode([clean(text) for text in texts], num_threads=1)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the tokens before the first end of sentence; padding, begin and tags are left out.

        A cut between the bytes of one character gives the replacement character U+FFFD.
        """
        kept: list[int] = []
        for index in map(int, ids):
            if index == self.eos_id:
                break
            if not self._processor.is_control(index):
                kept.append(index)
        return self._processor.decode(kept)

    def piece(self, index: int) -> str | None:
        """The text of one token, its blanks as blanks; empty for a single byte, None for tags and their like."""
        if self._processor.is_control(index) or self._processor.is_unknown(index):
            return None
        return "" if self._processor.is_byte(index) else self._processor.id_to_piece(index).replace("\u2581", " ")

    def save(self, path: Path) -> None:
        """Write the vocabulary as a SentencePiece model file."""
        path.write_bytes(self._model)

    @classmethod
    def load(cls, path: Path) -> Self:
        """The vocabulary that :meth:`save` wrote.

        Raises:
            ConfigError: at the file, when it is missing, damaged or no vocabulary of this kind.
        """

        def problem(what: str) -> ConfigError:
            allowed = "a run writes its vocabulary into its folder: copy it from there"
            return ConfigError(Problem(str(path), what, allowed, this_host_only=True))

        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise problem("the vocabulary is not there") from None
        except OSError as error:
            raise problem(f"the vocabulary cannot be read: {error.strerror}") from error
        damaged = problem(f"its {len(content):,} bytes are no whole vocabulary: the file is cut off or damaged")
        if not content:  # which SentencePiece takes, and has no entries for
            raise damaged
        try:
            tokenizer = cls(content)
        except (RuntimeError, ValueError) as error:
            raise damaged from error
        if lacks := tokenizer._lacks():
            raise problem(f"not a vocabulary of this kind: {lacks}")
        return tokenizer

    def _lacks(self) -> str:
        """What a vocabulary of this kind has and this one does not; empty for nothing."""
        return "" if self._processor.eos_id() == EOS_ID else "its special tokens are others"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._model,)


def train_model(
    sentences: Iterable[str],
    *,
    kind: Literal["unigram", "bpe"],
    vocab_size: int,
    control_symbols: Sequence[str] = (),
) -> bytes:
    """Train a vocabulary. The same sentences in the same order give the same one, bit for bit.

    Every distinct sentence counts once. Of more than two million, as many are drawn evenly.

    Args:
        sentences: cleaned text.
        vocab_size: entries, special ones included.
        control_symbols: further special tokens, which no text makes.

    Raises:
        ConfigError: at ``model.vocab_size``, when the text does not give so many entries, or they do not hold its
            alphabet; says the largest or least possible.
    """
    chosen = _draw(_distinct(sentences), _MAX_SENTENCES)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([sentence[:_MAX_CHARACTERS] for sentence in chosen]),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            control_symbols=list(control_symbols),
            pad_id=PAD_ID,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            max_sentencepiece_length=MAX_PIECE_LENGTH,
            max_sentence_length=4 * _MAX_CHARACTERS + 1,  # bytes
            num_threads=1,  # another number gives another unigram vocabulary
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _explained(error, vocab_size) from error
    return model.getvalue()


def _distinct(sentences: Iterable[str]) -> Iterator[str]:
    seen: set[int] = set()
    for sentence in sentences:
        if (identity := stable_hash(sentence)) not in seen:
            seen.add(identity)
            yield sentence


def _draw(sentences: Iterable[str], count: int) -> list[str]:
    """``count`` of the sentences, each with equal chances, the same at every call (reservoir sampling)."""
    drawn: list[str] = []
    numbers = random.Random(0)
    for seen, sentence in enumerate(sentences):
        if seen < count:
            drawn.append(sentence)
        elif (slot := int(numbers.random() * (seen + 1))) < count:
            drawn[slot] = sentence
    return drawn


def _explained(error: RuntimeError, vocab_size: int) -> ConfigError:
    """What SentencePiece complains about, in terms of the settings."""
    large, small = _TOO_LARGE.search(str(error)), _TOO_SMALL.search(str(error))
    if large:
        what, allowed = "is more than the training text gives", f"choose at most {large[1]}, or more text"
    elif small:
        what, allowed = (
            "cannot hold the text's letters, 256 bytes and the special tokens",
            f"choose at least {small[1]}",
        )
    else:
        what, allowed = f"cannot be trained: {error}", "see the message of SentencePiece"
    return ConfigError(Problem("model.vocab_size", f"{vocab_size} {what}", allowed))
