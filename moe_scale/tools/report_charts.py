"""Which charts a report has, from what its runs logged, and how long series are made short.

A chart of one run has a line for each series that belongs together; of several runs, a line a run of one series.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_scale.tools.report_data import RunData, Series
from moe_scale.tools.report_events import Event

POINTS = 300
"""Points of a line, at most twice as many; longer series are drawn as means with the range around them."""

COLUMNS = 160
"""Columns of a heatmap, at most twice as many."""


@dataclass(frozen=True)
class Short:
    """A series of numbers with at most ``2 * POINTS`` points.

    Attributes:
        steps: mean of the steps that a point stands for.
        values: mean of their values.
        low, high: the least and the greatest of them; None where every point is one step.
        last: the last value that is a number; None without any.
        per_point: steps that a point stands for.
    """

    steps: NDArray[np.float64]
    values: NDArray[np.float64]
    low: NDArray[np.float64] | None
    high: NDArray[np.float64] | None
    last: float | None
    per_point: int


def shorten(series: Series, points: int = POINTS) -> Short:
    """Means over stretches of as many records each, with their least and greatest value. Only numbers count."""
    length = len(series.steps)
    known = np.isfinite(series.values)
    last = float(series.values[known][-1]) if known.any() else None
    if length <= 2 * points:
        return Short(series.steps.astype(float), series.values, None, None, last, 1)
    size = -(-length // points)
    edges = np.arange(0, length, size)
    counts = np.add.reduceat(known.astype(float), edges)
    sums = np.add.reduceat(np.where(known, series.values, 0.0), edges)
    low = np.minimum.reduceat(np.where(known, series.values, np.inf), edges)
    high = np.maximum.reduceat(np.where(known, series.values, -np.inf), edges)
    steps = np.add.reduceat(series.steps.astype(float), edges) / np.diff([*edges, length])
    some = counts > 0
    means = np.where(some, sums / np.maximum(counts, 1), np.nan)
    return Short(steps, means, np.where(some, low, np.nan), np.where(some, high, np.nan), last, size)


def shorten_columns(series: Series, columns: int = COLUMNS) -> Series:
    """The same for values of layers or experts: means over stretches, without what is no number."""
    length = len(series.steps)
    if length <= 2 * columns:
        return series
    edges = np.arange(0, length, -(-length // columns))
    known = np.isfinite(series.values)
    counts = np.add.reduceat(known.astype(float), edges)
    sums = np.add.reduceat(np.where(known, series.values, 0.0), edges)
    values = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    return Series(series.steps[edges], values)


# --- which charts ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A line of a chart: its label, its data, and the number of its colour."""

    label: str
    short: Short
    colour: int


@dataclass(frozen=True)
class Chart:
    """What is drawn in one frame.

    Attributes:
        name: of its file.
        note: one line under the title: what it is, in which unit.
        wide: whether it takes a whole row.
        log: whether its values are on a logarithmic axis, which needs all of them above 0.
        marks: events that are shown in it.
    """

    name: str
    title: str
    note: str
    lines: tuple[Line, ...]
    wide: bool = False
    log: bool = False
    marks: tuple[Event, ...] = ()

    @property
    def is_point(self) -> bool:
        """Whether there is nothing to draw: no line has a second point."""
        return all(len(line.short.steps) < 2 for line in self.lines)


@dataclass(frozen=True)
class Group:
    """Series that belong into one chart of a single run.

    Attributes:
        keys: their names; one that ends in ``*`` stands for all with that beginning.
    """

    title: str
    note: str
    keys: tuple[str, ...]
    log: bool = False
    wide: bool = False


@dataclass(frozen=True)
class Section:
    """A heading and what belongs under it."""

    title: str
    groups: tuple[Group, ...]


HELD_OUT = "on held-out data"
GREEDILY = "of held-out sentences, translated greedily"
AVERAGED = "unweighted, averaged over layers"

SECTIONS = (
    Section(
        "Loss",
        (
            Group("Loss", "of training, without router losses; and held out", ("lm_loss", "eval/loss"), wide=True),
            Group("Parts of the loss", "each unweighted", ("loss/*",)),
        ),
    ),
    Section(
        "Evaluation",
        (
            Group("Perplexity", HELD_OUT, ("eval/perplexity",)),
            Group("Bits per byte", HELD_OUT, ("eval/bits_per_byte",)),
            Group("BLEU", GREEDILY, ("eval/bleu", "eval/bleu/*")),
            Group("chrF", GREEDILY, ("eval/chrf", "eval/chrf/*")),
            Group("Accuracy and F1", HELD_OUT, ("eval/accuracy", "eval/f1")),
            Group("Calibration error", f"expected (ECE), {HELD_OUT}", ("eval/ece",)),
            Group("Recall at 1, text to image", "0 to 1", ("eval/text_to_image_r1", "eval/text_to_image_r1/*")),
            Group("Recall at 1, image to text", "0 to 1", ("eval/image_to_text_r1", "eval/image_to_text_r1/*")),
            Group("Attention sink", "share of attention that goes to the first token", ("eval/sink_share",)),
        ),
    ),
    Section(
        "Router losses",
        (
            Group("Balancing loss", f"{AVERAGED}; 1 is even", ("aux_loss",)),
            Group("Router z-loss", AVERAGED, ("z_loss",)),
            Group("Loss with router losses", "what the optimizer sees", ("loss",)),
        ),
    ),
    Section(
        "Optimization",
        (
            Group("Learning rate", "of the step", ("lr",)),
            Group("Gradient norm", "before clipping, of all and by part", ("grad_norm", "grad_norm/*"), log=True),
            Group("Weight norm", "L2, at evaluations, by part", ("weight_norm/*",), log=True),
            Group("Loss scale", "of fp16", ("loss_scale",), log=True),
            Group("Steps skipped", "so far", ("skipped_steps",)),
        ),
    ),
    Section(
        "Speed and memory",
        (
            Group("Throughput", "tokens a second, over all ranks", ("tokens_per_s",)),
            Group("Time of a step", "seconds, the median of the window", ("step_time_s",)),
            Group("MFU", "share of the devices' peak FLOP/s", ("mfu",)),
            Group("Memory", "peak of rank 0, in GiB", ("memory_bytes",)),
        ),
    ),
)

