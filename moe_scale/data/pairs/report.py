"""A sentence pair, and the account of what became of every record that was read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from moe_scale.data.report import SkipReport

SPLITS = ("train", "valid", "test")


class Pair(NamedTuple):
    """A sentence and its translation.

    Attributes:
        direction: the two languages, source first, as ``en-de``.
        source, target: texts in NFC, white space collapsed to single blanks.
    """

    direction: str
    source: str
    target: str


@dataclass
class PairReport(SkipReport):
    """What reading a source and splitting it came to. Nothing is left out that is not counted here.

    Attributes:
        read: pairs read, per direction.
        duplicates: exact repetitions of a pair, per direction; the first one is kept.
        too_long: pairs with a side of more than ``max_len`` tokens, per split and direction.
        leaked: training pairs left out because one side is a held-out source sentence, per direction.
        kept: pairs in the end, per split and direction.
    """

    read: dict[str, int] = field(default_factory=dict)
    duplicates: dict[str, int] = field(default_factory=dict)
    too_long: dict[str, dict[str, int]] = field(default_factory=dict)
    leaked: dict[str, int] = field(default_factory=dict)
    kept: dict[str, dict[str, int]] = field(default_factory=dict)

    def count(self, direction: str) -> None:
        """Count one pair that was read."""
        self.read[direction] = self.read.get(direction, 0) + 1

    def __str__(self) -> str:
        lines = [f"{sum(self.read.values()):,} pairs read ({_counts(self.read)})"]
        if self.kept:
            lines[0] += "; " + ", ".join(f"{sum(self.kept[split].values()):,} {split}" for split in SPLITS)
            missing = [f"no {split} pair of {d}" for split in SPLITS for d, n in self.kept[split].items() if not n]
            lines += [", ".join(missing)] if missing else []
        if self.skipped:
            lines.append(f"skipped: {self.skips()}")
        if self.duplicates:
            lines.append(f"repeated, kept once: {_counts(self.duplicates)}")
        if self.leaked:
            lines.append(f"left out of training, as a side is a held-out source sentence: {_counts(self.leaked)}")
        for split, counts in self.too_long.items():
            if counts:
                lines.append(f"left out of {split}, as longer than max_len: {_counts(counts)}")
        return "\n".join(lines)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items()))
