"""A labelled example, what makes two of them the same, and the account of what became of all that were read."""

from __future__ import annotations

import functools
import hashlib
import html
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from moe_scale.data.pairs.sentences import clean, sentence_key, stable_hash
from moe_scale.data.report import SkipReport

SPLITS = ("train", "valid", "test")

_PUNCTUATION = re.compile(r"([.,!?;:()\[\]\"/&*$%+=<>\u2013\u2014\u2026]|--+)")  # dashes and the ellipsis too
_QUOTES = str.maketrans({"\u2018": "'", "\u2019": "'", "`": "'", "\u201c": '"', "\u201d": '"'})


@dataclass(frozen=True, eq=False)
class Example:
    """Something to classify, and its class.

    Attributes:
        where: file and line, for messages.
        texts: what is read, in a row; empty for features.
        features_SI: [S, I] float32; None for text.
        label: from 0.
    """

    where: str
    texts: tuple[str, ...]
    features_SI: np.ndarray | None
    label: int

    @functools.cached_property
    def key(self) -> int:
        """64 bits that are equal for examples that are the same, whatever their label: texts of the same letters and
        digits, features of the same bytes."""
        if self.features_SI is not None:
            digest = hashlib.blake2b(self.features_SI.tobytes(), digest_size=8).digest()
            return int.from_bytes(digest, "big")
        return stable_hash("\n".join(map(sentence_key, self.texts)))


def fold(text: str) -> str:
    """``text`` as a vocabulary sees most words in one spelling: in lower case, punctuation apart from words.

    HTML's names of characters (``&amp;``) become the characters, and typographic quotes plain ones.
    """
    text = html.unescape(text).translate(_QUOTES).replace("''", '"')
    return clean(_PUNCTUATION.sub(r" \1 ", text.lower()))


@dataclass
class ExampleReport(SkipReport):
    """What reading a source and splitting it came to. Nothing is left out that is not counted here.

    Attributes:
        read: examples read, for training and held out.
        removed: examples taken out after they were read, per reason.
        cut: sequences longer than ``max_len``, which lost their end, per split.
        kept: examples of each class in the end, per split.
    """

    read: dict[str, int] = field(default_factory=dict)
    removed: dict[str, int] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    kept: dict[str, list[int]] = field(default_factory=dict)

    def remove(self, reason: str, count: int) -> None:
        """Count examples that are taken out."""
        if count:
            self.removed[reason] = self.removed.get(reason, 0) + count

    def __str__(self) -> str:
        lines = [", ".join(f"{count:,} {which}" for which, count in self.read.items()) + " examples read"]
        if self.kept:
            lines[0] += "; " + ", ".join(f"{sum(self.kept[split]):,} {split}" for split in SPLITS)
        lines += [f"left out: {count:,} {reason}" for reason, count in self.removed.items()]
        if self.skipped:
            lines.append(f"skipped: {self.skips()}")
        if any(self.cut.values()):
            counts = ", ".join(f"{count:,} {split}" for split, count in self.cut.items() if count)
            lines.append(f"longer than max_len, and cut off there: {counts}")
        return "\n".join(lines)


def cleaned(where: str, texts: Iterable[object], label: int, report: SkipReport, *, as_is: bool) -> Example | None:
    """The example of these texts; None, and counted, where one is no text or empty.

    Args:
        as_is: leave case and punctuation as they are.
    """
    found = []
    for text in texts:
        if not isinstance(text, str):
            report.skip("not text", where, type(text).__name__)
            return None
        try:
            found.append(clean(html.unescape(text)) if as_is else fold(text))
        except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, which no UTF-8 can
            report.skip("not valid Unicode", where)
            return None
    if not all(found):
        report.skip("empty text", where)
        return None
    return Example(where, tuple(found), None, label)
