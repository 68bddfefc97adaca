"""What a sweep found: a row a trial, from what the runs wrote; the tables, ``sweep.md`` and ``results.json``.

Only ``sweep.json`` and the trials' folders are read: a report can be made anew at any time, of an unfinished sweep too.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moe_scale.telemetry.provenance import write_atomically
from moe_scale.telemetry.records import finite
from moe_scale.telemetry.terminal import Console
from moe_scale.tools.sweep_effects import SIGNIFICANT, Effect, Effects, Observation, main_effects
from moe_scale.tools.sweep_plan import Plan, Planned, commit_text
from moe_scale.tools.sweep_reach import Reached, reach_record, reach_table, reached
from moe_scale.tools.tables import markdown, rich_table
from moe_scale.train.finished import read_mark

_PARAMETERS = re.compile(r"^model +([0-9,]+) parameters(?:, ([0-9,]+) active)?", re.MULTILINE)
"""The line of a run's summary that counts them."""


@dataclass(frozen=True)
class Point:
    """An evaluation.

    Attributes:
        tokens: trained on before it, over all ranks.
        flops: of that training, as the task counts a token's.
        seconds: of that training, without evaluation and saving.
        scores: by name; None for what is not a number.
    """

    step: int
    tokens: int
    flops: float
    seconds: float | None
    scores: dict[str, float | None]


@dataclass(frozen=True)
class Row:
    """What is known of a trial.

    Attributes:
        state: ``finished``, ``failed``, ``unfinished`` (with a step) or ``not started``.
        points: its evaluations; the last one tells the trial's result.
        parameters, active_parameters: where the run's summary names them.
        commit, device: that it ran on.
        failure: what the trial said at its end, if it failed.
    """

    planned: Planned
    state: str
    points: tuple[Point, ...] = ()
    parameters: int | None = None
    active_parameters: int | None = None
    commit: str = ""
    device: str = ""
    failure: str = ""

    @property
    def name(self) -> str:
        return self.planned.trial.name

    @property
    def is_finished(self) -> bool:
        return self.state == "finished"

    def score(self, name: str) -> float | None:
        return self.points[-1].scores.get(name) if self.points else None


@dataclass(frozen=True)
class Report:
    """All that a sweep's files and pictures show; rows are sorted, the best first.

    Attributes:
        reference: the variant that others are to become as good as; empty without one.
        reached: what it took each trial, then.
    """

    plan: Plan
    rows: list[Row]
    effects: Effects
    notes: list[str] = field(default_factory=list)
    reference: str = ""
    reached: list[Reached] = field(default_factory=list)


# --- reading what the runs wrote -------------------------------------------------------------------------------------


def read_records(run_dir: Path) -> list[dict[str, Any]]:
    """The whole objects of a run's ``metrics.jsonl``: none where there is no file, and without a line cut short."""
    records = []
    path = run_dir / "metrics.jsonl"
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            records.append(record)
    return records


def is_finished(planned: Planned, metric: str, folder: Path) -> bool:
    """Whether the trial's run has finished, at its last step or early by its settings; and nothing after it failed."""
    mark = None if planned.failure(folder).is_file() else read_mark(planned.folder(folder))
    return mark is not None and metric in mark.scores and (mark.step >= planned.max_steps or mark.stopped_early)


def last_score(planned: Planned, metric: str, folder: Path) -> float | None:
    """The metric at the last evaluation of a trial; None where there is none, or it is not a number."""
    return next((r[metric] for r in reversed(read_records(planned.folder(folder))) if metric in r), None)


def read_row(plan: Plan, planned: Planned, folder: Path) -> Row:
    """What the trial's folder tells."""
    run_dir = planned.folder(folder)
    records = read_records(run_dir)
    points = points_of(records, list(plan.scores), planned.flops_per_token)
    failure = planned.failure(folder)
    said = failure.read_text().strip() if failure.is_file() else ""
    step = max((record["step"] for record in records), default=0)
    if is_finished(planned, plan.metric, folder):
        state = "finished"
    elif said:
        state = f"failed at step {step:,}" if step else "failed"
    else:
        state = f"at step {step:,} of {planned.max_steps:,}" if step else "not started"
    counts = _parameters(planned.log(folder))
    return Row(planned, state, points, *counts, *_run_on(run_dir), said)


def points_of(records: Sequence[dict[str, Any]], scores: Sequence[str], flops_per_token: float) -> tuple[Point, ...]:
    """The evaluations among a run's records.

    The seconds of training add up, over the logged steps, the tokens since the one before by the rate of their window:
    ``tokens_per_s`` leaves evaluation and saving out, and its window is what lies between two logged steps.
    (``step_time_s``, the median, would leave out slow steps.) Between two logged steps the seconds are interpolated.
    """
    times: list[tuple[int, float]] = [(0, 0.0)]
    for record in records:
        rate, tokens = record.get("tokens_per_s"), record.get("tokens", 0)
        if rate and tokens > times[-1][0]:
            times.append((tokens, times[-1][1] + (tokens - times[-1][0]) / rate))
    points = []
    for record in records:
        if record.get("flops") and record.get("tokens"):  # a task may know them better once its data is there
            flops_per_token = record["flops"] / record["tokens"]
        if not any(name in record for name in scores):
            continue
        tokens = record["tokens"]
        seconds = _interpolate(times, tokens) if len(times) > 1 else None
        found = {name: record.get(name) for name in scores}
        points.append(Point(record["step"], tokens, tokens * flops_per_token, seconds, found))
    return tuple(points)


