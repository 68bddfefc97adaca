"""The page of a report: what is on it, as plain data, and the page made of it by the template in ``page/``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from moe_scale.telemetry.progress import format_seconds
from moe_scale.tools.report_charts import COLUMNS, POINTS, Chart
from moe_scale.tools.report_data import RunData
from moe_scale.tools.report_events import Event
from moe_scale.tools.report_maps import heat_blocks
from moe_scale.tools.report_plots import AROUND_EVEN, TIMES, brief, draw_svg, gradient, heat_pngs, number

FILES = Path(__file__).parent / "page"
UNTOLD_SETTINGS = ("output_dir", "resume")
"""Settings that differ between runs without being a difference."""

MAX_EVENTS = 200
BEFORE_EXPERTS = ("Loss", "Evaluation")
"""Sections of charts that stand above the maps of layers and experts."""


# --- the runs as a whole ---------------------------------------------------------------------------------------------


def state_of(run: RunData, now: float) -> tuple[str, str]:
    """A word (``finished``, ``stopped``, ``open``) for the state of a run, and a line about it."""
    step, most = run.last_step, run.max_steps
    done = f"step {step:,}" + (f" of {most:,}" if most else "")
    if run.mark is not None:
        text = f"finished at step {run.mark.step:,}" + (", stopped early" if run.mark.stopped_early else "")
        if run.restored is not None and run.restored != run.mark.step:
            text += f", with the weights of step {run.restored:,}"
        return "finished", text
    ends = [event for event in run.events if event.kind in ("start", "stopped")]
    if ends and ends[-1].kind == "stopped":
        text = ends[-1].text
        return "stopped", text if text.startswith("stopped") else f"stopped at {done}: {text}"
    if run.wrote is None or not run.records:
        return "open", "no step is logged yet"
    return "open", f"at {done}; last record {ago(now - run.wrote)} before this page: running, or killed"


def ago(seconds: float) -> str:
    """A length of time in words."""
    seconds = max(0.0, seconds)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def figures(run: RunData) -> dict[str, tuple[str, str]]:
    """The run in a few figures: for each its value and what to know about it. What is not known is left out."""
    found: dict[str, tuple[str, str]] = {}
    scalars = run.scalars
    if "lm_loss" in scalars:
        found["Training loss"] = (f"{scalars['lm_loss'].last():.4f}", f"at step {scalars['lm_loss'].steps[-1]:,}")
    if "eval/loss" in scalars and np.isfinite(scalars["eval/loss"].values).any():
        held = scalars["eval/loss"]
        best = int(np.nanargmin(held.values))
        found["Held-out loss"] = (f"{held.values[best]:.4f}", f"its best, at step {held.steps[best]:,}")
    for key, title in (("eval/bleu", "BLEU"), ("eval/accuracy", "Accuracy")):
        if key in scalars:
            found[title] = (brief(scalars[key].last()), f"at step {scalars[key].steps[-1]:,}")
    if "tokens" in scalars:
        found["Tokens"] = (brief(np.nanmax(scalars["tokens"].values)), "seen, over all ranks")
    if "tokens_per_s" in scalars and np.isfinite(scalars["tokens_per_s"].values).any():
        median = float(np.nanmedian(scalars["tokens_per_s"].values))
        found["Tokens/s"] = (brief(median), "median, over all ranks")
    if "mfu" in scalars:
        found["MFU"] = (f"{float(np.nanmedian(scalars['mfu'].values)):.1%}", "median")
    if "memory_bytes" in scalars:
        peak = float(np.nanmax(scalars["memory_bytes"].values)) / 2**30
        found["Memory"] = (f"{peak:.3g} GiB", "peak of rank 0")
    if "router/load_max" in run.layers:
        last = run.layers["router/load_max"].values[-1]
        if np.isfinite(last).any():
            layer = run.layer_names(len(last))[int(np.nanargmax(last))]
            found["Fullest expert"] = (f"{np.nanmax(last):.1f}{TIMES}", f"the even load, in {layer}")
    if seconds := _trained_s(run):
        found["Training time"] = (format_seconds(seconds), "of its steps, without evaluation and saving")
    return found


def _trained_s(run: RunData) -> float | None:
    """Tokens between two records by the rate of the second, added up."""
    tokens, rates = run.scalars.get("tokens"), run.scalars.get("tokens_per_s")
    if tokens is None or rates is None:
        return None
    at = np.interp(rates.steps, tokens.steps, tokens.values)
    known = np.isfinite(rates.values) & (rates.values > 0)
    seconds = np.diff(at, prepend=0.0)[known] / rates.values[known]
    return float(seconds[seconds > 0].sum()) or None


def facts_line(run: RunData) -> str:
    """Recipe, scale, device, commit and begin, as far as they are known."""
    facts, source = run.facts, run.facts.get("source")
    parts = [str(facts.get("recipe", "")), str(run.settings.get("scale", ""))]
    if facts.get("device"):
        parts.append(f"{facts.get('world_size', 1)} {TIMES} {facts['device']}")
    if isinstance(source, dict) and source.get("commit"):
        parts.append(f"commit {str(source['commit'])[:9]}" + (" with changes" if source.get("dirty") else ""))
    starts = [str(fact["started"]) for fact in (*run.earlier, facts) if fact.get("started")]
    parts += [f"begun {_time(starts[0])}"] if starts else []
    return " · ".join(filter(None, parts))


def _time(text: str) -> str:
    return text.replace("T", " ").removesuffix("Z") + (" UTC" if text.endswith("Z") else "")


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings by their dotted names, as text."""
    found: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + str(key)] = value if isinstance(value, str) else json.dumps(value)
    return found


