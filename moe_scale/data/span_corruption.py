"""Span corruption (arXiv 1910.10683, section 3.1.4): a text with spans cut out, and what was cut.

Each span is replaced by a sentinel of its own, an entry of the vocabulary after the tokenizer's. The target repeats
the sentinels, each followed by its span, and ends with one more sentinel, so that text and target together give back
the whole:

    text     Thank you for inviting me to your party last week
    input    Thank you <0> me to your party <1> week
    target   <0> for inviting <1> last <2>

Shapes: B batch, L tokens of a text, S tokens that the model reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from moe_scale.config import SwitchConfig
from moe_scale.data.loader import TrainLoader
from moe_scale.data.packing import IGNORE, Batch
from moe_scale.errors import ConfigError, Problem


class Corrupted(NamedTuple):
    """A text with spans cut out, int64 token ids."""

    input: np.ndarray
    target: np.ndarray


class SpanCorruption:
    """Cuts spans out of texts of one length; how many and how long in all depends on that length alone.

    Args:
        config: of the run; its texts have ``data.seq_len`` tokens.
        first_sentinel: id of the first sentinel, which is the number of the tokenizer's entries.
        seed: of where the spans are, together with the number of the text.
    """

    def __init__(self, config: SwitchConfig, first_sentinel: int, seed: int):
        self.text_tokens = config.data.seq_len
        self.noise, self.spans = config.model.span_lengths(self.text_tokens)
        self.first_sentinel, self.seed = first_sentinel, seed

    def corrupt(self, text_L: np.ndarray, number: int) -> Corrupted:
        """Cut spans out of the text with this number; the same number gives the same spans."""
        random = np.random.RandomState([self.seed & 0xFFFFFFFF, self.seed >> 32, number & 0xFFFFFFFF, number >> 32])
        # Something stays between two spans; before the first and after the last there may be nothing.
        before, *between = _segments(self.text_tokens - self.noise + 2, self.spans + 1, random)
        kept = [before - 1, *between[:-1]]
        cut = _segments(self.noise, self.spans, random)
        sentinels = self.first_sentinel + np.arange(self.spans + 1, dtype=np.int64)
        inputs, targets, at = [], [], 0
        for span, (before, length) in enumerate(zip(kept, cut, strict=True)):
            inputs += [text_L[at : at + before], sentinels[span : span + 1]]
            targets += [sentinels[span : span + 1], text_L[at + before : at + before + length]]
            at += before + length
        inputs.append(text_L[at:])
        return Corrupted(np.concatenate(inputs), np.concatenate([*targets, sentinels[-1:]]))

    def batch(self, batch: Batch, numbers: Sequence[int]) -> Batch:
        """A batch of texts as a prefix language model reads them: the input, then the target. Returns [B, S].

        A text with padding gives a row of padding: evaluation leaves the last, shorter one out.

        Args:
            batch: of texts, [B, L].
            numbers: of the texts.
        """
        rows = []
        for text_L, documents_L, number in zip(batch.ids_BS, batch.document_ids_BS, numbers, strict=True):
            one = self.corrupt(text_L.numpy(), number)
            joined = torch.from_numpy(np.concatenate(one))
            counts = torch.arange(1, len(joined)) >= len(one.input)  # the first target follows the whole input
            present = bool((documents_L >= 0).all())
            targets = joined[1:].masked_fill(~(counts & present), IGNORE)
            rows.append((joined[:-1], targets, torch.full_like(targets, 0 if present else -1)))
        return Batch(*map(torch.stack, zip(*rows, strict=True)))


def restore(inputs: Sequence[int], target: Sequence[int], first_sentinel: int) -> list[int]:
    """The text that a corrupted one was; what a model wrote as its target need not be well formed.

    Sentinels of the input that the target does not have stay where they are.
    """
    spans: dict[int, list[int]] = {}
    current: list[int] | None = None
    for token in target:
        if token >= first_sentinel:
            current = spans.setdefault(token, [])
        elif current is not None:
            current.append(token)
    return [token for place in inputs for token in (spans.get(place, [place]) if place >= first_sentinel else [place])]


class CorruptedLoader(TrainLoader[Batch]):
    """Training batches of corrupted texts; where their spans are depends on the number of the text in the run, so
    that each pass over the data has other ones, and any number of ranks the same."""

    def __init__(self, texts: Any, corruption: SpanCorruption, *, micro_batch: int, rank: int):
        self.texts, self.corruption = texts, corruption
        self.micro_batch, self.rank = micro_batch, rank

    def __next__(self) -> Batch:
        first = self.texts.samples + self.rank * self.micro_batch
        return self.corruption.batch(next(self.texts), range(first, first + self.micro_batch))

    def state_dict(self) -> dict[str, Any]:
        return {**self.texts.state_dict(), "objective": "span_corruption"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.get("objective") != "span_corruption":
            what = "the position in the data is that of another objective"
            raise ConfigError(Problem("resume", what, "use the run's own model.objective"))
        self.texts.load_state_dict(state)

    def close(self) -> None:
        self.texts.close()


def _segments(total: int, parts: int, random: np.random.RandomState) -> list[int]:
    """``total`` cut into so many lengths of at least 1, every way as likely as every other."""
    cuts = np.sort(random.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff([0, *cuts, total]).tolist()
