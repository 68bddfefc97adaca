"""A table as Markdown, and on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table


def markdown(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Lines of a Markdown table."""
    lines = [header, ["---"] * len(header), *cells]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def rich_table(header: Sequence[str], cells: Sequence[Sequence[str]], title: str | None = None) -> Table:
    """For a console; long cells are folded rather than cut."""
    table = Table(title=title, title_justify="left")
    for name in header:
        table.add_column(name, overflow="fold")
    for line in cells:
        table.add_row(*line)
    return table
