"""The files of one split: items (an image each, or an example) and their texts.

``<split>_images.npy`` (number of each item's image), ``<split>_mirrors.npy``, ``<split>_first.npy`` (each item's first
text and, last, the end); ``<split>_tokens.bin`` (little-endian uint16 or uint32, CLS first), ``<split>_second.npy``
(where a pair's second text begins, 0 without one), ``<split>_languages.npy``, ``<split>_labels.npy`` (float64, NaN for
none), ``<split>_texts.bin`` (UTF-8) and ``<split>_answers.bin`` (JSON), with ``..._starts.npy``.

Shape suffixes: M items, T texts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from moe_scale.config import ImageTextDataConfig
from moe_scale.data.examples.vocabulary import Subwords
from moe_scale.data.images.record import ImageTextReport, Record, Text
from moe_scale.data.pairs.ragged import Ragged, RaggedWriter

TEXT_SEPARATOR = " | "
"""Between the two texts of a pair where they are shown."""


def token_dtype(vocab_size: int) -> str:
    return "<u2" if vocab_size <= 2**16 else "<u4"


class ImageTextSplit:
    """The items of one split and their texts, read in place.

    Attributes:
        name: of the split.
        images_M: number of each item's image, int64; of an example of texts alone its own.
        mirrors_M: bool, whether the image may be mirrored.
        first_M1: first text of each item and, last, the number of texts, [M + 1] int64.
        items_T: item of each text, int64.
        lengths_T: tokens of each text, int64.
        second_T: place of the first token of a pair's second text, int64; 0 without one.
        languages_T: number of each text's language, int64.
        labels_T: float64, NaN for none.
    """

    def __init__(self, folder: Path, name: str, vocab_size: int):
        self.name = name
        arrays = {what: np.load(folder / f"{name}_{what}.npy") for what in _ARRAYS}
        self.images_M, self.mirrors_M, self.first_M1 = arrays["images"], arrays["mirrors"], arrays["first"]
        self.second_T, self.languages_T, self.labels_T = arrays["second"], arrays["languages"], arrays["labels"]
        self._tokens = Ragged(folder / f"{name}_tokens", token_dtype(vocab_size))
        self._texts = Ragged(folder / f"{name}_texts", "u1")
        self._answers = Ragged(folder / f"{name}_answers", "u1")
        self.lengths_T = self._tokens.lengths
        counts = {len(x) for x in (self._tokens, self._texts, self._answers, self.second_T, self.labels_T)}
        if counts != {self.first_M1[-1]} or len(self.first_M1) != len(self.images_M) + 1:
            raise ValueError(f"the files of {name} are of unequal length")
        self.items_T = np.repeat(np.arange(len(self.images_M)), np.diff(self.first_M1))

    def __len__(self) -> int:
        return len(self.images_M)

    @property
    def num_texts(self) -> int:
        return len(self.labels_T)

    def tokens(self, text: int) -> np.ndarray:
        """Token ids of a text, CLS first."""
        return self._tokens[text]

    def text(self, text: int) -> str:
        """A text as it was read; those of a pair with a separator."""
        return self._texts[text].tobytes().decode()

    def answers(self, text: int) -> list[str]:
        """The answers that people gave to a question; empty where the texts are no questions."""
        found: list[str] = json.loads(self._answers[text].tobytes())
        return found[1:]


_ARRAYS = ("images", "mirrors", "first", "second", "languages", "labels")


def write_split(
    folder: Path,
    name: str,
    records: list[Record],
    images: dict[int, int],
    languages: list[str],
    vocabulary: Subwords,
    config: ImageTextDataConfig,
    report: ImageTextReport,
    content: Any,
) -> None:
    """Write the files of a split; what is cut off is counted, and what is written goes to the digest ``content``.

    Args:
        images: number of a record's image, by the identity of the record.
    """
    texts = [text for record in records for text in record.texts]
    counts = [len(record.texts) for record in records]
    arrays = {
        "images": np.array([images[id(record)] for record in records], dtype=np.int64),
        "mirrors": np.array([record.mirrors for record in records], dtype=bool),
        "first": np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts, dtype=np.int64)]),
        "languages": np.array([languages.index(text.language) for text in texts], dtype=np.int64),
        "labels": np.array([text.label for text in texts], dtype=np.float64),
    }
    second, cut = np.zeros(len(texts), dtype=np.int64), 0
    dtype = token_dtype(vocabulary.vocab_size)
    with (
        RaggedWriter(folder / f"{name}_tokens", dtype) as tokens,
        RaggedWriter(folder / f"{name}_texts", "u1") as words,
        RaggedWriter(folder / f"{name}_answers", "u1") as answers,
    ):
        for number, text in enumerate(texts):
            ids, second[number], whole = encode_text(text, vocabulary, config.max_len)
            cut += not whole
            content.update(tokens.append(np.array(ids, dtype=dtype)) + b"\xff" * 4)
            words.append((text.first + (TEXT_SEPARATOR + text.second if text.second else "")).encode())
            answers.append(json.dumps(text.answers).encode() if text.answers else b"[]")
    arrays["second"] = second
    for what, array in arrays.items():
        np.save(folder / f"{name}_{what}.npy", array)
        content.update(array.tobytes())
    report.kept[name], report.cut[name] = len(records), cut
    numbers = np.bincount(arrays["languages"], minlength=len(languages)).tolist()
    report.texts[name] = {code: count for code, count in zip(languages, numbers, strict=True) if count}


def encode_text(text: Text, vocabulary: Subwords, max_len: int) -> tuple[list[int], int, bool]:
    """(token ids, place of the second text's first token or 0, whether nothing was cut off).

    CLS, the first text, and of a pair a separator and the second text. Of a pair that is too long, the longer text
    loses tokens at its end until it fits, as in BERT (arXiv 1810.04805).
    """
    first, second = vocabulary.encode_batch([text.first, text.second])
    room = max_len - (2 if text.second else 1)
    over = len(first) + len(second) - room
    if over > 0:
        kept_first = max(room - len(second), min(len(first), (room + 1) // 2))
        first = first[:kept_first]
        second = second[: room - len(first)]
    ids = [vocabulary.bos_id, *first]
    if not text.second:
        return ids, 0, over <= 0
    return [*ids, vocabulary.separator_id, *second], len(ids) + 1, over <= 0
