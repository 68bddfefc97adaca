"""The pictures of a report: charts by matplotlib, as SVG whose colours the page sets or as PNG; heatmaps as small PNG.

An SVG is drawn in the colours of the light scheme; each is then replaced by the CSS variable that has its place, so
that one picture serves the light and the dark page. Text stays text.
"""

from __future__ import annotations

import base64
import io
import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import NDArray
from PIL import Image

from moe_scale.tools.report_charts import Chart

VARIABLES = {
    "#1b1f24": "--ink", "#6a7280": "--muted", "#e3e6eb": "--grid", "#c81e1d": "--alarm",
    "#2563eb": "--c0", "#d9480f": "--c1", "#0b8a5f": "--c2", "#9333ea": "--c3",
    "#a8740a": "--c4", "#0e7490": "--c5", "#be185d": "--c6", "#52606d": "--c7",
}  # fmt: skip
"""The colours of the light scheme, and the variable of each in ``page.css``."""

INK, MUTED, GRID, ALARM, *SERIES = VARIABLES

RC: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "moe_scale",
    "font.size": 9.0,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.xmargin": 0.01,
    "axes.ymargin": 0.06,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3.0,
    "ytick.major.size": 0.0,
    "lines.linewidth": 1.5,
    "lines.solid_capstyle": "round",
    "path.simplify": True,
}

NARROW, WIDE = (290.0, 170.0), (900.0, 250.0)
"""Widths and heights in points. A narrow one is read on a phone at about its own size."""

LEFT, RIGHT, TOP, BOTTOM = 42.0, 8.0, 8.0, 20.0
"""Points around the axes. Fixed, because an automatic layout draws every picture twice."""

TIMES = "\N{MULTIPLICATION SIGN}"

DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)))
"""Of the lines whose colours come again."""


@dataclass(frozen=True)
class Drawn:
    """A chart as SVG, and where its axes are.

    Attributes:
        left, right: of the axes, as shares of the picture's width.
        limits: steps at those two.
        above: the greatest value above the frame, where the beginning of a run is cut off; None where all is shown.
    """

    svg: str
    left: float
    right: float
    limits: tuple[float, float]
    above: float | None


def draw_svg(chart: Chart, *, wide: bool) -> Drawn:
    """A chart as an ``<svg>`` element that has no ids of its own names, colours by CSS variables and no background."""
    with rc_context(RC):
        figure, axes, above = _figure(chart, WIDE if wide else NARROW)
        FigureCanvasSVG(figure)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        width = WIDE[0] if wide else NARROW[0]
        limits = axes.get_xlim()
    return Drawn(_inline(file.getvalue(), chart, wide), LEFT / width, 1 - RIGHT / width, limits, above)


def draw_png(chart: Chart, source: str) -> bytes:
    """A chart as PNG with its title, legend and, in small print, where its data is from."""
    with rc_context(RC):
        size = WIDE if chart.wide else NARROW
        columns = 8 if chart.wide else 4
        legend = 12.0 * -(-len(chart.lines) // columns) if len(chart.lines) > 1 else 0.0
        figure, axes, above = _figure(
            chart, (size[0], size[1] + 68 + legend), top=TOP + 36 + legend, bottom=BOTTOM + 32
        )
        FigureCanvasAgg(figure)
        left, height = 8 / size[0], size[1] + 68 + legend
        figure.text(left, 1 - 5 / height, chart.title, va="top", fontsize=11, fontweight="bold")
        note = chart.note + (f"; the beginning, up to {number(above)}, is above the frame" if above else "")
        figure.text(left, 1 - 22 / height, note, va="top", fontsize=7.5, color=MUTED)
        told = textwrap.fill(source, int(size[0] / 3.6))
        figure.text(left, 4 / height, told, fontsize=5.5, color=MUTED, va="bottom", linespacing=1.1)
        axes.set_xlabel("step", fontsize=7.5, labelpad=1)
        if len(chart.lines) > 1:
            figure.legend(
                fontsize=6.5, frameon=False, ncols=columns, loc="upper left", labelcolor=INK,
                bbox_to_anchor=(0.0, 1 - 30 / height), columnspacing=1.2, handlelength=1.2,
            )  # fmt: skip
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=144, facecolor="white")
    return file.getvalue()


