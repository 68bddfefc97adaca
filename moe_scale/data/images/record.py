"""An image with its texts, and the account of what became of all that were read. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from moe_scale.data.pairs.sentences import clean
from moe_scale.data.report import SkipReport

SPLITS = ("train", "valid", "test", "mismatched")
"""The last one is MNLI's second held-out set, of other genres than those of training; empty elsewhere."""


class Place(NamedTuple):
    """Where the bytes of an image are.

    Attributes:
        name: a file; for the sample, the emoji itself.
        start: first byte in the file.
        size: bytes; -1 for the whole file.
    """

    name: str
    start: int = 0
    size: int = -1


class Text(NamedTuple):
    """A caption, a question, or one or two sentences.

    Attributes:
        language: its code.
        second: the second text of a pair; empty without one.
        label: class or score; NaN where there is none (yet).
        answers: those that people gave to a question, the agreed one first.
    """

    language: str
    first: str
    second: str = ""
    label: float = float("nan")
    answers: tuple[str, ...] = ()


@dataclass(eq=False)
class Record:
    """An image and its texts, or a text alone.

    Attributes:
        where: file and line, for messages.
        place: of the image; None for a text alone.
        texts: in the order of the source.
        part: train or, where the source says that it is held out, another of :data:`SPLITS`.
        family: records with the same one are kept on one side of the split; empty for none.
        mirrors: whether the image means the same when it is mirrored, as far as its texts tell.
    """

    where: str
    place: Place | None
    texts: list[Text]
    part: str = "train"
    family: str = ""
    mirrors: bool = True


@dataclass
class ImageTextReport(SkipReport):
    """What reading a source and splitting it came to. Nothing is left out that is not counted here.

    Attributes:
        read: records read, per part.
        removed: records or texts taken out after they were read, per reason.
        groups: of near copies that had to stay together: their number, their images in all, and the largest.
        compared: how images were looked at for near copies.
        kept: items (images; examples for texts alone) of each split.
        texts: texts of each split, per language.
        cut: texts longer than ``max_len``, which lost their end, per split.
    """

    read: dict[str, int] = field(default_factory=dict)
    removed: dict[str, int] = field(default_factory=dict)
    groups: dict[str, int] = field(default_factory=dict)
    compared: str = ""
    kept: dict[str, int] = field(default_factory=dict)
    texts: dict[str, dict[str, int]] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)

    def remove(self, reason: str, count: int = 1) -> None:
        """Count what is taken out."""
        if count:
            self.removed[reason] = self.removed.get(reason, 0) + count

    def __str__(self) -> str:
        lines = [", ".join(f"{count:,} {part}" for part, count in self.read.items()) + " records read"]
        if self.kept:
            lines[0] += "; " + ", ".join(f"{count:,} {split}" for split, count in self.kept.items() if count)
        for split, languages in self.texts.items():
            if languages:
                counts = ", ".join(f"{count:,} {code}" for code, count in languages.items())
                lines.append(f"texts of {split}: {counts}")
        if self.groups:
            groups = "{groups:,} groups of {images:,}, the largest of {largest:,}".format(**self.groups)
            lines.append(f"near copies kept on one side of the split: {groups} ({self.compared})")
        lines += [f"left out: {count:,} {reason}" for reason, count in self.removed.items()]
        if self.skipped:
            lines.append(f"skipped: {self.skips()}")
        if any(self.cut.values()):
            counts = ", ".join(f"{count:,} {split}" for split, count in self.cut.items() if count)
            lines.append(f"longer than max_len, and cut off there: {counts}")
        return "\n".join(lines)


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can spell it: JSON can hold half of a surrogate pair."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def cleaned(where: str, text: object, report: SkipReport) -> str:
    """``text`` tidied; empty, and counted, where it is no text or has nothing in it."""
    if not isinstance(text, str):
        report.skip("not text", where, type(text).__name__)
        return ""
    if not is_unicode(text):
        report.skip("not valid Unicode", where)
        return ""
    if not (found := clean(text)):
        report.skip("empty text", where)
    return found