def _interpolate(times: Sequence[tuple[int, float]], tokens: int) -> float:
    """Seconds at so many tokens; past the last logged step at the rate before it."""
    after = next((n for n, (x, _) in enumerate(times) if n and x >= tokens), len(times) - 1)
    (x0, y0), (x1, y1) = times[after - 1], times[after]
    return y0 + (y1 - y0) * (tokens - x0) / (x1 - x0)


def _parameters(log: Path) -> tuple[int | None, int | None]:
    found = _PARAMETERS.findall(log.read_text(errors="replace")) if log.is_file() else []
    total, active = found[-1] if found else ("", "")
    return tuple(int(text.replace(",", "")) if text else None for text in (total, active))  # type: ignore[return-value]


def _run_on(run_dir: Path) -> tuple[str, str]:
    """Commit and device of a run's last start."""
    try:
        found = json.loads((run_dir / "run.json").read_text())
        return commit_text(found["source"]), str(found["device"])
    except (OSError, ValueError, KeyError):
        return "", ""


# --- the report ------------------------------------------------------------------------------------------------------


def make_report(plan: Plan, folder: Path, reference: str = "") -> Report:
    """Read the trials' folders and work out what mattered; and what it takes to be as good as a variant."""
    sign = 1 if plan.scores[plan.metric] == "lower" else -1

    def rank(row: Row) -> tuple[bool, bool, float]:
        value = row.score(plan.metric)
        return not row.is_finished, value is None, 0.0 if value is None else sign * value

    rows = sorted((read_row(plan, planned, folder) for planned in plan.trials), key=rank)
    costs = reached(plan, rows, reference) if reference else []
    return Report(plan, rows, _effects(plan, rows), _notes(plan, rows), reference, costs)


def _effects(plan: Plan, rows: Sequence[Row]) -> Effects:
    in_order = sorted(rows, key=lambda row: plan.trials.index(row.planned))
    observations = []
    for row in in_order:
        value = row.score(plan.metric)
        if row.is_finished and value is not None and math.isfinite(value):
            levels = {name: row.planned.trial.level(name) for name in plan.factors}
            observations.append(Observation(levels, value))
    return main_effects(observations, plan.factors, drawn=plan.drawn)


def _notes(plan: Plan, rows: Sequence[Row]) -> list[str]:
    """What the figures are, and where they come from."""
    better = plan.scores[plan.metric]
    finished = sum(row.is_finished for row in rows)
    versions = ", ".join(f"{name} {plan.origin['packages'][name]}" for name in ("python", "torch", "deepspeed"))
    commits = ", ".join(dict.fromkeys(row.commit for row in rows if row.commit)) or plan.origin["commit"]
    machines = ", ".join(dict.fromkeys(row.device for row in rows if row.device)) or plan.origin["device"]
    shared = " Trials ran at once, so their seconds are not those of one alone." if plan.origin["parallel"] > 1 else ""
    return [
        f"{finished} of {len(rows)} trials finished; by {plan.metric}, {better} is better. Scores are of held-out data "
        "after the last step; tokens are those trained on; FLOPs are tokens times the training FLOPs a token that the "
        f"task counts; seconds are of training, without start, evaluation and saving.{shared}",
        f"`{plan.origin['command']}` on {plan.ranks} x {machines}; commit {commits}; {versions}; "
        f"begun {plan.origin['started']}.",
    ]


COUNTS = {
    "tokens": "tokens",
    "flops": "training FLOPs",
    "seconds": "seconds",
    "parameters": "parameters",
    "active_parameters": "active parameters",
}