def _figure(chart: Chart, size: tuple[float, float], top: float = TOP, bottom: float = BOTTOM) -> tuple[Any, Any, Any]:
    width, height = size
    figure = Figure(figsize=(width / 72, height / 72))
    axes = figure.add_axes(
        (LEFT / width, bottom / height, (width - LEFT - RIGHT) / width, (height - top - bottom) / height)
    )
    for line in chart.lines:
        short, colour = line.short, SERIES[line.colour % len(SERIES)]
        dashes = DASHES[line.colour // len(SERIES) % len(DASHES)]
        few = int(np.isfinite(short.values).sum()) <= 40
        axes.plot(
            short.steps, short.values, color=colour, linestyle=dashes, marker="o" if few else "", markersize=2.8,
            label=line.label, zorder=3 + 0.01 * line.colour,
        )  # fmt: skip
        if short.low is not None and short.high is not None:
            axes.fill_between(short.steps, short.low, short.high, color=colour, alpha=0.2, linewidth=0, zorder=2)
    axes.grid(axis="y", zorder=0)
    if chart.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=6))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_locator(MaxNLocator(8 if width > NARROW[0] else 5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    above = None if chart.log else _cut_off_the_beginning(axes, chart)
    _mark(axes, chart)
    return figure, axes, above


def _cut_off_the_beginning(axes: Any, chart: Chart) -> float | None:
    """Frame what follows the first twentieth of the steps where that would otherwise be flat; returns how high the
    rest goes."""
    values, later = [], []
    for line in chart.lines:
        short = line.short
        if len(short.steps) > 40:
            begin = short.steps[0] + 0.05 * (short.steps[-1] - short.steps[0])
            high = short.values if short.high is None else short.high
            low = short.values if short.low is None else short.low
            values += [high, low]
            later += [high[short.steps > begin], low[short.steps > begin]]
    if not values:
        return None
    whole, rest = np.concatenate(values), np.concatenate(later)
    if not np.isfinite(rest).any() or np.nanmax(rest) == np.nanmin(rest):
        return None
    top, end, least = float(np.nanmax(whole)), float(np.nanmax(rest)), float(np.nanmin(whole))
    if end - least > 0.4 * (top - least):
        return None
    axes.set_ylim(least - 0.06 * (end - least), end + 0.12 * (end - least))
    return top


def _mark(axes: Any, chart: Chart) -> None:
    """Starts and returns as lines across the frame, skipped steps and warnings as signs at its lower edge."""
    limits = axes.get_xlim()
    edge = axes.get_xaxis_transform()
    for event in chart.marks:
        if event.step is None or not limits[0] <= event.step <= limits[1]:
            continue
        if event.kind in ("start", "went back"):
            axes.axvline(event.step, color=MUTED, linewidth=0.9, linestyle=(0, (3, 2)), zorder=1)
        elif event.kind != "stopped":
            sign = "^" if event.kind == "skipped" else "D"
            axes.plot([event.step], [0.03], sign, color=ALARM, markersize=4, transform=edge, zorder=5, clip_on=False)
    axes.set_xlim(limits)


def _inline(svg: str, chart: Chart, wide: bool) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    own = re.sub(r"\W", "_", chart.name) + ("_w" if wide else "_n")
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{own}_\1"', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\1{own}_", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    size = re.search(r'viewBox="[^"]+"', svg)
    start = svg.index(">") + 1
    return f'<svg {size[0] if size else ""} role="img" aria-label="{_attribute(chart.title)}">{svg[start:].strip()}'


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")


def number(value: float) -> str:
    """A number as an axis has it: ``12k``, ``3.4M``, ``0.002``, ``3e-5``."""
    size = abs(value)
    if not math.isfinite(value):
        return "-"
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if letter == 'k' else limit):.4g}{letter}"
    if 0 < size < 1e-3:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.0f}" if size >= 1000 and value == round(value) else f"{value:.4g}"


