"""A running batch of sequences, which join it and leave it between any two tokens.

Shapes: B sequences, S tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from moe_scale.generate.sampling import Draws, Sampling, choose
from moe_scale.generate.text import TextStream, Tokenizer
from moe_scale.models.cache import CausalModel

K = TypeVar("K", bound=Hashable)
Finish = Literal["stop", "length"]
"""Why a text ended: by the end-of-text token or a stop string, or at ``max_tokens`` or the end of the context."""


@dataclass(frozen=True)
class Request:
    """A text to continue.

    Attributes:
        prompt: its tokens, at least one.
        max_tokens: tokens to draw, at most; from 1.
        sampling: how.
        stop: texts that end the continuation.
        sample: which sample of the prompt this is.
        stop_at_eot: whether the end-of-text token ends the continuation, and is no part of it.
    """

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    sample: int = 0
    stop_at_eot: bool = True


class Event(NamedTuple, Generic[K]):
    """One token of one sequence."""

    key: K
    """The sequence's."""
    token: int
    text: str
    """What can be shown of the text by now and could not before; often empty."""
    finish: Finish | None
    """Why the text ends here; None while it goes on."""


class _Row(Generic[K]):
    """A sequence in the batch."""

    def __init__(self, key: K, request: Request, tokenizer: Tokenizer, context: int):
        self.key, self.request = key, request
        self.draws = Draws(request.sampling, request.prompt, tokenizer.vocab_size, request.sample)
        self.text = TextStream(tokenizer, request.prompt, request.stop)
        self.eot_id = tokenizer.eot_id
        self.left = min(request.max_tokens, context - len(request.prompt))
        self.token = -1

    def take(self, token: int) -> Event[K]:
        self.token, self.left = token, self.left - 1
        self.draws.add(token)
        if token == self.eot_id and self.request.stop_at_eot:
            return Event(self.key, token, self.text.finish(), "stop")
        text = self.text.push(token)
        if not self.text.stopped and not self.left:
            text += self.text.finish()
        if self.text.stopped:
            return Event(self.key, token, text, "stop")
        return Event(self.key, token, text, None if self.left else "length")


class Batch(Generic[K]):
    """Sequences that get a token each at every step. Not for several threads at once.

    Args:
        model: in evaluation mode.
        tokenizer: its own; rows of the embedding beyond the tokenizer's are never drawn.
        context: tokens that a sequence may have, prompt included; a text that reaches it ends with ``length``.
        device: the model's.
    """

    def __init__(self, model: CausalModel[Any], tokenizer: Tokenizer, *, context: int, device: torch.device):
        self.model, self.tokenizer, self.device = model, tokenizer, device
        self.context = min(context, model.max_positions or context)
        self._rows: list[_Row[K]] = []
        self._state: Any = None

    def __len__(self) -> int:
        return len(self._rows)

    def step(self, new: Iterable[tuple[K, Request]] = ()) -> list[Event[K]]:
        """Let ``new`` sequences join, draw a token for each, and let go of those that end.

        Their prompts are shorter than the context. Returns an event of each sequence, none when there are none.
        """
        joining = [_Row(key, request, self.tokenizer, self.context) for key, request in new]
        logits, states = [], []
        if self._rows:
            tokens_B = torch.tensor([row.token for row in self._rows], device=self.device)
            parts = self.model.step(tokens_B, self._state)
            logits.append(parts[0])
            states.append(parts[1])
        if joining:
            parts = self.model.start(*left_padded([row.request.prompt for row in joining], self.device))
            logits.append(parts[0])
            states.append(parts[1])
        if not logits:
            return []
        self._rows += joining
        self._state = states[0] if len(states) == 1 else states[0].join(states[1])
        tokens = choose(torch.cat(logits)[:, : self.tokenizer.vocab_size], [row.draws for row in self._rows])
        events = [row.take(token) for row, token in zip(self._rows, tokens, strict=True)]
        self.drop({event.key for event in events if event.finish})
        return events

    def drop(self, keys: Collection[K]) -> None:
        """Let go of sequences, finished or not; keys that are not in the batch are passed over."""
        kept = [number for number, row in enumerate(self._rows) if row.key not in keys]
        if len(kept) == len(self._rows):
            return
        self._rows = [self._rows[number] for number in kept]
        self._state = self._state.select(torch.tensor(kept, device=self.device)) if kept else None


def left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The rows as one int64 ids_BS, padded on the left by 0, and valid_BS where there is padding."""
    width = max(map(len, rows))
    ids_BS = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
    if all(len(row) == width for row in rows):
        return ids_BS, None
    lengths_B1 = torch.tensor([[len(row)] for row in rows], device=device)
    return ids_BS, torch.arange(width, device=device) >= width - lengths_B1


def generate(batch: Batch[K], requests: Iterable[tuple[K, Request]], batch_size: int) -> Iterator[Event[K]]:
    """Continue all requests, at most ``batch_size`` at a time: as one ends the next joins."""
    waiting = iter(requests)
    while events := batch.step(islice(waiting, batch_size - len(batch))):
        yield from events
