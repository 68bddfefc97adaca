"""Continue sequences token by token: what is kept of them, and what a model offers to whoever generates text with it.

Rows are padded on the left, so that all of them end at the last column, whatever their lengths: the next token of
every row goes into one new column, and a batch grows, shrinks and takes in new rows between steps.

Shapes: B sequences, S tokens so far (padding included), T new ones, H key/value heads, A head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor


class KeysValues(NamedTuple):
    """Keys and values [B, H, S, A] that queries attend to; the keys are rotated already where positions are rotary."""

    keys: Tensor
    values: Tensor

    def then(self, later: KeysValues) -> KeysValues:
        """These, and after them those of later positions."""
        return KeysValues(torch.cat([self.keys, later.keys], dim=2), torch.cat([self.values, later.values], dim=2))

    def select(self, rows: Tensor) -> KeysValues:
        """Those of the batch's ``rows``, in that order."""
        return KeysValues(self.keys.index_select(0, rows), self.values.index_select(0, rows))


class State(Protocol):
    """What a model keeps of a batch of sequences. Its methods return a new one and leave this one as it is."""

    def select(self, rows: Tensor) -> Self:
        """The state of the batch's ``rows`` (int64 [n], n at least 1), in that order and as often as they are named."""
        ...

    def join(self, other: Self) -> Self:
        """The rows of this state, and after them those of ``other``, a state of the same model."""
        ...


S = TypeVar("S", bound=State)


class CausalModel(Protocol[S]):
    """A model in evaluation mode that gives the next token of sequences that it has seen so far.

    A row's logits are those of a forward pass over its tokens alone, up to rounding: neither the other rows of the
    batch, nor its padding, nor how it came to its length (by :meth:`start` or by steps, moved by ``select`` or
    ``join``) changes them. So sparse layers are dropless, and routers choose by token.
    """

    @property
    def max_positions(self) -> int | None:
        """Tokens that a sequence may have, at most; None where positions know no end."""
        ...

    def start(self, ids_BS: Tensor, valid_BS: Tensor | None = None) -> tuple[Tensor, S]:
        """Begin with the prompts.

        Args:
            ids_BS: int64 tokens, padded on the left by any ids; every row has one token at least, in the last column.
            valid_BS: bool, False for padding; None where there is none.

        Returns:
            logits [B, V] of the token after each prompt, and the state.
        """
        ...

    def step(self, ids_B: Tensor, state: S) -> tuple[Tensor, S]:
        """Append one token to every row. Returns logits [B, V] of the token after it, and the new state."""
        ...


class Past(NamedTuple):
    """A :class:`State` for models that attend: the keys and values of every layer."""

    layers: tuple[KeysValues, ...]
    valid_BS: Tensor
    """bool, False for padding: columns that no query may look at."""

    def lengths(self) -> Tensor:
        """int64 tokens of each row, which is the position (from 0) of the next one."""
        return self.valid_BS.sum(dim=1)

    def select(self, rows: Tensor) -> Past:
        """See :meth:`State.select`. Columns that are padding in all of the rows are given up."""
        valid_BS = self.valid_BS.index_select(0, rows)
        unused = valid_BS.shape[1] - int(valid_BS.sum(dim=1).max())
        return self._each(lambda kept: kept.index_select(0, rows)[:, :, unused:], valid_BS[:, unused:])

    def join(self, other: Past) -> Past:
        """See :meth:`State.join`. The shorter one is padded."""
        width = max(self.valid_BS.shape[1], other.valid_BS.shape[1])
        mine, theirs = self._padded(width), other._padded(width)
        layers = tuple(
            KeysValues(*(torch.cat(both) for both in zip(*layers, strict=True)))
            for layers in zip(mine.layers, theirs.layers, strict=True)
        )
        return Past(layers, torch.cat([mine.valid_BS, theirs.valid_BS]))

    def _padded(self, width: int) -> Past:
        """The same with ``width`` columns; what pads is zero, as no mask makes a NaN harmless."""
        missing = width - self.valid_BS.shape[1]
        if not missing:
            return self
        return self._each(lambda kept: F.pad(kept, (0, 0, missing, 0)), F.pad(self.valid_BS, (missing, 0)))

    def _each(self, change: Callable[[Tensor], Tensor], valid_BS: Tensor) -> Past:
        return Past(tuple(KeysValues(*map(change, layer)) for layer in self.layers), valid_BS)


def positions_of(valid_BS: Tensor) -> Tensor:
    """int64 position of every token within its row, from 0; 0 for padding."""
    return (valid_BS.cumsum(dim=1) - 1).clamp(min=0)
