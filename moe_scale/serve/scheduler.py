"""The thread that generates: requests wait in a line, join the running batch between two tokens, and leave it again."""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from moe_scale.generate.batch import Batch, Event, Request

logger = logging.getLogger(__name__)


class FullError(Exception):
    """There are as many sequences waiting as may."""


class StoppingError(Exception):
    """No more sequences are taken."""


@dataclass(frozen=True)
class Failed:
    """What a listener hears in place of events when there will be none; nothing follows."""

    reason: str
    stopping: bool = False
    """Whether that is because the scheduler was closed; else a step went wrong."""


Listener = Callable[[Event[int] | Failed], None]


@dataclass
class Figures:
    """What is going on, and what was done since the start."""

    running: int = 0
    """Sequences in the batch."""
    waiting: int = 0
    """Sequences that wait to join."""
    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    """Forward passes of the batch."""
    failures: int = 0
    """Steps that went wrong, with which all running sequences ended."""


class Scheduler:
    """Continuous batching in a thread of its own. Its methods may be called from any thread.

    Args:
        make_batch: gives an empty batch.
        max_running: sequences in the batch, at most.
        max_waiting: sequences that wait for a place in it, at most.
    """

    def __init__(self, make_batch: Callable[[], Batch[int]], *, max_running: int, max_waiting: int):
        self.max_running, self.max_waiting = max_running, max_waiting
        self._make_batch, self._batch = make_batch, make_batch()
        self._keys = itertools.count()
        self._lock = threading.Condition()
        self._waiting: deque[tuple[int, Request]] = deque()
        self._running: set[int] = set()
        self._listeners: dict[int, Listener] = {}
        """Of all sequences that wait or run; a cancelled one has none."""
        self._stopping = False
        self._figures = Figures()
        self._thread = threading.Thread(target=self._run, name="generate", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Take no more sequences and end those that there are; their listeners hear of it."""
        with self._lock:
            self._stopping = True
            self._waiting.clear()
            for listener in self._listeners.values():
                listener(Failed("the server is stopping", stopping=True))
            self._listeners.clear()
            self._lock.notify()

    def join(self) -> None:
        """Wait for the thread of a closed scheduler."""
        self._thread.join()

    def submit(self, requests: Sequence[Request], listener: Callable[[int], Listener]) -> list[int]:
        """Line up all of the requests, or none.

        Args:
            listener: gives for the place of a request in ``requests`` who hears of its events, in the scheduler's
                thread. It must not wait.

        Returns:
            their keys, for :meth:`cancel`.

        Raises:
            FullError: when there are too many waiting already.
            StoppingError: after :meth:`close`.
        """
        with self._lock:
            if self._stopping:
                raise StoppingError
            free = self.max_running - len(self._running)
            if len(self._waiting) + len(requests) > self.max_waiting + free:
                raise FullError
            keys = [next(self._keys) for _ in requests]
            for place, (key, request) in enumerate(zip(keys, requests, strict=True)):
                self._listeners[key] = listener(place)
                self._waiting.append((key, request))
            self._lock.notify()
        return keys

    def cancel(self, keys: Collection[int]) -> None:
        """Let go of sequences, whose listeners hear no more; keys of finished ones are passed over."""
        with self._lock:
            for key in keys:
                self._listeners.pop(key, None)
            self._waiting = deque(pair for pair in self._waiting if pair[0] in self._listeners)

    @property
    def figures(self) -> Figures:
        with self._lock:
            return replace(self._figures, running=len(self._running), waiting=len(self._waiting))

    @property
    def is_alive(self) -> bool:
        """Whether the thread is there to generate."""
        return self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._stopping or self._waiting or self._running)
                if self._stopping:
                    return
                gone = {key for key in self._running if key not in self._listeners}
                self._running -= gone
                free = self.max_running - len(self._running)
                joining = [self._waiting.popleft() for _ in range(min(len(self._waiting), free))]
                self._running |= {key for key, _ in joining}
            try:
                self._batch.drop(gone)
                events: list[Event[int]] = self._batch.step(joining)
            except Exception as error:  # of whatever kind, the server has others to serve
                logger.exception("generating failed")
                self._fail(str(error).strip() or type(error).__name__)
            else:
                self._tell(events, joining)

    def _tell(self, events: Sequence[Event[int]], joined: Sequence[tuple[int, Request]]) -> None:
        with self._lock:
            self._figures.steps += 1
            self._figures.generated_tokens += len(events)
            self._figures.prompt_tokens += sum(len(request.prompt) for _, request in joined)
            for event in events:
                listener = self._listeners.get(event.key)
                if event.finish:
                    self._running.discard(event.key)
                    self._listeners.pop(event.key, None)
                if listener is not None:
                    listener(event)

    def _fail(self, reason: str) -> None:
        self._batch = self._make_batch()
        with self._lock:
            self._figures.failures += 1
            for key in self._running:
                if (listener := self._listeners.pop(key, None)) is not None:
                    listener(Failed(reason))
            self._running.clear()
