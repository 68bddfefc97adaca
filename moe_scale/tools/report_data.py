"""What a run's folder tells: its numbers as arrays, its settings, its events; whatever state it was left in.

M sparse layers, E experts, n records.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_scale.errors import ConfigError, Problem
from moe_scale.tools.report_events import Event, events_of
from moe_scale.train.evaluation import RESTORED
from moe_scale.train.finished import Mark, read_mark

METRICS = "metrics.jsonl"
LOADS = "router/tokens_per_expert"

PARSED_WHOLE_BYTES = 12_000_000
"""Of a larger file the routers' lists, which are most of it, are read from every few records only."""


@dataclass(frozen=True)
class Series:
    """What was logged under a name.

    Attributes:
        steps: in rising order [n].
        values: NaN for what is not a number: [n], one number a layer [n, M], or one an expert [n, M, E].
    """

    steps: NDArray[np.int64]
    values: NDArray[np.float64]

    def last(self) -> float:
        """The last value of a series of numbers."""
        return float(self.values[-1])


@dataclass(frozen=True)
class RunData:
    """All that is known of a run.

    Attributes:
        name: how it is called on the page.
        facts: what ``run.json`` holds; empty without it.
        earlier: the same of earlier starts, the first one first.
        mark: how it finished; None if it has not.
        scalars, layers: series of numbers, and of one number a layer, by name.
        loads: tokens of each expert; None for a dense model.
        restored: the step whose weights it ended with, where that is not its last.
        records: lines of ``metrics.jsonl`` that were read.
        wrote: when its metrics were last written to, seconds since the epoch; None before the first record.
        notes: what its reader has to know.
    """

    name: str
    folder: Path
    facts: dict[str, Any]
    earlier: list[dict[str, Any]]
    mark: Mark | None
    events: list[Event]
    scalars: dict[str, Series]
    layers: dict[str, Series]
    loads: Series | None
    restored: int | None = None
    records: int = 0
    wrote: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def settings(self) -> dict[str, Any]:
        found = self.facts.get("settings")
        return found if isinstance(found, dict) else {}

    @property
    def last_step(self) -> int:
        return max((int(series.steps[-1]) for series in self.scalars.values()), default=0)

    @property
    def max_steps(self) -> int | None:
        found = self.settings.get("max_steps")
        return found if isinstance(found, int) else None

    def layer_names(self, count: int) -> list[str]:
        """Names of ``count`` sparse layers: their numbers in the model where ``run.json`` has them."""
        numbers = self.facts.get("sparse_layers")
        if isinstance(numbers, list) and len(numbers) == count:
            return [f"layer {n}" for n in numbers]
        return [f"sparse layer {n + 1}" for n in range(count)]


def open_runs(paths: Sequence[str]) -> list[RunData]:
    """Read the folders of runs.

    Raises:
        ConfigError: with every path that is no run, cannot be read, or is given twice.
    """
    given = [Path(path).expanduser() for path in paths]
    problems = [problem for path in given if (problem := _no_run(path))]
    real = [path.resolve() for path in given]
    problems += [Problem("RUN", f"{path} is given twice") for n, path in enumerate(given) if real[n] in real[:n]]
    runs = []
    for path, name in zip(real, _names(real), strict=True):
        if not problems:
            try:
                runs.append(read_run(path, name))
            except OSError as error:
                problems.append(Problem("RUN", f"{error.filename or path} cannot be read: {error.strerror}"))
    if problems:
        raise ConfigError(problems)
    return runs


def _no_run(path: Path) -> Problem | None:
    what = "give the folder of a run: what its recipe had as output_dir"
    if path.is_file():
        return Problem("RUN", f"{path} is a file", what)
    if not path.is_dir():
        return Problem("RUN", f"there is no folder {path}", what)
    if (path / METRICS).is_file() or (path / "run.json").is_file():
        return None
    if problem := holds_runs(path):
        return problem
    return Problem("RUN", f"{path} is no run: it has neither {METRICS} nor run.json", what)