def brief(value: float, digits: int = 3) -> str:
    """The same, of so many digits."""
    return number(float(f"{value:.{digits}g}"))


# --- heatmaps --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Palette:
    """Colours from the least to the greatest value, on the light page and on the dark one."""

    light: tuple[str, ...]
    dark: tuple[str, ...]


AROUND_EVEN = Palette(
    ("#1e3a8a", "#3b82f6", "#bfdbfe", "#f6f6f4", "#fed7aa", "#f97316", "#9a3412"),
    ("#93c5fd", "#3b82f6", "#1e3a6e", "#20242b", "#6b3410", "#ea6a12", "#fdba74"),
)
RISING = Palette(
    ("#f3f5f8", "#bcd7ee", "#6ba6d8", "#2563b0", "#1b2a6b"),
    ("#1d2128", "#1f3f6e", "#2f6fb3", "#6fb1ea", "#dbeefe"),
)

LOAD_OCTAVES = 3.0
"""Loads are shown from an eighth of the even one to eight times as much."""


def gradient(colours: Sequence[str]) -> str:
    """The palette as CSS draws it."""
    return f"linear-gradient(90deg, {', '.join(colours)})"


def heat_pngs(shares_RT: NDArray[np.float64], palette: Palette) -> tuple[str, str]:
    """Pictures with one pixel a value, R rows from the top and T columns, as addresses for the light and the dark page.

    Args:
        shares_RT: 0 to 1; NaN is transparent.
    """
    return _data_png(_colours(shares_RT, palette.light)), _data_png(_colours(shares_RT, palette.dark))


def _colours(shares_RT: NDArray[np.float64], colours: Sequence[str]) -> NDArray[np.uint8]:
    scale = LinearSegmentedColormap.from_list("", list(colours)).with_extremes(bad=(0, 0, 0, 0))
    return np.asarray(scale(np.ma.masked_invalid(shares_RT), bytes=True), dtype=np.uint8)


def _data_png(pixels_RT4: NDArray[np.uint8]) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels_RT4, "RGBA").save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def load_shares(ratios: NDArray[np.float64]) -> NDArray[np.float64]:
    """Loads over the even load as places in :data:`AROUND_EVEN`, by octaves, those outside at its ends."""
    octaves = np.log2(np.maximum(ratios, 2.0**-20))
    return np.asarray(np.clip(octaves / LOAD_OCTAVES, -1, 1) / 2 + 0.5)


def draw_heatmaps(panels: Sequence[tuple[str, NDArray[np.float64], str]], palette: Palette, title: str) -> bytes:
    """Heatmaps under each other as one PNG.

    Args:
        panels: for each its title, its values 0 to 1 (rows, columns), and what its rows are.
    """
    with rc_context(RC):
        columns = 1 if len(panels) < 4 else 2 if len(panels) < 13 else 4
        rows = -(-len(panels) // columns)
        width, height, head = 300.0 * columns, 118.0 * rows + 22, 16.0
        figure = Figure(figsize=(width / 72, height / 72))
        FigureCanvasAgg(figure)
        scale = LinearSegmentedColormap.from_list("", list(palette.light))
        for place, (name, values, what) in enumerate(panels):
            row, column = divmod(place, columns)
            bottom = height - head - 118.0 * (row + 1) + 12
            axes = figure.add_axes(((300.0 * column + 34) / width, bottom / height, 256 / width, 84 / height))
            axes.imshow(values, cmap=scale, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
            axes.set_title(name, fontsize=8, loc="left", pad=3)
            axes.set_xticks([])
            axes.set_ylabel(what, fontsize=7, labelpad=1)
            axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.tick_params(labelsize=6)
        figure.text(10 / width, 1 - 8 / height, textwrap.shorten(title, 75 * columns), va="top", fontsize=9)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=144, facecolor="white")
    return file.getvalue()
