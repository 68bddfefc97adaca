"""The picture of ``moe-scale compare``: loss curves over each other, load per expert, time of a layer by part."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def plot(rows: Sequence[Row], path: Path) -> None:
    """Write the three panels of ``rows``, as ``compare.json`` holds them, to a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (loss, load, time) = plt.subplots(1, 3, figsize=(18, 4.5), layout="constrained")
    _plot_loss(loss, [row for row in rows if row["losses"]])
    _plot_load(load, [row for row in rows if row["load"]])
    _plot_time(time, rows)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _plot_loss(axes: Any, rows: Sequence[Row]) -> None:
    for width, row in zip(range(2 * len(rows), 0, -2), rows, strict=True):
        # Thick under thin: curves that coincide stay visible.
        axes.plot(*zip(*row["losses"], strict=True), label=row["variant"], linewidth=width, alpha=0.7)
    axes.set(xlabel="step", ylabel="loss, nats a token", title="Training loss")
    axes.legend()


def _plot_load(axes: Any, rows: Sequence[Row]) -> None:
    for place, row in enumerate(rows):
        total = [sum(layer) for layer in zip(*row["load"], strict=True)]
        share = [count / sum(total) for count in total]
        positions = [expert + place * 0.8 / len(rows) for expert in range(len(share))]
        axes.bar(positions, share, width=0.8 / len(rows), label=row["variant"])
    axes.set(xlabel="expert", ylabel="share of assignments, all layers", title="Load in the last logged step")
    if rows:
        axes.legend()


def _plot_time(axes: Any, rows: Sequence[Row]) -> None:
    """A bar for each variant, forward and backward; below them the steps of the custom layer."""
    bars: list[tuple[str, dict[str, float]]] = [
        (row["variant"], {"forward": row["layer_forward_ms"], "backward": row["layer_backward_ms"]}) for row in rows
    ]
    parts: dict[str, dict[str, float]] = next((row["layer_parts"] for row in rows if row.get("layer_parts")), {})
    bars += [
        (f"custom: {part}", {way: times[f"{way}_ms"] for way in ("forward", "backward")})
        for part, times in parts.items()
    ]
    names = [name for name, _ in bars]
    forward = [times["forward"] for _, times in bars]
    axes.barh(names, forward, label="forward")
    axes.barh(names, [times["backward"] for _, times in bars], left=forward, label="backward")
    axes.invert_yaxis()
    axes.set(xlabel="ms", title="Time of one layer, and of the custom layer by part")
    axes.legend()
