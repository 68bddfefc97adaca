"""The pictures of ``moe-scale experts``: load per layer and expert, and who uses which expert."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_scale.evaluate.expert_usage import Grouping, LayerUsage


def plot_load(usage: Mapping[str, LayerUsage], path: Path) -> None:
    """A row a layer, a column an expert: load over the mean, 1 is even."""
    plt = _pyplot()
    loads = [(layer.counts_E / layer.counts_E.mean().clamp(min=1e-12)).tolist() for layer in usage.values()]
    num_experts = len(loads[0])
    figure, axes = plt.subplots(
        figsize=(2.5 + 0.45 * min(num_experts, 40), 1.2 + 0.4 * len(loads)), layout="constrained"
    )
    highest = max(2.0, *(max(row) for row in loads))
    image = axes.imshow(loads, vmin=0, vmax=highest, cmap="viridis", aspect="auto")
    _label(axes, list(usage), num_experts)
    axes.set_title("Load of each expert over the mean of its layer")
    figure.colorbar(image, ax=axes)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_groups(usage: Mapping[str, LayerUsage], grouping: str, path: Path) -> None:
    """A panel a layer: the share of each group's choices that each expert gets, over what it gets of all.

    Groups without a token in a layer are left out, and layers with one group; without any layer there is no picture.
    """
    seen = {name: layer.groupings[grouping].occurring() for name, layer in usage.items()}
    panels = {name: found for name, found in seen.items() if len(found.groups) > 1}
    if not panels:
        return
    plt = _pyplot()
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    groups = max(len(found.groups) for found in panels.values())
    figure, axes_of = plt.subplots(
        rows, columns, figsize=(5.2 * columns, 0.4 + (1.3 + 0.28 * groups) * rows), layout="constrained", squeeze=False
    )
    for axes in axes_of.flat[len(panels) :]:
        axes.axis("off")
    for axes, (name, found) in zip(axes_of.flat, panels.items(), strict=False):
        image = axes.imshow(_lift(found), vmin=0, vmax=3, cmap="viridis", aspect="auto")
        _label(axes, found.groups, found.counts_GE.shape[1])
        axes.set_title(f"{name}: {found.mutual_information:.3f} of {found.entropy:.2f} bits", fontsize=10)
    figure.suptitle(f"An expert's share of each {grouping} over its share of all tokens")
    figure.colorbar(image, ax=axes_of, extend="max")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _lift(found: Grouping) -> list[list[float]]:
    """p(expert | group) / p(expert)."""
    overall_E = found.counts_GE.sum(dim=0) / found.counts_GE.sum()
    lift: list[list[float]] = (found.shares() / overall_E.clamp(min=1e-12)).tolist()
    return lift


def _label(axes: Any, rows: list[str], num_experts: int) -> None:
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set_xticks(range(0, num_experts, max(1, num_experts // 16)))
    axes.set_xlabel("expert")


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
