"""Text to token ids: a SentencePiece vocabulary of the training text, or that of the installed sentence encoder."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

from moe_scale.data.examples import sample
from moe_scale.data.subwords import SubwordTokenizer, train_model
from moe_scale.errors import ConfigError, Problem

PAD = 0
"""Id of padding, in either vocabulary."""


class Vocabulary(Protocol):
    """What classifying text needs of a tokenizer.

    Attributes:
        vocab_size: entries.
        separator_id: token between the texts of an example.
        fingerprint: changes whenever the encoding of any text could.
        file_name: what its file is called.
    """

    vocab_size: int
    separator_id: int
    fingerprint: str
    file_name: str

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens."""

    def save(self, path: Path) -> None:
        """Write it to a file."""


class Subwords(SubwordTokenizer):
    """SentencePiece, trained on the training text."""

    file_name = "tokenizer.model"
    separator_id = SubwordTokenizer.eos_id


class EncoderVocabulary:
    """The WordPiece vocabulary of all-MiniLM-L6-v2 (that of BERT, uncased), read from its ``tokenizer.json``."""

    file_name = "tokenizer.json"

    def __init__(self, content: bytes):
        import tokenizers

        self._content = content
        self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size: int = self._tokenizer.get_vocab_size()
        separator = self._tokenizer.token_to_id("[SEP]")
        if separator is None or self._tokenizer.token_to_id("[PAD]") != PAD:
            raise ValueError("it has no [SEP], or its [PAD] is not 0")
        self.separator_id: int = separator
        self.fingerprint = hashlib.sha256(content).hexdigest()[:16]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens."""
        return [found.ids for found in self._tokenizer.encode_batch(texts, add_special_tokens=False)]

    def save(self, path: Path) -> None:
        """Write it to a file."""
        path.write_bytes(self._content)


def make_vocabulary(
    kind: Literal["unigram", "bpe", "encoder"], sentences: Sequence[str], vocab_size: int
) -> Vocabulary:
    """The vocabulary that ``data.tokenizer`` names.

    Args:
        sentences: what SentencePiece is trained on.
        vocab_size: entries that it is trained to.

    Raises:
        ConfigError: when the sentences do not give so many entries, or the sentence encoder is not installed.
    """
    if kind != "encoder":
        return Subwords(train_model(sentences, kind=kind, vocab_size=vocab_size))
    path = sample.installed_file(sample.VOCABULARY)
    if path is None:
        raise ConfigError(sample.missing("data.tokenizer", sample.VOCABULARY))
    return EncoderVocabulary(path.read_bytes())


def load_vocabulary(folder: Path) -> Vocabulary:
    """The vocabulary that was saved in a folder.

    Raises:
        ConfigError: when there is none, or it cannot be read.
    """
    if (folder / Subwords.file_name).is_file():
        return Subwords.load(folder / Subwords.file_name)
    path = folder / EncoderVocabulary.file_name
    try:
        return EncoderVocabulary(path.read_bytes())
    except Exception as error:  # tokenizers raises no class of its own
        raise ConfigError(Problem(str(path), f"not a vocabulary ({error})", "", True)) from error
