"""What happened to a run beside its steps, from ``events.jsonl`` or, without it, from what else a run leaves."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_scale.checkpoint import folder as folders
from moe_scale.telemetry.events import EVENTS

if TYPE_CHECKING:
    from moe_scale.tools.report_data import Series


@dataclass(frozen=True)
class Event:
    """Something that happened; ``time`` is empty and ``step`` None where it is not known."""

    time: str
    kind: str
    step: int | None
    text: str


def events_of(folder: Path, starts: Sequence[Mapping[str, Any]], skipped: Series | None) -> list[Event]:
    """What happened to a run.

    Args:
        starts: the records ``run.json`` of all its starts.
        skipped: steps skipped so far, as logged.
    """
    path = folder / EVENTS
    told = list(_events(path)) if path.is_file() else []
    return told or _events_without_their_file(folder, starts, skipped)


def _events(path: Path) -> Iterator[Event]:
    for line in path.read_bytes().splitlines():
        try:
            found = json.loads(line)
            kind, step, time = str(found["event"]), int(found["step"]), str(found["time"])
        except (ValueError, KeyError, TypeError):
            continue
        text = str(found.get("text", ""))
        if kind == "start":
            ranks = found.get("ranks")
            text = ("continues from a checkpoint" if found.get("resumed") else "from the beginning") + (
                f", on {ranks} ranks" if isinstance(ranks, int) and ranks > 1 else ""
            )
        elif kind == "saved" and isinstance(found.get("seconds"), int | float):
            text = f"in {found['seconds']:.1f} s"
        yield Event(time, kind, step, text)


def _events_without_their_file(
    folder: Path, starts: Sequence[Mapping[str, Any]], skipped: Series | None
) -> list[Event]:
    """What other files tell of a run without ``events.jsonl``: starts, skipped steps, and the saves still there."""
    found = [
        Event(
            str(start.get("started", "")), "start", 0 if n == 0 else None, "from the beginning" if n == 0 else "again"
        )
        for n, start in enumerate(starts)
        if start
    ]
    if skipped is not None:
        before = 0.0
        for step, count in zip(skipped.steps, skipped.values, strict=True):
            if count > before:
                found.append(Event("", "skipped", int(step), f"{count - before:.0f}, at this step or shortly before"))
            before = count
    for path in folders.complete(folder):
        saved = datetime.fromtimestamp(path.stat().st_mtime, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        found.append(Event(saved, "saved", folders.step_of(path), ""))
    return sorted(found, key=lambda event: event.step or 0)
