"""``moe-scale report``: a page and pictures of runs, or a running one in the terminal."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from moe_scale.errors import ConfigError, Problem
from moe_scale.telemetry.provenance import write_atomically
from moe_scale.tools.arguments import not_empty, positive_number
from moe_scale.tools.report_charts import Chart, charts_of
from moe_scale.tools.report_data import RunData, open_runs
from moe_scale.tools.report_live import follow
from moe_scale.tools.report_maps import heat_blocks
from moe_scale.tools.report_page import facts_line, render
from moe_scale.tools.report_plots import AROUND_EVEN, RISING, draw_heatmaps, draw_png

PAGE = "report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The tool's flags."""
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", type=not_empty, help="folder of a run; of several they are compared"
    )
    parser.add_argument(
        "--output_dir", type=not_empty, help="folder of the page [RUN/report; of several runs, runs/report]"
    )
    parser.add_argument(
        "--live", action="store_true", help="follow one run in the terminal until it ends; writes nothing"
    )
    parser.add_argument(
        "--interval", type=positive_number, default=2.0, help="with --live, seconds between two looks [%(default)s]"
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> Path | None:
    """Write ``report.html`` and a PNG of every chart, and say where; or follow a run.

    Raises:
        ConfigError: when a folder is no run, or the page cannot be written.
    """
    if arguments.live:
        if len(arguments.runs) > 1:
            raise ConfigError(Problem("--live", "follows one run", f"give one of the {len(arguments.runs)}"))
        if arguments.output_dir:
            raise ConfigError(Problem("--output_dir", "--live writes nothing", "leave one of them out"))
        follow(arguments.runs[0], arguments.interval)
        return None
    runs = open_runs(arguments.runs)
    folder = _folder(arguments.output_dir, runs)
    page = write(runs, folder, datetime.now(UTC))
    print(f"{page}")
    return page


def _folder(wanted: str | None, runs: Sequence[RunData]) -> Path:
    """Where the page goes.

    Raises:
        ConfigError: if that is a folder with other things in it.
    """
    if wanted:
        folder = Path(wanted).expanduser()
    else:
        folder = runs[0].folder / "report" if len(runs) == 1 else Path("runs") / "report"
    if folder.exists() and not folder.is_dir():
        raise ConfigError(Problem("--output_dir", f"{folder} is a file", "give a folder"))
    try:
        if folder.is_dir() and any(folder.iterdir()) and not (folder / PAGE).is_file():
            raise ConfigError(
                Problem("--output_dir", f"{folder} holds other things", f"give a new folder, or one with a {PAGE}")
            )
    except OSError as error:
        raise ConfigError(Problem("--output_dir", f"{folder} cannot be read: {error.strerror}")) from None
    return folder


def write(runs: Sequence[RunData], folder: Path, now: datetime) -> Path:
    """Write the page and the pictures of runs into a folder; the page last. An earlier report there is replaced.

    Raises:
        ConfigError: if they cannot be written.
    """
    charts = charts_of(runs)
    page = render(runs, charts, now).encode()
    pictures = _pictures(runs, [chart for _, some in charts for chart in some])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in pictures.items():
            write_atomically(folder / name, content)
        write_atomically(folder / PAGE, page)
    except OSError as error:
        what = f"{folder} cannot be written: {error.strerror}"
        raise ConfigError(Problem("--output_dir", what, "give a folder of your own")) from None
    return folder / PAGE


def _suffixes(runs: Sequence[RunData]) -> list[str]:
    """What names of pictures of one run end with: its name as far as a file's may have it, and no two alike."""
    if len(runs) == 1:
        return [""]
    plain = ["-" + re.sub(r"[^\w.-]+", "-", run.name) for run in runs]
    return [name if plain.count(name) == 1 else f"{name}-{n + 1}" for n, name in enumerate(plain)]


def _pictures(runs: Sequence[RunData], charts: Sequence[Chart]) -> dict[str, bytes]:
    """All PNGs by their names: one a chart, and two of the layers and experts of each run."""
    source = ", ".join(run.name for run in runs[:4]) + (" ..." if len(runs) > 4 else "")
    source += f" | {facts_line(runs[0])}" if len(runs) == 1 else ""
    found = {f"{chart.name}.png": draw_png(chart, source) for chart in charts if not chart.is_point}
    for run, suffix in zip(runs, _suffixes(runs), strict=True):
        blocks = heat_blocks(run)
        for name, some, what in (
            ("experts", [block for block in blocks if block.palette is AROUND_EVEN], "expert"),
            ("layers", [block for block in blocks if block.palette is RISING], "layer"),
        ):
            panels = [
                (map.name if name == "experts" else f"{map.name}: {' to '.join(block.scale)}", map.shares_RT, what)
                for block in some
                for map in block.maps
            ]
            if panels:
                title = f"{some[0].title}, {some[0].note}" if name == "experts" else "By layer, each on its own scale"
                found[f"{name}{suffix}.png"] = draw_heatmaps(panels, some[0].palette, f"{run.name}: {title}")
    return found