def holds_runs(path: Path) -> Problem | None:
    """What to say of a folder that is no run, where runs are in it."""
    if (path / METRICS).exists() or (path / "run.json").exists():
        return None
    inside = sorted({found.parent for pattern in ("*", "*/*") for found in path.glob(f"{pattern}/run.json")})
    if inside:
        shown = " ".join(map(str, inside[:3])) + (" ..." if len(inside) > 3 else "")
        return Problem("RUN", f"{path} is no run, but holds {len(inside)}", f"give them: {shown}")
    return None


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest endings of paths that tell them apart."""
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def read_run(folder: Path, name: str) -> RunData:
    """Read a run's folder. What is missing or damaged is left out, and noted.

    Raises:
        OSError: if a file is there and cannot be read.
    """
    notes: list[str] = []
    facts = _json(folder / "run.json", notes)
    if not facts and not notes:
        notes.append("There is no run.json: settings, device and commit are not known.")
    numbered = [folder / f"run.{n}.json" for n in range(1, 1000)]
    earlier = [_json(path, notes) for path in numbered if path.is_file()]
    columns = read_metrics(folder / METRICS, notes)
    scalars, layers, loads = columns.series()
    path = folder / METRICS
    return RunData(
        name=name,
        folder=folder,
        facts=facts,
        earlier=earlier,
        mark=read_mark(folder),
        events=events_of(folder, [*earlier, facts], scalars.get("skipped_steps")),
        scalars=scalars,
        layers=layers,
        loads=loads.get(LOADS),
        restored=columns.restored,
        records=columns.records,
        wrote=path.stat().st_mtime if path.is_file() else None,
        notes=notes,
    )


def _json(path: Path, notes: list[str]) -> dict[str, Any]:
    """An object from a file; empty where there is none, and with a note where it is not whole."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        notes.append(f"{path.name} is damaged, and left out.")
        return {}
    return found


# --- metrics.jsonl ---------------------------------------------------------------------------------------------------


class Columns:
    """Takes in records in the order of the file, and keeps of each name what was logged last for each step.

    A run that goes back to a checkpoint logs steps again: what it overtakes, all that was logged before for a later
    step than one that follows, is left out.
    """

    def __init__(self) -> None:
        self.restored: int | None = None
        self._steps: list[int] = []
        self._rows: dict[tuple[str, ...], tuple[list[int], list[tuple[Any, ...]]]] = {}
        """By the names of a record: the numbers of such records in the file, and their values."""

    def add(self, record: Mapping[str, Any]) -> None:
        """Take in a record.

        Raises:
            ValueError: if it has no step.
        """
        step = record.get("step")
        if type(step) is not int or not 0 <= step < 1 << 62:
            raise ValueError("no step")
        if isinstance(restored := record.get(RESTORED), int):
            self.restored = restored  # and the rest of it is of that step, repeated
            return
        numbers, values = self._rows.setdefault(tuple(record), ([], []))
        numbers.append(len(self._steps))
        values.append(tuple(record.values()))
        self._steps.append(step)

    @property
    def records(self) -> int:
        return len(self._steps)

    @property
    def replaced(self) -> int:
        """Records of an earlier life of the run that a later one overtook."""
        return int((~self._kept()).sum())

    def _kept(self) -> NDArray[np.bool_]:
        steps = np.array(self._steps, dtype=np.int64)
        least_from_here = np.minimum.accumulate(steps[::-1])[::-1]
        return steps <= least_from_here

    def series(self) -> tuple[dict[str, Series], dict[str, Series], dict[str, Series]]:
        """The columns by name: numbers, lists of numbers, and lists of lists. Those without any number are left out."""
        kept, steps = self._kept(), np.array(self._steps, dtype=np.int64)
        found: tuple[dict[str, list[Any]], ...] = ({}, {}, {})
        for names, (rows_at, rows) in self._rows.items():
            places = np.array(rows_at)
            for name, column in zip(names, zip(*rows, strict=True), strict=True):
                for depth, which, values in _by_depth(column):
                    here = places if which is None else places[which]
                    found[depth].setdefault(name, []).append((here[kept[here]], values[kept[here]]))
        joined = [{name: _joined(parts, steps) for name, parts in some.items()} for some in found]
        numbers, lists, tables = ({n: s for n, s in some.items() if np.isfinite(s.values).any()} for some in joined)
        numbers.pop("step", None)
        return numbers, lists, tables


