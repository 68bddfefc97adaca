"""What it costs the trials of a sweep to become as good as one of its variants: tokens, training FLOPs, seconds.

The mark that a trial has to reach is the best score of the reference: the trial of that variant with the same seed and
the same values of everything else. Costs are those of the first evaluation that is at least as good, so that they are
known to the distance between evaluations; that of the reference is of its own best one.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from moe_scale.errors import ConfigError, Problem

if TYPE_CHECKING:
    from moe_scale.tools.sweep_plan import Plan, Planned
    from moe_scale.tools.sweep_report import Point, Row

COSTS = ("tokens", "flops", "seconds")
"""What is counted until the mark is reached, as :class:`moe_scale.tools.sweep_report.Point` has it."""


@dataclass(frozen=True)
class Reached:
    """How far a trial came.

    Attributes:
        trial: its name.
        label: its variant, and the values of what else varies.
        mark: the reference's best score; None where the reference has none yet.
        best: the trial's own best score; None without an evaluation.
        step: of the first evaluation that is at least as good as the mark; None where there is none.
        costs: ``tokens``, ``flops`` and ``seconds`` until then.
        ratios: the same over the reference's at its mark; only of what both have.
    """

    trial: str
    label: str
    mark: float | None
    best: float | None
    step: int | None
    costs: dict[str, float]
    ratios: dict[str, float]


def check_reference(plan: Plan, reference: str) -> None:
    """Refuse a reference that is none of the sweep's variants.

    Raises:
        ConfigError: then.
    """
    variants = list(dict.fromkeys(planned.trial.variant for planned in plan.trials))
    if "variant" not in plan.factors:
        raise ConfigError(Problem("--reach", f"{reference!r} in a sweep without variants", "give two of --variant"))
    if reference not in variants:
        raise ConfigError(Problem("--reach", f"{reference!r} is no variant", f"choose one of {', '.join(variants)}"))


def reached(plan: Plan, rows: Sequence[Row], reference: str) -> list[Reached]:
    """What each trial needed to be as good as the reference, in the order of ``rows``."""
    partners = {_setting(row.planned): row for row in rows if row.planned.trial.variant == reference}
    return [_reached(plan, row, partners.get(_setting(row.planned))) for row in rows]


def _setting(planned: Planned) -> tuple[str, ...]:
    """What a trial and its reference have in common."""
    return (planned.trial.settings.get("seed", ""), *planned.trial.values.values())


def _reached(plan: Plan, row: Row, reference: Row | None) -> Reached:
    trial, higher = row.planned.trial, plan.scores[plan.metric] == "higher"
    others = [f"{name.rpartition('.')[2]} {trial.level(name)}" for name in plan.factors if name != "variant"]
    label = ", ".join([trial.variant, *others])
    own, theirs = (
        _best(row.points, plan.metric, higher),
        _best(reference.points if reference else (), plan.metric, higher),
    )
    mark, best = (None if point is None else point.scores[plan.metric] for point in (theirs, own))
    first = None
    if mark is not None:
        first = next((point for point in row.points if _at_least(point.scores.get(plan.metric), mark, higher)), None)
    if first is None or theirs is None:
        return Reached(row.name, label, mark, best, None, {}, {})
    costs = {name: value for name in COSTS if (value := getattr(first, name)) is not None}
    ratios = {name: value / base for name, value in costs.items() if (base := getattr(theirs, name))}
    return Reached(row.name, label, mark, best, first.step, costs, ratios)


def _at_least(score: float | None, mark: float, higher: bool) -> bool:
    return score is not None and (score >= mark if higher else score <= mark)


def _best(points: Sequence[Point], metric: str, higher: bool) -> Point | None:
    """The first of the best evaluations."""
    scored = [point for point in points if point.scores.get(metric) is not None]
    sign = -1.0 if higher else 1.0
    return min(scored, key=lambda point: sign * float(point.scores[metric] or 0.0), default=None)


def reach_table(found: Sequence[Reached], reference: str) -> tuple[list[str], list[list[str]]]:
    """Header and cells: a line for each kind of trial, repeats together, with the medians of those that got there."""
    header = [f"to the best of {reference!r}", "trials", "reached", "best", "mark"]
    header += ["training FLOPs", "FLOPs / reference", "seconds / reference", "tokens / reference"]
    cells = []
    for label in dict.fromkeys(one.label for one in found):
        alike = [one for one in found if one.label == label]
        there = [one for one in alike if one.step is not None]
        flops = f"{statistics.median(one.costs['flops'] for one in there):.3e}" if there else ""
        ratios = [_ratio([one.ratios for one in there], name) for name in ("flops", "seconds", "tokens")]
        best, mark = (_mean([getattr(one, name) for one in alike]) for name in ("best", "mark"))
        cells.append([label, str(len(alike)), str(len(there)), best, mark, flops, *ratios])
    return header, cells


def _mean(scores: Sequence[float | None]) -> str:
    known = [score for score in scores if score is not None]
    return f"{statistics.fmean(known):.4f}" if known else ""


def _ratio(all_ratios: Sequence[dict[str, float]], name: str) -> str:
    """Median, and the extremes of several."""
    values = sorted(ratios[name] for ratios in all_ratios if name in ratios)
    if not values:
        return ""
    spread = f" ({values[0]:.2f} to {values[-1]:.2f})" if len(values) > 1 else ""
    return f"{statistics.median(values):.2f}{spread}"


def reach_record(found: Sequence[Reached], reference: str) -> dict[str, Any]:
    """As plain values."""
    return {"reference": reference, "trials": [asdict(one) for one in found]}