LABELS = {"lm_loss": "training", "eval/loss": "held out"}
"""What a line is called among those of its chart, where that is not the end of its name."""

ALONE = {"lm_loss": ("Training loss", "without router losses"), "eval/loss": ("Held-out loss", HELD_OUT)}
"""Title and note of a series of a group that has a chart for itself."""

OTHER = "Other"
NOT_SHOWN = ("tokens", "flops", "epoch", "tokens_per_s_per_device", "eval/unigram_entropy")
COUNTS = ("eval/tokens", "eval/targets", "eval/examples")
"""Scalars without a chart: what rises with the steps alone, and what an evaluation was made of."""

SCALES = {"memory_bytes": 2.0**-30}

LOG_FROM = 10.0
"""Ratio of the greatest to the smallest value from which a logarithmic axis says more than a linear one."""

MARKED = ("start", "skipped", "went back", "warning", "stopped")
MAX_MARKS = 200


def charts_of(runs: Sequence[RunData]) -> list[tuple[str, list[Chart]]]:
    """The charts of all sections that have any, under the sections' titles."""
    seen = {*NOT_SHOWN, *COUNTS}
    found = []
    for section in SECTIONS:
        charts = [chart for group in section.groups for chart in _charts(group, runs, seen)]
        found.append((section.title, charts))
    names = sorted({name for run in runs for name in run.scalars} - seen)
    evaluated = [name for name in names if name.startswith("eval/")]
    others = [name for name in names if not name.startswith("eval/")]
    for title, rest in (("Evaluation", evaluated), (OTHER, others)):
        more = [chart for group in _families(rest) for chart in _charts(group, runs, seen)]
        same = next((charts for name, charts in found if name == title), None)
        if same is None:
            found.append((title, more))
        else:
            same += more
    return [(title, charts) for title, charts in found if charts]


def _families(names: Sequence[str]) -> list[Group]:
    """Groups of names that no section knows: those alike but for what follows their second ``/``."""
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault("/".join(name.split("/")[:2]), []).append(name)
    return [Group(family, "as logged", tuple(members)) for family, members in families.items()]


def _charts(group: Group, runs: Sequence[RunData], seen: set[str]) -> list[Chart]:
    keys = _keys(group, runs)
    seen |= set(keys)
    if group.keys == ("loss/*",) and len(keys) < 2:
        return []  # the one part is the loss
    if group.keys == ("skipped_steps",) and not any(
        run.scalars[k].values.max() for run in runs for k in keys if k in run.scalars
    ):
        return []
    if len(runs) == 1:
        lines = [_line(_label(key, keys), runs[0].scalars[key], key, n) for n, key in enumerate(keys)]
        marks = _marks(runs[0]) if group.wide else ()
        chart = _chart(group, group.title, group.note, keys[0] if keys else "", lines, marks)
        return [chart] if lines else []
    charts = []
    for key in keys:
        lines = [_line(run.name, run.scalars[key], key, n) for n, run in enumerate(runs) if key in run.scalars]
        title, note = group.title, group.note
        if key in ALONE:
            title, note = ALONE[key]
        elif len(keys) > 1:
            title += f": {_label(key, keys)}"
        charts.append(_chart(group, title, note, key, lines))
    return charts


def _keys(group: Group, runs: Sequence[RunData]) -> list[str]:
    """The names of a group that were logged, in the order of the group."""
    logged = list(dict.fromkeys(name for run in runs for name in run.scalars))
    found = []
    for key in group.keys:
        found += [name for name in logged if name.startswith(key[:-1])] if key.endswith("*") else [key]
    return [key for key in dict.fromkeys(found) if key in logged]


def _label(key: str, keys: Sequence[str]) -> str:
    if any(other.startswith(f"{key}/") for other in keys):
        return "all"
    return LABELS.get(key, key.rpartition("/")[2])


def _line(label: str, series: Series, key: str, colour: int) -> Line:
    scale = SCALES.get(key, 1.0)
    return Line(label, shorten(Series(series.steps, series.values * scale)), colour)


def _chart(
    group: Group, title: str, note: str, key: str, lines: Sequence[Line], marks: tuple[Event, ...] = ()
) -> Chart:
    values = np.concatenate([line.short.values for line in lines] or [np.zeros(0)])
    values = values[np.isfinite(values)]
    log = group.log and bool(len(values)) and values.min() > 0 and values.max() / values.min() > LOG_FROM
    return Chart(key.replace("/", "-"), title, note, tuple(lines), group.wide, bool(log), marks)


def _marks(run: RunData) -> tuple[Event, ...]:
    """Events to mark on the axis of steps: those of the run's last beginning, but for the beginning itself."""
    known = [event for event in run.events if event.kind in MARKED and event.step]
    return tuple(known[-MAX_MARKS:])
