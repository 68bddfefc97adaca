"""The heatmaps of a report: the load of every expert, and what is logged by layer, over the steps of a run.

R rows, T columns, M sparse layers, E experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_scale.tools.report_charts import shorten_columns
from moe_scale.tools.report_data import RunData, Series
from moe_scale.tools.report_plots import AROUND_EVEN, LOAD_OCTAVES, RISING, TIMES, Palette, brief, load_shares

VALUES_OF_MAPS = 80_000
"""Values of a run's maps that the page holds to show them under the pointer; maps beyond that are pictures only."""

LAYER_MAPS = (
    ("router/load_max", "Fullest expert", "load over the even one"),
    ("router/load_cv", "Unevenness", "standard deviation of the experts' loads over their mean"),
    ("router/entropy", "Routing entropy", "of a token's distribution, as a share of log E"),
    ("router/dropped", "Dropped", "share of (token, choice) pairs that found no place"),
    ("router/logit_rms", "Router scores", "root mean square"),
    ("eval/sink_share_per_layer", "Attention sink", "share of attention that goes to the first token"),
    ("weight_norm/router", "Router weights", "L2 norm"),
    ("weight_norm/experts", "Expert weights", "L2 norm"),
)
BEGINS_AT = {"router/load_max": 1.0, "router/load_cv": 0.0, "router/dropped": 0.0, "eval/sink_share_per_layer": 0.0}
"""Where the scale of a map begins; that of others begins at their least value."""


@dataclass(frozen=True)
class HeatMap:
    """A picture of values, a row a layer or an expert, a column a step or a stretch of steps.

    Attributes:
        latest: what to read beside its name.
        ends: labels of its first and last row.
        values: a column a list of its rows, for the pointer; None where there would be too many.
    """

    name: str
    shares_RT: NDArray[np.float64]
    latest: str
    ends: tuple[str, str]
    rows: list[str]
    steps: list[int]
    values: list[list[float | None]] | None
    palette: Palette


@dataclass(frozen=True)
class HeatBlock:
    """Maps that share a scale: its ends and, where it has one, its middle."""

    title: str
    note: str
    maps: list[HeatMap]
    scale: tuple[str, ...]
    palette: Palette


def heat_blocks(run: RunData) -> list[HeatBlock]:
    """What is known of a run's layers and experts over its steps."""
    blocks, left = [], VALUES_OF_MAPS
    if run.loads is not None:
        loads = load_maps(run, run.loads, left)
        left -= sum(map.shares_RT.size for map in loads.maps if map.values)
        blocks.append(loads)
    maps = []
    known = [(key, *rest) for key, *rest in LAYER_MAPS if key in run.layers]
    known += [(key, key, "as logged") for key in run.layers if key not in {name for name, *_ in LAYER_MAPS}]
    for key, title, note in known:
        if len(run.layers[key].steps) > 1:
            map, scale = _layer_map(run, key, title, left)
            left -= map.shares_RT.size if map.values else 0
            maps.append(HeatBlock(title, note, [map], scale, RISING))
    return [*blocks, *maps]


def load_maps(run: RunData, loads: Series, left: int) -> HeatBlock:
    """A map a layer of the experts' loads over the even load."""
    short = shorten_columns(loads)
    mean = short.values.mean(axis=2, keepdims=True)
    ratios_TME = short.values / np.maximum(mean, 1e-12)
    last_ME = loads.values[-1] / np.maximum(loads.values[-1].mean(axis=1, keepdims=True), 1e-12)
    experts = ratios_TME.shape[2]
    with_values = ratios_TME.size <= left
    maps = [
        HeatMap(
            name=name,
            shares_RT=load_shares(ratios_TME[:, m].T),
            latest=f"last: {last_ME[m].min():.1f}{TIMES} to {last_ME[m].max():.1f}{TIMES}",
            ends=("0", str(experts - 1)),
            rows=[f"expert {e}" for e in range(experts)],
            steps=short.steps.tolist(),
            values=_rounded(ratios_TME[:, m]) if with_values else None,
            palette=AROUND_EVEN,
        )
        for m, name in enumerate(run.layer_names(ratios_TME.shape[1]))
    ]
    most = f"{2**LOAD_OCTAVES:.0f}"
    note = "tokens of each expert over what an even load would give it, on a scale of octaves"
    scale = (f"1/{most} or less", "even", f"{most}{TIMES} or more")
    return HeatBlock("Load of the experts", note, maps, scale, AROUND_EVEN)


def _layer_map(run: RunData, key: str, title: str, left: int) -> tuple[HeatMap, tuple[str, ...]]:
    short = shorten_columns(run.layers[key])
    known = short.values[np.isfinite(short.values)]
    least, most = (float(known.min()), float(known.max())) if len(known) else (0.0, 0.0)
    least = BEGINS_AT.get(key, least)
    same = most <= least
    last = run.layers[key].values[-1]
    ends = [brief(end(last)) for end in (np.nanmin, np.nanmax)] if np.isfinite(last).any() else []
    names = run.layer_names(short.values.shape[1])
    map = HeatMap(
        name=title,
        shares_RT=(short.values.T - least) / (1.0 if same else most - least),
        latest="last: " + " to ".join(dict.fromkeys(ends)) if ends else "",
        ends=(names[0].split()[-1], names[-1].split()[-1]),
        rows=names,
        steps=short.steps.tolist(),
        values=_rounded(short.values) if short.values.size <= left else None,
        palette=RISING,
    )
    return map, (f"all {brief(least)}",) if same else (brief(least), brief(most))


def _rounded(values: NDArray[np.float64]) -> list[Any]:
    """Nested lists of three digits, None for what is no number."""
    if values.ndim > 1:
        return [_rounded(row) for row in values]
    return [float(f"{value:.3g}") if math.isfinite(value) else None for value in values.tolist()]