def table_of(report: Report) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table of trials. A column that no trial has a figure for is left out."""
    plan, rows = report.plan, report.rows
    scores = [plan.metric, *(name for name in plan.scores if name != plan.metric)]
    counts = {key: title for key, title in COUNTS.items() if any(_count(row, key) is not None for row in rows)}
    seeds = ["seed"] if plan.repeats else []
    header = [*plan.factors, *seeds, *scores, *counts.values(), "state"]
    cells = []
    for row in rows:
        trial = row.planned.trial
        cells.append(
            [
                *(trial.level(name) for name in plan.factors),
                *(trial.settings["seed"] for _ in seeds),
                *(_score(row, name) for name in scores),
                *(_shown(_count(row, key), key) for key in counts),
                row.state,
            ]
        )
    return header, cells


def _count(row: Row, key: str) -> float | None:
    if key in ("parameters", "active_parameters"):
        return getattr(row, key)
    return getattr(row.points[-1], key) if row.points else None


def _score(row: Row, name: str) -> str:
    value = row.score(name)
    if value is None:
        return "not a number" if row.points else ""
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.4g}"


def _shown(value: float | None, key: str) -> str:
    if value is None:
        return ""
    return f"{value:.3e}" if key == "flops" else f"{value:,.1f}" if key == "seconds" else f"{value:,.0f}"


def effects_table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table of what mattered."""
    metric, spread = report.plan.metric, report.effects.repeat_spread
    header = ["setting", f"mean {metric} by value", "range", *(["range / spread of repeats"] if spread else [])]
    header += ["share of variance", *(["by chance", "rank correlation"] if report.plan.drawn else []), "verdict"]
    cells = []
    for effect in report.effects.effects:
        means = ", ".join(f"{level.value}: {level.mean:.4f} ({level.count})" for level in effect.levels)
        ratio = [f"{effect.span / spread:.1f}"] if spread else []
        chance = [_percent(effect.by_chance), _correlation(effect)] if report.plan.drawn else []
        cells.append(
            [effect.setting, means, f"{effect.span:.4g}", *ratio, _percent(effect.share), *chance, effect.verdict]
        )
    return header, cells


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _correlation(effect: Effect) -> str:
    return "" if effect.rank_correlation is None else f"{effect.rank_correlation:+.2f}"


def effect_notes(report: Report) -> list[str]:
    """What the table of what mattered rests on."""
    effects = report.effects
    notes = []
    if effects.repeat_spread is not None:
        notes.append(f"Spread of repeats (same settings, other seeds): standard deviation {effects.repeat_spread:.4g}.")
    elif not report.plan.repeats:
        notes.append("Nothing was repeated, so the noise between seeds is not known (--repeats N shows it).")
    if effects.error:
        notes.append(f"Effects of {effects.observations} trials are judged by {effects.error}.")
    tested = sum(effect.p is not None for effect in effects.effects)
    if tested > 1:
        chance = 1 - (1 - SIGNIFICANT) ** tested
        notes.append(
            f"Each of {tested} settings is tested by itself: if none had an effect, one or more would still look clear "
            f"(p < {SIGNIFICANT:g}) in about {chance:.0%} of sweeps."
        )
    return [*notes, *([effects.remark] if effects.remark else [])]


def write_report(report: Report, folder: Path, pictures: Sequence[str]) -> None:
    """``results.json`` and ``sweep.md`` in the folder, and both tables on the terminal.

    Args:
        pictures: names of the plots in the folder.
    """
    results = {
        "metric": report.plan.metric,
        "scores": report.plan.scores,
        "origin": report.plan.origin,
        "trials": [_plain(row) for row in report.rows],
        "effects": asdict(report.effects),
        **({"reached": reach_record(report.reached, report.reference)} if report.reference else {}),
    }
    write_atomically(folder / "results.json", json.dumps(finite(_lists(results)), indent=1).encode() + b"\n")
    trials, effects = table_of(report), effects_table(report)
    reaching = [reach_table(report.reached, report.reference)] if report.reference else []
    failed = [
        f"### {row.name}\n\n```\n{row.failure}\n```" for row in report.rows if row.failure and not row.is_finished
    ]
    parts = [
        f"# {Path(report.plan.recipe).stem}: {' x '.join(report.plan.factors) or 'seed'}",
        markdown(*trials),
        *report.notes,
        *(part for table in reaching for part in ("## What it takes", markdown(*table))),
        "## What mattered",
        *([markdown(*effects)] if effects[1] else []),
        *effect_notes(report),
        *(f"![{Path(name).stem}]({name})" for name in pictures),
        *(["## Failed", *failed] if failed else []),
    ]
    write_atomically(folder / "sweep.md", ("\n\n".join(parts) + "\n").encode())
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 190)
    print()
    console.print(rich_table(*trials))
    print("\n".join(report.notes))
    for table in reaching:
        console.print(rich_table(*table, title="What it takes"))
    if effects[1]:
        console.print(rich_table(*effects, title="What mattered"))
    print("\n".join(effect_notes(report)))
    print(f"wrote sweep.md, results.json and {', '.join(pictures) or 'no plots'} to {folder}")


def _plain(row: Row) -> dict[str, Any]:
    trial = row.planned.trial
    return {
        "name": row.name,
        "variant": trial.variant,
        "settings": trial.settings,
        "state": row.state,
        "scores": row.points[-1].scores if row.points else {},
        **{key: _count(row, key) for key in COUNTS},
        "commit": row.commit,
        "device": row.device,
        "failure": row.failure,
        "curve": [asdict(point) for point in row.points],
    }


def _lists(value: Any) -> Any:
    """Tuples as lists, which is what JSON has."""
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, list | tuple) else value
