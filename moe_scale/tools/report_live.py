"""A run that goes on, in the terminal: its last loss, evaluation and speed, and the load of its experts by layer."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from moe_scale.errors import ConfigError, Problem
from moe_scale.telemetry.events import EVENTS
from moe_scale.telemetry.progress import format_seconds
from moe_scale.telemetry.terminal import Console
from moe_scale.tools.report_data import METRICS, holds_runs
from moe_scale.train.finished import read_mark

SPARKS = "▁▂▃▄▅▆▇█"
SPARK_POINTS = 40
LAST_EVENTS = 4


class Tail:
    """The whole lines of a file as they come, as JSON objects. A file that got shorter, or another one under its name,
    is read from its beginning."""

    def __init__(self, path: Path):
        self.path = path
        self._place, self._inode = 0, -1

    def new(self) -> tuple[list[dict[str, Any]], bool]:
        """The records since the last call, and whether they are of the beginning: those before do not hold any more."""
        try:
            with open(self.path, "rb") as file:
                found = self.path.stat()
                afresh = found.st_ino != self._inode or found.st_size < self._place
                self._inode = found.st_ino
                self._place = 0 if afresh else self._place
                file.seek(self._place)
                whole, end, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return [], False
        except OSError as error:
            raise ConfigError(Problem("RUN", f"{self.path} cannot be read: {error.strerror}")) from None
        self._place += len(whole) + len(end)
        records = []
        for line in whole.splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and type(record.get("step")) is int:
                records.append(record)
        return records, afresh


@dataclass
class Seen:
    """What is known of the run so far."""

    losses: list[float] = field(default_factory=list)
    train: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    best: tuple[float, int] | None = None

    def take_in(self, record: dict[str, Any]) -> None:
        """Take in a record of ``metrics.jsonl``."""
        if isinstance(loss := record.get("lm_loss"), int | float):
            self.losses.append(float(loss))
        if "loss" in record:
            self.train = record
        if any(name.startswith("eval/") for name in record):
            self.evaluation = record
            held = record.get("eval/loss")
            if isinstance(held, int | float) and (self.best is None or held < self.best[0]):
                self.best = (float(held), int(record.get("step", 0)))


def follow(
    path: str,
    interval_s: float,
    *,
    console: Any = None,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.time,
) -> str:
    """Show a run until it has finished or stopped, and return how it ended. Ctrl-C ends the view alone.

    Where standard output is no terminal, a line is printed for each look that found something new.

    Args:
        path: the run's folder; it may have no record yet.
        interval_s: seconds between two looks.

    Raises:
        ConfigError: if there is no such folder, it holds runs and is none, or its files cannot be read.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ConfigError(Problem("RUN", f"there is no folder {folder}", "give the output_dir of a run"))
    if problem := holds_runs(folder):
        raise ConfigError(problem)
    console = console or Console()
    view = _View(folder, clock)
    try:
        if console.is_terminal:
            ended = view.look()
            with Live(view.picture(), console=console, auto_refresh=False) as live:
                while not ended:
                    sleep(interval_s)
                    ended = view.look()
                    live.update(view.picture(), refresh=True)
        else:
            while True:
                before = view.line()
                ended = view.look()
                if view.line() != before:
                    console.print(view.line(), markup=False, highlight=False, soft_wrap=True)
                if ended:
                    break
                sleep(interval_s)
    except KeyboardInterrupt:
        console.print("left; the run goes on by itself", markup=False)
        return ""
    console.print(view.end, markup=False, highlight=False, soft_wrap=True)
    return view.end


