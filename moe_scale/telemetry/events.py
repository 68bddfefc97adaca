"""What happened to a run besides its steps: ``events.jsonl`` in its folder, one JSON object a line.

``metrics.jsonl`` is rewritten when a run goes back to a checkpoint; this file only grows, so that it also tells of what
was lost. Each line has ``time`` (UTC), ``event``, ``step`` (optimizer steps done) and what belongs to its kind:

========== ===========================================================================================================
start      ``resumed``: from a checkpoint, or from nothing; ``ranks``
saved      ``seconds`` from the begin of a checkpoint to its end; ``step`` is that of the checkpoint
skipped    ``text``: why the parameters were not changed
went back  ``to``: step of the checkpoint that the run went back to; ``text``
warning    ``text``
stopped    ``text``: what ended the start before the run's end. A process that was killed writes none
finished   nothing more
========== ===========================================================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moe_scale.telemetry.records import JsonLines

EVENTS = "events.jsonl"


class Events:
    """Writes the events of a run. A context manager; an exception that leaves it is an event too.

    Args:
        run_dir: the run's folder.
        step: says how many steps are done.
        enabled: False on every rank but the first; then nothing is written.
    """

    def __init__(self, run_dir: Path, step: Callable[[], int], *, enabled: bool):
        self._file = JsonLines(run_dir / EVENTS) if enabled else None
        self._step = step

    def add(self, event: str, **facts: Any) -> None:
        """Write down an event, at the current step unless ``facts`` have another. A full disk costs the line."""
        if self._file is not None:
            now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            self._file.append({"time": now, "event": event, "step": self._step(), **facts})

    def __enter__(self) -> Events:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if kind is not None:
            said = f"exit code {error.code}" if isinstance(error, SystemExit) else " ".join(str(error).split())
            self.add("stopped", text=said[:500] or kind.__name__)
        if self._file is not None:
            self._file.close()
