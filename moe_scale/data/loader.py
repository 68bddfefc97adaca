"""What every loader of training batches can do."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

from moe_scale.errors import ConfigError, Problem

BatchT = TypeVar("BatchT")


class TrainLoader(abc.ABC, Generic[BatchT]):
    """An endless iterator of training batches that can save and restore its exact position.

    ``state_dict()`` is JSON-serialisable and describes the batches handed out, not those prefetched. After
    ``load_state_dict(state)`` the next batch is, bit for bit, the one that would have followed.
    """

    def __iter__(self) -> Iterator[BatchT]:
        return self

    @abc.abstractmethod
    def __next__(self) -> BatchT: ...

    @abc.abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch handed out."""

    @abc.abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``.

        Raises:
            ConfigError: when the state belongs to other data or to another order of it.
        """

    def close(self) -> None:
        """End worker processes, if there are any; the loader can still be asked for its state."""


def require_same(state: dict[str, Any], identity: dict[str, Any]) -> None:
    """Refuse a state of another order of the data, and say what differs."""
    differing = [key for key in identity if state.get(key) != identity[key]]
    if differing:
        what = ", ".join(f"{key} was {state.get(key)!r} and is {identity[key]!r}" for key in differing)
        raise ConfigError(
            Problem(
                "resume",
                f"the checkpoint's position in the data does not fit this run: {what}",
                "continue with the settings and data it was saved with, or start a new run",
            )
        )
