"""What pruning cost, as a table: size, and held-out loss before, after, and after a recovery."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from moe_scale.errors import ConfigError, Problem
from moe_scale.telemetry.provenance import write_atomically
from moe_scale.telemetry.records import finite
from moe_scale.telemetry.terminal import Console
from moe_scale.tools.prune_choice import Choice, Method
from moe_scale.tools.tables import markdown

FULL = "all experts"
"""Name of the row of the model that was pruned."""


@dataclass(frozen=True)
class Row:
    """A model of the table.

    Attributes:
        name: of the method, or :data:`FULL`.
        method: None of the model that was pruned.
        num_experts: of a layer.
        parameters, active_parameters: all, and those that a token uses.
        size_bytes: of all weights, as they are stored.
        loss: held-out loss, nats a token.
        recovered_loss: the same after the recovery; None without one.
        choice: which experts are kept.
        folder: where the model is.
    """

    name: str
    method: Method | None
    num_experts: int
    parameters: int
    active_parameters: int
    size_bytes: int
    loss: float
    recovered_loss: float | None
    choice: Choice
    folder: str

    @property
    def usage_kept(self) -> float:
        """Share of the choices that fell on kept experts, averaged over layers."""
        return statistics.fmean(layer.usage_kept for layer in self.choice.values()) if self.choice else 1.0

    @property
    def moved(self) -> float:
        """Squared distance of a layer's output from what it was over its squared norm, averaged over layers."""
        return statistics.fmean(layer.moved for layer in self.choice.values()) if self.choice else 0.0


def table_of(rows: Sequence[Row], steps: int) -> tuple[list[str], list[list[str]]]:
    """Header and cells.

    Args:
        rows: the full model first.
        steps: of the recovery; 0 without one.
    """
    header = ["kept by", "experts", "parameters", "active", "MB", "choices kept", "layer output moved"]
    header += ["loss before", "after pruning", *([f"after {steps:,} steps"] if steps else [])]
    cells = []
    for row in rows:
        full = row.method is None
        line = [row.name, str(row.num_experts), f"{row.parameters:,}", f"{row.active_parameters:,}"]
        line += [f"{row.size_bytes / 1e6:,.1f}", *(["", ""] if full else [f"{row.usage_kept:.1%}", f"{row.moved:.1%}"])]
        line += [f"{rows[0].loss:.4f}", "" if full else f"{row.loss:.4f}"]
        recovered = "" if row.recovered_loss is None else f"{row.recovered_loss:.4f}"
        cells.append([*line, *([recovered] if steps else [])])
    return header, cells


def verdicts(rows: Sequence[Row], steps: int) -> list[str]:
    """How each ranking does against the random draws, a sentence each; none without draws."""
    draws = [row for row in rows if row.method and row.method.by == "random"]
    if not draws:
        return []
    columns = {"after pruning": [row.loss for row in draws]}
    recovered = [row.recovered_loss for row in draws if row.recovered_loss is not None]
    if len(recovered) == len(draws):
        columns[f"after {steps:,} steps"] = recovered
    lines = [f"Random over {len(draws)} seeds: " + "; ".join(f"{n} {_spread(values)}" for n, values in columns.items())]
    for row in rows:
        if row.method is None or row in draws:
            continue
        own = [row.loss, *([] if row.recovered_loss is None else [row.recovered_loss])]
        told = [f"{name} {_against(loss, columns[name])}" for name, loss in zip(columns, own, strict=False)]
        lines.append(f"{row.name}: " + "; ".join(told))
    return [f"{line}." for line in lines]


def _spread(values: Sequence[float]) -> str:
    """Mean, standard deviation and range."""
    deviation = f" +- {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{deviation} ({min(values):.4f} to {max(values):.4f})"


def _against(value: float, draws: Sequence[float]) -> str:
    better = sum(value < draw for draw in draws)
    gap = statistics.fmean(draws) - value
    where = f"{abs(gap):.4f} {'below' if gap >= 0 else 'above'} their mean"
    return f"{where}, better than {better} of {len(draws)}"


def write_report(rows: Sequence[Row], facts: Mapping[str, Any], folder: Path) -> None:
    """``prune.json`` and ``prune.md`` in the folder, in the place of earlier ones.

    Raises:
        ConfigError: if they cannot be written.
    """
    header, cells = table_of(rows, facts["recovery_steps"])
    notes = _notes(rows, facts)
    content = finite({**facts, "notes": notes, "models": [_plain(row) for row in rows]})
    how = f"`{facts['command']}`, commit {facts['commit']}."
    text = "\n\n".join([f"# {_title(rows, facts)}", markdown(header, cells), *notes, how]) + "\n"
    try:
        write_atomically(folder / "prune.json", json.dumps(content, indent=1).encode() + b"\n")
        write_atomically(folder / "prune.md", text.encode())
    except OSError as error:
        raise ConfigError(Problem("--output_dir", f"{folder} cannot be written: {error.strerror}")) from None


def show_report(rows: Sequence[Row], facts: Mapping[str, Any], folder: Path) -> None:
    """The table on the terminal."""
    header, cells = table_of(rows, facts["recovery_steps"])
    table = Table(*header, title=_title(rows, facts), title_justify="left")
    for line in cells:
        table.add_row(*line)
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 190).print(table)
    print("\n".join(_notes(rows, facts)))
    print(f"wrote {folder}")


def _title(rows: Sequence[Row], facts: Mapping[str, Any]) -> str:
    return f"{facts['run']}, step {facts['step']:,}: {rows[-1].num_experts} of {rows[0].num_experts} experts a layer"


def _notes(rows: Sequence[Row], facts: Mapping[str, Any]) -> list[str]:
    return [_explained(facts), *verdicts(rows, facts["recovery_steps"])]


def _explained(facts: Mapping[str, Any]) -> str:
    told = (
        f"Losses are nats a token over {facts['heldout_tokens']:,} held-out tokens, in fp32. Rankings are from "
        f"{facts['calibration_tokens']:,} tokens of training text: choices kept is the share of them that fell on kept "
        "experts, and layer output moved the squared distance of a layer's output from what it was over its squared "
        "norm, both averaged over layers."
    )
    if facts["recovery_steps"]:
        told += f" Recovery is {facts['recovery_tokens']:,} tokens of training text."
    return told


def _plain(row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "num_experts": row.num_experts,
        "parameters": row.parameters,
        "active_parameters": row.active_parameters,
        "bytes": row.size_bytes,
        "loss": row.loss,
        "recovered_loss": row.recovered_loss,
        "usage_kept": row.usage_kept,
        "layer_output_moved": row.moved,
        "folder": row.folder,
        "layers": {
            name: {
                "groups": [list(group) for group in layer.groups],
                "usage": layer.usage_E.tolist(),
                "moved": layer.moved,
            }
            for name, layer in row.choice.items()
        },
    }
