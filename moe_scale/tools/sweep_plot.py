"""The pictures of a sweep: the metric against each setting, and every score against tokens, FLOPs and seconds."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_scale.tools.sweep_report import Report, Row
from moe_scale.tools.sweep_trials import numbers_of

MAX_LINES = 12
"""More lines than these cannot be told apart: of more, the best and the worst are in colour."""
ENDS = 4
DECADES = 20.0
"""The ratio of the largest to the smallest value from which an axis is logarithmic."""
COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9",
    "#000000", "#7f3c8d", "#8c564b", "#a5aa99", "#11a579", "#f2b701",
)  # fmt: skip
"""The first seven are those of Okabe and Ito (2008), which the colour-blind tell apart."""
AXES = (("tokens", "tokens"), ("flops", "training FLOPs"), ("seconds", "seconds of training"))


def plot(report: Report, folder: Path) -> list[str]:
    """Write all pictures that there is something for. Returns their names."""
    import matplotlib

    matplotlib.use("Agg")
    names = []
    if any(row.is_finished and row.score(report.plan.metric) is not None for row in report.rows):
        _save(_plot_settings(report), report, folder / "settings.png")
        names.append("settings.png")
    metric = report.plan.metric
    for score in [metric, *(name for name in report.plan.scores if name != metric)]:
        if any(point.scores.get(score) is not None for row in report.rows for point in row.points):
            name = f"curves-{score.replace('/', '-')}.png"
            _save(_plot_curves(report, score), report, folder / name)
            names.append(name)
    return names


def _save(figure: Any, report: Report, path: Path) -> None:
    """The picture with a line on where its figures come from."""
    import matplotlib.pyplot as plt

    text = textwrap.fill(report.notes[-1].replace("`", ""), int(17 * figure.get_figwidth()))
    figure.supxlabel(_plain(text), fontsize=6, color="0.35", x=0.01, ha="left")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _plain(text: str) -> str:
    """Text in which a dollar begins no formula."""
    return text.replace("$", r"\$")


# --- the metric against each setting ---------------------------------------------------------------------------------


def _plot_settings(report: Report) -> Any:
    import matplotlib.pyplot as plt

    plan = report.plan
    names = plan.factors or ["seed"]
    columns = min(len(names), 3)
    lines = -(-len(names) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(5.2 * columns, 4.2 * lines), layout="constrained", squeeze=False, sharey=True
    )
    rows = [row for row in report.rows if row.is_finished and row.score(plan.metric) is not None]
    for panel, name in zip(axes.flat, names, strict=False):
        _plot_setting(panel, name, rows, report)
    for panel in axes.flat[len(names) :]:
        panel.remove()
    for panel in axes[:, 0]:
        panel.set_ylabel(f"{plan.metric} ({plan.scores[plan.metric]} is better)")
    return figure


def _plot_setting(panel: Any, name: str, rows: Sequence[Row], report: Report) -> None:
    """Points of all trials, and the means: of each value of a grid, of each bin of drawn numbers."""
    plan = report.plan
    texts = [row.planned.trial.settings["seed"] if name == "seed" else row.planned.trial.level(name) for row in rows]
    values = [float(row.score(plan.metric) or 0.0) for row in rows]
    numbers = numbers_of(texts)
    shown = _in_order(plan, name, texts) if numbers is None else []
    places = [float(shown.index(text)) for text in texts] if numbers is None else numbers
    panel.plot(places, values, "o", color=COLOURS[0], alpha=0.55, markersize=5)
    effect = next((effect for effect in report.effects.effects if effect.setting == name), None)
    binned = bool(effect) and plan.drawn and numbers is not None and len(effect.levels) < len(set(texts))  # type: ignore[union-attr]
    if effect and binned:
        for level in effect.levels:
            low, _, high = level.value.partition(" to ")
            panel.plot([float(low), float(high)], [level.mean] * 2, color=COLOURS[1], linewidth=2.5)
    elif effect:
        means = {float(shown.index(e.value)) if numbers is None else float(e.value): e.mean for e in effect.levels}
        style = "_" if numbers is None else "_-"
        panel.plot(
            *zip(*sorted(means.items()), strict=True), style, color=COLOURS[1], markersize=22, markeredgewidth=2.5
        )
    if numbers is None:
        panel.set_xticks(range(len(shown)), [textwrap.fill(_plain(text), 14) for text in shown], fontsize=8)
        panel.set_xlim(-0.5, len(shown) - 0.5)
    else:
        _scale_of(panel, numbers)
        if not binned and len(set(texts)) <= 8:
            panel.set_xticks(sorted(set(numbers)), [f"{number:g}" for number in sorted(set(numbers))])
            panel.minorticks_off()
    title = name
    if effect and effect.share is not None:
        title += f"\n{effect.share:.0%} of the variance, {effect.verdict}"
    panel.set_title(title, fontsize=10)
    panel.set_xlabel(name)
    panel.grid(alpha=0.25)


def _in_order(plan: Any, name: str, texts: Sequence[str]) -> list[str]:
    """Different texts in the order of the plan."""
    if name == "seed":
        return sorted(set(texts))
    return [text for text in dict.fromkeys(planned.trial.level(name) for planned in plan.trials) if text in texts]


def _scale_of(panel: Any, numbers: Sequence[float]) -> None:
    """A logarithmic axis where values span decades; one with a straight piece around 0 where that is among them."""
    positive = [number for number in numbers if number > 0]
    if len(positive) < 2 or max(positive) / min(positive) < DECADES or min(numbers) < 0:
        return
    if min(numbers) == 0:
        panel.set_xscale("symlog", linthresh=min(positive))
    else:
        panel.set_xscale("log")


# --- a score while training ------------------------------------------------------------------------------------------


def _plot_curves(report: Report, score: str) -> Any:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(17, 5.0), layout="constrained", sharey=True)
    colours = colours_of(report)
    lines = {}
    labels = labels_of(report)
    evaluated = [row for row in report.rows if row.points]
    for row in sorted(evaluated, key=lambda row: -labels.index(label_of(report, row))):  # the best ones last, on top
        points = [point for point in row.points if point.scores.get(score) is not None]
        label = label_of(report, row)
        colour = colours.get(label)
        # Thick under thin: curves that coincide stay visible.
        width = 1.3 + 1.7 * labels.index(label) / len(labels) if colour else 0.8
        style: dict[str, Any] = {
            "color": colour or "0.8",
            "zorder": 3 if colour else 1,
            "linewidth": width,
            "alpha": 0.9,
        }
        for panel, (key, _) in zip(axes, AXES, strict=True):
            xy = [(getattr(point, key), point.scores[score]) for point in points if getattr(point, key) is not None]
            if xy:
                (line,) = panel.plot(*zip(*xy, strict=True), ".-", markersize=4, **style)
                lines[label] = line
    for panel, (_, title) in zip(axes, AXES, strict=True):
        panel.set_xlabel(title)
        panel.grid(alpha=0.25)
    axes[0].set_ylabel(f"{score} ({report.plan.scores[score]} is better)")
    values = [v for row in report.rows for p in row.points if (v := p.scores.get(score)) is not None]
    if min(values) > 0 and max(values) / min(values) > DECADES:
        axes[0].set_yscale("log")
    handles = {label: lines[label] for label in colours if label in lines}
    hidden = len(lines) - len(handles)
    title = "best first" + (f"; {hidden} others in grey" if hidden > 0 else "")
    figure.legend(
        handles.values(), map(_plain, handles), loc="outside right upper", fontsize=8, title=title, title_fontsize=8
    )
    return figure


def label_of(report: Report, row: Row) -> str:
    """What a line is called: the values that set it apart; repeats share it, and the colour."""
    trial = row.planned.trial
    short = [f"{name.rpartition('.')[2]} {trial.level(name)}" for name in report.plan.factors if name != "variant"]
    parts = [*([trial.variant] if "variant" in report.plan.factors else []), *short]
    return ", ".join(parts) or f"seed {trial.settings['seed']}"


def labels_of(report: Report) -> list[str]:
    """Labels of all trials that have been evaluated, the best mean over repeats first, and unfinished ones last."""
    metric, sign = report.plan.metric, 1 if report.plan.scores[report.plan.metric] == "lower" else -1
    ends: dict[str, list[float]] = {}
    for row in report.rows:
        if row.points:
            value = row.score(metric)
            worst = not row.is_finished or value is None
            ends.setdefault(label_of(report, row), []).append(math.inf if worst else sign * float(value or 0.0))
    return sorted(ends, key=lambda label: sum(ends[label]) / len(ends[label]))


def colours_of(report: Report) -> dict[str, str]:
    """A colour for each label, the best first; beyond :data:`MAX_LINES` for the best and the worst alone."""
    labels = labels_of(report)
    if len(labels) > MAX_LINES:
        labels = [*labels[:ENDS], *labels[-ENDS:]]
    return dict(zip(labels, COLOURS, strict=False))
