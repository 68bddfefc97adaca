"""The account of records that could not be used; nothing is left out that is not counted."""

from __future__ import annotations

from dataclasses import dataclass, field

_MAX_EXAMPLES = 3


@dataclass
class SkipReport:
    """Records (or files) that gave nothing.

    Attributes:
        skipped: their number, per reason.
        examples: per reason the first few of them, each with its file and line.
    """

    skipped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def skip(self, reason: str, where: str, detail: str = "") -> None:
        """Count one record that gives nothing, at ``where``, for ``reason``."""
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < _MAX_EXAMPLES:
            examples.append(f"{where} ({detail})" if detail else where)

    def skips(self) -> str:
        """The reasons with their counts and examples, for a human; empty without any."""
        parts = []
        for reason, count in self.skipped.items():
            examples = self.examples[reason]
            more = ", ..." if count > len(examples) else ""
            parts.append(f"{count:,} {reason} [{'; '.join(examples)}{more}]")
        return ", ".join(parts)