class _View:
    def __init__(self, folder: Path, clock: Callable[[], float]):
        self.folder, self.clock = folder, clock
        self.end = ""
        self.seen = Seen()
        self.events: list[dict[str, Any]] = []
        self._metrics, self._events = Tail(folder / METRICS), Tail(folder / EVENTS)
        self._facts: dict[str, Any] = {}
        self._wrote = 0.0

    def look(self) -> bool:
        """Read what is new. Returns whether the run has come to its end."""
        # Before the records: those of the end are there once this is.
        mark = read_mark(self.folder)
        events, afresh = self._events.new()
        self.events = events if afresh else [*self.events, *events]
        records, afresh = self._metrics.new()
        if afresh:
            self.seen = Seen()
        for record in records:
            self.seen.take_in(record)
        if records or not self._facts:
            self._read_facts()
        ends = [event for event in self.events if event.get("event") in ("start", "stopped")]
        if mark is not None:
            early = ", stopped early" if mark.stopped_early else ""
            self.end = f"{self.folder} has finished, at step {mark.step:,}{early}"
        elif ends and ends[-1]["event"] == "stopped":
            self.end = f"{self.folder} has stopped: {ends[-1].get('text', '')}"
        return bool(self.end)

    def _read_facts(self) -> None:
        try:
            self._wrote = (self.folder / METRICS).stat().st_mtime
            found = json.loads((self.folder / "run.json").read_bytes())
            self._facts = found if isinstance(found, dict) else {}
        except (OSError, ValueError):
            self._facts = {}

    @property
    def _most(self) -> int | None:
        settings = self._facts.get("settings")
        most = settings.get("max_steps") if isinstance(settings, dict) else None
        return most if isinstance(most, int) else None

    def line(self) -> str:
        """All in one line."""
        train = self.seen.train
        if not train:
            return f"{self.folder.name}: no step is logged yet"
        parts = [
            f"step {train['step']:,}" + (f"/{self._most:,}" if self._most else ""),
            f"loss {_text(train, 'lm_loss', '.4f')}",
        ]
        if "eval/loss" in self.seen.evaluation:
            parts.append(f"held out {_text(self.seen.evaluation, 'eval/loss', '.4f')}")
        parts.append(f"{_text(train, 'tokens_per_s', ',.0f')} tokens/s")
        if loads := _numbers(train.get("router/load_max")):
            parts.append(f"fullest expert {max(loads):.1f}x")
        return "  ".join(parts)

    def picture(self) -> RenderableType:
        """All that is known, for a terminal."""
        train, evaluation = self.seen.train, self.seen.evaluation
        head = Text(self.folder.name, style="bold")
        if not train:
            return Group(
                head, Text(f"no step is logged yet in {self.folder / METRICS}", style="dim"), *self._last_events()
            )
        age = max(0.0, self.clock() - self._wrote)
        head.append(f"  step {train['step']:,}" + (f" of {self._most:,}" if self._most else ""), style="none")
        head.append(f"  last record {age:.0f} s ago", style="dim")
        table = Table.grid(padding=(0, 2))
        table.add_row("loss", _text(train, "lm_loss", ".4f"), Text(spark(self.seen.losses), style="cyan"))
        if evaluation:
            best = f"best {self.seen.best[0]:.4f} at step {self.seen.best[1]:,}" if self.seen.best else ""
            table.add_row(f"held out, step {evaluation.get('step', 0):,}", _text(evaluation, "eval/loss", ".4f"), best)
            for name in ("eval/bleu", "eval/accuracy"):
                if name in evaluation:
                    table.add_row(name, _text(evaluation, name, ".4f"))
        table.add_row("tokens/s", _text(train, "tokens_per_s", ",.0f"), self._left())
        if "mfu" in train:
            table.add_row("MFU", _text(train, "mfu", ".1%"))
        table.add_row("gradient norm", _text(train, "grad_norm", ".3f"))
        if train.get("skipped_steps"):
            table.add_row("steps skipped", _text(train, "skipped_steps", ",.0f"))
        return Group(head, table, *self._loads(), *self._last_events())

    def _left(self) -> str:
        seconds = self.seen.train.get("step_time_s")
        if not self._most or not isinstance(seconds, int | float):
            return ""
        return f"{format_seconds((self._most - self.seen.train['step']) * seconds)} of training left"

    def _loads(self) -> list[RenderableType]:
        """A bar a layer: the load of its fullest expert over the even one."""
        train = self.seen.train
        loads = _numbers(train.get("router/load_max"))
        if not loads:
            return []
        numbers = self._facts.get("sparse_layers")
        names = numbers if isinstance(numbers, list) and len(numbers) == len(loads) else range(1, len(loads) + 1)
        dropped = _numbers(train.get("router/dropped"))
        table = Table.grid(padding=(0, 2))
        table.add_row(
            Text("layer", style="dim"), Text("fullest expert, 1 is even", style="dim"), "", Text("dropped", style="dim")
        )
        scale = 24 / max(4.0, *loads)
        for n, (name, load) in enumerate(zip(names, loads, strict=True)):
            style = "green" if load < 2 else "yellow" if load < 4 else "red"
            lost = f"{dropped[n]:.1%}" if n < len(dropped) and dropped[n] else ""
            table.add_row(str(name), Text("█" * max(1, round(load * scale)), style=style), f"{load:.1f}x", lost)
        return [table]

    def _last_events(self) -> list[RenderableType]:
        kinds = ("skipped", "warning", "went back", "saved", "stopped")
        told = [event for event in self.events if event.get("event") in kinds][-LAST_EVENTS:]
        return [
            Text(
                f"{e.get('event')} at step {e.get('step')}  {e.get('text', '')}",
                style="dim",
                overflow="ellipsis",
                no_wrap=True,
            )
            for e in told
        ]


def spark(values: list[float], points: int = SPARK_POINTS) -> str:
    """A line of blocks: the last values, of many the means of stretches."""
    values = [value for value in values if value == value]
    size = -(-len(values) // points) or 1
    means = [sum(values[n : n + size]) / len(values[n : n + size]) for n in range(0, len(values), size)]
    if not means:
        return ""
    low, high = min(means), max(means)
    return "".join(SPARKS[round((value - low) / (high - low or 1) * (len(SPARKS) - 1))] for value in means)


def _text(record: dict[str, Any], name: str, form: str) -> str:
    value = record.get(name)
    return format(value, form) if isinstance(value, int | float) else "not a number" if name in record else "-"


def _numbers(value: Any) -> list[float]:
    return [float(v) for v in value if isinstance(v, int | float)] if isinstance(value, list) else []
