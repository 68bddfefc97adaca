"""``events.jsonl``: what happened to a run, in the order in which it happened."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from moe_scale.telemetry.events import EVENTS, Events


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / EVENTS).read_text().splitlines()]


def test_events_have_a_time_and_the_step_of_the_run(tmp_path: Path) -> None:
    step = 3
    with Events(tmp_path, lambda: step, enabled=True) as events:
        events.add("start", resumed=False)
        step = 5
        events.add("skipped", text="the loss is not a number")
        events.add("saved", step=4, seconds=0.5)
    found = lines(tmp_path)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", event.pop("time")) for event in found)
    assert found == [
        {"event": "start", "step": 3, "resumed": False},
        {"event": "skipped", "step": 5, "text": "the loss is not a number"},
        {"event": "saved", "step": 4, "seconds": 0.5},
    ]


def test_a_later_start_goes_on_with_the_file_even_after_a_line_cut_short(tmp_path: Path) -> None:
    (tmp_path / EVENTS).write_text('{"event": "start", "step": 0}\n{"event": "sa')
    with Events(tmp_path, lambda: 7, enabled=True) as events:
        events.add("start", resumed=True)
    *_, cut, last = (tmp_path / EVENTS).read_text().splitlines()
    assert cut == '{"event": "sa'
    assert json.loads(last)["step"] == 7


def test_what_ends_a_start_is_an_event(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), Events(tmp_path, lambda: 2, enabled=True):
        raise RuntimeError("no\n  memory")
    with pytest.raises(KeyboardInterrupt), Events(tmp_path, lambda: 2, enabled=True):
        raise KeyboardInterrupt
    with pytest.raises(SystemExit), Events(tmp_path, lambda: 2, enabled=True):
        raise SystemExit(2)
    assert [(event["event"], event["text"]) for event in lines(tmp_path)] == [
        ("stopped", "no memory"),
        ("stopped", "KeyboardInterrupt"),
        ("stopped", "exit code 2"),
    ]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with Events(tmp_path, lambda: 0, enabled=False) as events:
        events.add("start")
    assert list(tmp_path.iterdir()) == []
