"""The thread that generates: who runs, who waits, who leaves, and what happens when a step fails."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from moe_scale.generate.batch import Event, Request
from moe_scale.serve.metrics import exposition
from moe_scale.serve.scheduler import Failed, FullError, Scheduler, StoppingError

REQUEST = Request([1, 2, 3], 3)


class Batch:
    """Gives each sequence its tokens 0, 1, ..., the last of which ends it; a step waits until it is let."""

    def __init__(self) -> None:
        self.rows: dict[int, list[int]] = {}
        self.let, self.sizes, self.fail = threading.Semaphore(0), [], False  # type: ignore[var-annotated]

    def step(self, new: list[tuple[int, Request]]) -> list[Event[int]]:
        for key, request in new:
            self.rows[key] = list(range(request.max_tokens))
        if not self.rows:
            return []
        assert self.let.acquire(timeout=10)
        self.sizes.append(len(self.rows))
        if self.fail:
            self.fail = False
            self.rows.clear()
            raise RuntimeError("out of memory")
        tokens = {key: left.pop(0) for key, left in self.rows.items()}
        events = [Event(key, token, "x", None if self.rows[key] else "length") for key, token in tokens.items()]
        self.rows = {key: left for key, left in self.rows.items() if left}
        return events  # type: ignore[return-value]

    def drop(self, keys: set[int]) -> None:
        for key in keys:
            self.rows.pop(key, None)


class Served:
    """A scheduler over a :class:`Batch`, and what its listeners heard."""

    def __init__(self) -> None:
        self.batch = Batch()
        self.scheduler = Scheduler(lambda: self.batch, max_running=2, max_waiting=2)  # type: ignore[arg-type,return-value]
        self.heard: queue.Queue[tuple[str, int, Any]] = queue.Queue()

    def submit(self, name: str, *requests: Request) -> list[int]:
        return self.scheduler.submit(
            requests or [REQUEST], lambda place: lambda event: self.heard.put((name, place, event))
        )

    def step(self, events: int) -> list[tuple[str, int, Any]]:
        """Let one step happen that gives so many events."""
        self.batch.let.release()
        return [self.heard.get(timeout=10) for _ in range(events)]


@pytest.fixture
def served() -> Iterator[Served]:
    made = Served()
    made.scheduler.start()
    yield made
    made.batch.let.release(1000)
    made.scheduler.close()
    made.scheduler.join()
    assert not made.scheduler.is_alive


def test_sequences_join_and_leave_between_steps(served: Served) -> None:
    served.submit("a", REQUEST, Request([1], 1))
    served.submit("b")
    first = served.step(2)
    assert {(name, place, event.finish) for name, place, event in first} == {("a", 0, None), ("a", 1, "length")}
    assert {name for name, _, _ in served.step(2)} == {"a", "b"}, "b took the place that was free"
    assert [event.finish for _, _, event in served.step(2)] == ["length", None]
    assert [event.token for _, _, event in served.step(1)] == [2]
    figures = served.scheduler.figures
    assert (figures.running, figures.waiting, figures.steps) == (0, 0, 4)
    assert (figures.prompt_tokens, figures.generated_tokens) == (7, 7)
    text = exposition(figures, {200: 2, 499: 1}, 2)
    assert "moe_scale_generated_tokens_total 7\n" in text
    assert 'moe_scale_requests_total{status="499"} 1\n' in text
    assert all(line.startswith(("# HELP ", "# TYPE ", "moe_scale_")) for line in text.splitlines())


def test_all_of_a_request_fit_or_none(served: Served) -> None:
    served.submit("a", REQUEST, REQUEST)
    served.step(2)
    served.submit("b")
    with pytest.raises(FullError):
        served.submit("c", REQUEST, REQUEST)
    served.submit("c")
    with pytest.raises(FullError):
        served.submit("d")
    assert served.scheduler.figures.waiting == 2


def test_who_is_cancelled_hears_no_more(served: Served) -> None:
    keys = served.submit("a")
    served.step(1)
    waits = served.submit("b", REQUEST, REQUEST)
    served.scheduler.cancel([*keys, waits[1], 999])
    rest = [served.step(n) for n in (0, 1, 1, 1)]
    assert [name for events in rest for name, _, _ in events] == ["b"] * 3
    assert served.scheduler.figures.running == 0


def test_a_step_that_fails_ends_what_runs_and_nothing_else(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    served.batch.fail = True
    served.submit("a", REQUEST, REQUEST)
    served.submit("b")
    assert [event for _, _, event in served.step(2)] == [Failed("out of memory")] * 2
    assert [served.step(1)[0][2].token for _ in range(3)] == [0, 1, 2]
    assert served.scheduler.figures.failures == 1
    assert "generating failed" in caplog.text


def test_closing_ends_all_and_takes_no_more(served: Served) -> None:
    served.submit("a", REQUEST, REQUEST)
    served.step(2)
    served.submit("b")
    served.scheduler.close()
    heard = [served.heard.get(timeout=10) for _ in range(3)]
    assert {name for name, _, _ in heard} == {"a", "b"}
    assert all(event == Failed("the server is stopping", stopping=True) for _, _, event in heard)
    with pytest.raises(StoppingError):
        served.submit("c")
