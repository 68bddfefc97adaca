"""Token ids into text while they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_BROKEN = "\ufffd"
"""What a decoder makes of bytes that are no UTF-8, such as those of half a character."""

_CONTEXT = 8
"""Tokens of the prompt that the first ones are decoded with: some tokenizers drop a text's leading blank."""


class Tokenizer(Protocol):
    """What is needed of a tokenizer; :class:`moe_scale.data.tokenizer.TextTokenizer` has it."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def eot_id(self) -> int: ...
    def decode(self, ids: list[int], /) -> str: ...


class TextStream:
    """The text of one sequence, in pieces whose concatenation is the decoded whole, up to the first stop string.

    A character may be spread over tokens, and so may a stop string; a piece is held back until it is known to be
    neither the beginning of a character nor of a stop string. Of several stop strings the one that is complete first
    ends the text, and of those that end at the same place the longest, wherever the boundaries of tokens are.

    Args:
        prompt: the tokens before the text; they are whole characters.
        stop: texts that end it and do not belong to it; none is empty.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (), stop: Sequence[str] = ()):
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.stopped = False
        """Whether a stop string came; nothing follows then."""
        self._ids = [token for token in prompt[-_CONTEXT:] if token != tokenizer.eot_id]
        self._begin, self._read = 0, len(self._ids)  # decoding starts at the one; the other is the end of what is read
        self._held = ""

    def push(self, token: int) -> str:
        """What can be shown after one more token."""
        self._ids.append(token)
        text, shown = self._decoded()
        # A whole character that is the mark of broken ones waits for the next: it cannot be told from half of one.
        if text.endswith(_BROKEN) or len(text) <= shown:
            return ""
        self._begin, self._read = self._read, len(self._ids)
        return self._released(text[shown:])

    def finish(self) -> str:
        """What was held back, when no more tokens come."""
        text, shown = self._decoded()
        released = self._released(text[shown:])
        released, self._held = released + self._held, ""
        return released

    def _decoded(self) -> tuple[str, int]:
        """The text of the last tokens, and how many characters of it are read already."""
        return (
            self.tokenizer.decode(self._ids[self._begin :]),
            len(self.tokenizer.decode(self._ids[self._begin : self._read])),
        )

    def _released(self, new: str) -> str:
        if self.stopped:
            return ""
        text, self._held = self._held + new, ""
        found = [(start + len(stop), start) for stop in self.stop if (start := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)[1]]
        held = max((_overlap(text, stop) for stop in self.stop), default=0)
        released, self._held = text[: len(text) - held], text[len(text) - held :]
        return released


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of ``text`` that ``stop`` may begin with."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if stop.startswith(text[-size:])), 0)