def _by_depth(column: Sequence[Any]) -> Iterator[tuple[int, NDArray[np.int64] | None, NDArray[np.float64]]]:
    """What of a column is numbers (0), lists (1) and lists of lists (2): where, None for all of it, and as an array.

    Lists are those of the shape that came last.
    """
    try:
        values = np.array(column, dtype=np.float64)  # None becomes NaN
    except (ValueError, TypeError):  # of several kinds, or text
        arrays = [(n, array) for n, value in enumerate(column) if (array := _array(value)) is not None]
        shapes = {array.ndim: array.shape for _, array in arrays}
        for depth, shape in shapes.items():
            alike = [(n, array) for n, array in arrays if array.shape == shape]
            yield depth, np.array([n for n, _ in alike]), _finite(np.stack([array for _, array in alike]))
        return
    if values.ndim <= 3 and values.size:
        yield values.ndim - 1, None, _finite(values)


def _array(value: Any) -> NDArray[np.float64] | None:
    try:
        array = np.array(value, dtype=np.float64)
    except (ValueError, TypeError):
        return None
    return array if array.ndim <= 2 and array.size and not isinstance(value, str) else None


def _finite(values: NDArray[np.float64]) -> NDArray[np.float64]:
    values[~np.isfinite(values)] = np.nan
    return values


def _joined(parts: Sequence[tuple[NDArray[np.int64], NDArray[np.float64]]], steps: NDArray[np.int64]) -> Series:
    """Parts of a column in the order of their steps; of a step that comes twice, what the file has last."""
    shape = parts[-1][1].shape[1:]
    alike = [part for part in parts if part[1].shape[1:] == shape]
    places = np.concatenate([places for places, _ in alike])
    values = np.concatenate([values for _, values in alike])
    order = np.argsort(places)
    at, values = steps[places[order]], values[order]  # rising, but for equal ones
    last = np.append(at[1:] != at[:-1], True) if len(at) else np.zeros(0, dtype=bool)
    return Series(at[last], values[last])


def read_metrics(path: Path, notes: list[str]) -> Columns:
    """Read ``metrics.jsonl``; none is an empty one. A line that is no record is left out, and noted.

    All numbers of all records are read. Lists of the routers are read from every record of a small file, and from every
    few of a large one.
    """
    columns, damaged, cut_short = Columns(), 0, False
    if not path.is_file():
        return columns
    size = path.stat().st_size
    stride = max(1, math.ceil(size / PARSED_WHOLE_BYTES))
    with open(path, "rb") as file:
        place = 0
        for number, line in enumerate(file):
            place += len(line)
            whole = number % stride == 0 or place > size - PARSED_WHOLE_BYTES // 20
            try:
                columns.add(_record(line, whole=whole))
            except (ValueError, RecursionError):
                if line.strip():
                    damaged += 1
                    cut_short = not line.endswith(b"\n")
    if cut_short:
        notes.append("The last line of metrics.jsonl is cut short, as a run that was killed leaves it; it is left out.")
    if damaged - cut_short:
        notes.append(f"{damaged - cut_short} damaged lines of metrics.jsonl are left out.")
    if columns.replaced:
        notes.append(f"{columns.replaced:,} records are left out that the run overtook when it was resumed.")
    if stride > 1:
        notes.append(f"Values of single layers and experts are read from one record in {stride}; all others from all.")
    return columns


def _record(line: bytes, *, whole: bool) -> dict[str, Any]:
    try:
        found = json.loads(line if whole else _without_router_lists(line))
    except ValueError:
        found = json.loads(line)
    if not isinstance(found, dict):
        raise ValueError("no object")
    return found if line.count(b"{") == 1 else _without_nesting(found)


def _without_router_lists(line: bytes) -> bytes:
    """A record as it is written, without the values of the routers, where these stand together; else as it is."""
    begin, end = line.find(b'"router/'), line.rfind(b"]]") + 4
    together = 0 < begin < end and line.count(b'": ', begin, end) == line.count(b'"router/', begin, end)
    return line[:begin] + line[end:] if together and line[end - 2 : end] == b", " else line


def _without_nesting(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _without_nesting(value, f"{prefix}{name}/") if isinstance(value, dict) else {prefix + name: value}
    return found