def settings_of(facts: Mapping[str, Any]) -> dict[str, str]:
    """All that a start was given, from its ``run.json``."""
    settings, source = facts.get("settings"), facts.get("source")
    found = flat(settings if isinstance(settings, dict) else {})
    found |= flat({"deepspeed": facts.get("deepspeed") or {}}) if isinstance(facts.get("deepspeed"), dict) else {}
    found |= {name: str(facts[name]) for name in ("recipe", "world_size", "device") if name in facts}
    if isinstance(source, dict):
        found["commit"] = str(source.get("commit", ""))[:9] + (" with changes" if source.get("dirty") else "")
    return found


def differences(columns: Sequence[Mapping[str, str]]) -> list[tuple[str, list[str]]]:
    """Names whose values are not the same in all columns, and those values; a dash where one has none."""
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [(name, [column.get(name, "-") for column in columns]) for name in names if name not in UNTOLD_SETTINGS]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


# --- the page --------------------------------------------------------------------------------------------------------


def render(runs: Sequence[RunData], charts: Sequence[tuple[str, list[Chart]]], now: datetime) -> str:
    """The page as HTML, with everything that it needs inside."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FILES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    data: dict[str, Any] = {}
    sections = [(title, [_card(chart, data, alone=len(runs) == 1) for chart in some]) for title, some in charts]
    heat = [_heat(run, number, data) for number, run in enumerate(runs)]
    current = [settings_of(run.facts) for run in runs]
    summaries = [_summary(run, now) for run in runs]
    return environment.get_template("report.html").render(
        title=" · ".join(run.name for run in runs[:3]) + (f" and {len(runs) - 3} more" if len(runs) > 3 else ""),
        css=Markup((FILES / "report.css").read_text()),
        js=Markup((FILES / "report.js").read_text()),
        data=Markup(json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")),
        runs=summaries,
        figure_names=list(dict.fromkeys(name for summary in summaries for name in summary["figures"])),
        sections=sections,
        before=sum(title in BEFORE_EXPERTS for title, _ in sections),
        heat=heat,
        differences=differences(current) if len(runs) > 1 else [],
        settings=current,
        points=2 * POINTS,
        columns=2 * COLUMNS,
        made=now.strftime("%Y-%m-%d %H:%M UTC"),
    )


def _summary(run: RunData, now: datetime) -> dict[str, Any]:
    word, state = state_of(run, now.timestamp())
    starts = [settings_of(facts) for facts in [*run.earlier, run.facts]]
    return {
        "name": run.name,
        "state": word,
        "state_text": state,
        "facts": facts_line(run),
        "figures": figures(run),
        "notes": run.notes,
        "command": " ".join(map(str, command)) if isinstance(command := run.facts.get("command"), list) else "",
        "events": [_event(event) for event in _told(run.events)],
        "events_left_out": len(run.events) - len(_told(run.events)),
        "starts": differences(starts) if len(starts) > 1 else [],
    }


def _told(events: Sequence[Event]) -> list[Event]:
    """The last events, where there are too many without the saves."""
    if len(events) > MAX_EVENTS:
        events = [event for event in events if event.kind != "saved"]
    return list(events[-MAX_EVENTS:])


def _event(event: Event) -> dict[str, str]:
    step = "" if event.step is None else f"{event.step:,}"
    return {"time": _time(event.time), "kind": event.kind, "step": step, "text": event.text}


def _card(chart: Chart, data: dict[str, Any], *, alone: bool) -> dict[str, Any]:
    """A chart as the template takes it; its data, for the pointer, goes into ``data``."""
    pictures = [] if chart.is_point else [("narrow", draw_svg(chart, wide=False))]
    if chart.wide and pictures:
        pictures.append(("wide", draw_svg(chart, wide=True)))
    key = f"c{len(data)}"
    data[key] = {
        "lines": [
            {
                "n": line.label,
                "c": line.colour % 8,
                "x": [round(step) for step in line.short.steps],
                "y": [float(f"{v:.5g}") if math.isfinite(v) else None for v in line.short.values.tolist()],
            }
            for line in chart.lines
        ],
        "limits": pictures[0][1].limits if pictures else [],
    }
    notes = [chart.note]
    per_point = max((line.short.per_point for line in chart.lines), default=1)
    if per_point > 1:
        notes.append(f"mean of {per_point:,} records a point, the range around it")
    if pictures and (above := pictures[0][1].above) is not None:
        notes.append(f"the beginning, up to {number(above)}, is above the frame")
    if chart.is_point:
        notes.append(f"logged once, at step {chart.lines[0].short.steps[0]:,.0f}")
    return {
        "key": key,
        "chart": chart,
        "alone": alone and len(chart.lines) == 1,
        "note": "; ".join(notes),
        "pictures": [
            {"svg": Markup(drawn.svg), "left": f"{drawn.left:.4f}", "right": f"{drawn.right:.4f}", "kind": kind}
            for kind, drawn in pictures
        ],
        "marks": sorted({event.kind for event in chart.marks}),
        "last": ["-" if line.short.last is None else brief(line.short.last, 4) for line in chart.lines],
    }


def _heat(run: RunData, place: int, data: dict[str, Any]) -> dict[str, Any]:
    blocks = []
    for block in heat_blocks(run):
        maps = []
        for map in block.maps:
            light, dark = heat_pngs(map.shares_RT, map.palette)
            key = f"h{place}-{len(data)}"
            if map.values:
                data[key] = {"rows": map.rows, "steps": map.steps, "values": map.values}
            maps.append({"map": map, "light": light, "dark": dark, "key": key if map.values else ""})
        blocks.append(
            {
                "block": block,
                "maps": maps,
                "light": gradient(block.palette.light),
                "dark": gradient(block.palette.dark),
                "of_experts": block.palette is AROUND_EVEN,
            }
        )
    return {"name": run.name, "blocks": blocks}
