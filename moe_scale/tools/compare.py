"""``moe-scale compare``: the MoE backends, and a dense model of equal active FLOPs, side by side in training.

Each variant trains from the same initial weights on the same batches, one after the other in one start, so a comparison
runs as a recipe does: in one process, or as ranks of ``deepspeed``, ``torchrun`` or ``srun``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

from moe_scale.errors import ConfigError, Problem
from moe_scale.parallel.device import reset_peak_memory
from moe_scale.train.loop import train
from moe_scale.train.recipe import Job, Recipe, prepare_job

VARIANTS = {
    "custom": ["--moe.backend", "custom"],
    "deepspeed": ["--moe.backend", "deepspeed"],
    "autoep": ["--moe.backend", "autoep"],
    "dense": ["--moe.enabled", "false"],
    "triton": ["--moe.backend", "custom", "--moe.kernels", "triton"],
}
DEFAULT_VARIANTS = ["custom", "deepspeed", "autoep", "dense"]
Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The tool's own flags; whatever else is given goes to the recipe."""
    parser.add_argument("recipe", help="file of the recipe, as recipes/lm_16l.py")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=DEFAULT_VARIANTS, help="what to train [%(default)s]"
    )
    parser.add_argument("--output_dir", default="runs/compare", help="folder of the comparison [%(default)s]")


def run(arguments: argparse.Namespace, recipe_argv: list[str]) -> list[Row]:
    """Train every variant, then print a table and write ``compare.json``, ``compare.md`` and ``compare.png``.

    Args:
        arguments: of :func:`add_arguments`.
        recipe_argv: settings of the recipe, the same for every variant.

    Raises:
        ConfigError: before anything is trained, when a variant cannot run with these settings.
    """
    folder = Path(arguments.output_dir)
    recipe = load_recipe(Path(arguments.recipe))
    jobs = _prepare(recipe, arguments.variants, recipe_argv, folder)
    rows = []
    for name, job in jobs.items():
        reset_peak_memory(job.device)
        with counted_all_to_all() as sent:
            train(job)
        if job.launch.is_main:
            rows.append(summarize(name, job, sent[0]))
    dist.barrier()
    if rows:
        _add_differences(rows)
        write_report(rows, folder)
    dist.destroy_process_group()
    return rows


def load_recipe(path: Path) -> Recipe:
    """The ``RECIPE`` that a recipe's file defines."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ConfigError(Problem("recipe", f"{path} is no Python file", "for example recipes/lm_16l.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not isinstance(getattr(module, "RECIPE", None), Recipe):
        raise ConfigError(Problem("recipe", f"{path} defines no RECIPE", "for example recipes/lm_16l.py"))
    return module.RECIPE


def _prepare(recipe: Recipe, variants: list[str], argv: list[str], folder: Path) -> dict[str, Job]:
    """All jobs, checked before the first one starts; the problems of all variants at once."""
    jobs: dict[str, Job] = {}
    problems: list[Problem] = []
    for name in variants:
        try:
            jobs[name] = prepare_job(recipe, [*argv, *VARIANTS[name], "--output_dir", str(folder / name)])
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(dict.fromkeys(problems))
    return jobs


@contextlib.contextmanager
def counted_all_to_all() -> Iterator[list[int]]:
    """Count what this rank sends by all-to-all inside the context; the list's one entry is the bytes."""
    sent, original = [0], dist.all_to_all_single

    def counting(output: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent[0] += input.numel() * input.element_size()
        return original(output, input, *args, **kwargs)

    dist.all_to_all_single = counting
    try:
        yield sent
    finally:
        dist.all_to_all_single = original


def summarize(name: str, job: Job, all_to_all_bytes: int) -> Row:
    """One row of the comparison, from what the variant's run wrote."""
    records = [json.loads(line) for line in (job.run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if "loss" in r]
    last = steps[-1]
    dropped, load = last.get("router/dropped"), last.get("router/load_max")
    return {
        "variant": name,
        "steps": last["step"],
        "loss": last["lm_loss"],
        "heldout_loss": next((r["eval/loss"] for r in reversed(records) if "eval/loss" in r), None),
        "largest_difference": None,
        "tokens_per_s": statistics.median(r["tokens_per_s"] for r in steps),
        "step_ms": 1e3 * statistics.median(r["step_time_s"] for r in steps),
        # A CPU's figure is that of the whole process, which the variants before have left their mark on.
        "peak_memory_bytes": None if job.device.is_cpu else last["memory_bytes"],
        "all_to_all_bytes_per_step": all_to_all_bytes / last["step"],
        "dropped_share": statistics.mean(dropped) if dropped else None,
        "load_max": statistics.mean(load) if load else None,
        "world_size": job.launch.world_size,
        "ep_size": job.config.moe.ep_size,
        "device": job.device.name,
        "losses": [(r["step"], r["lm_loss"]) for r in steps],
        "load": last.get("router/tokens_per_expert"),
    }


def _add_differences(rows: list[Row]) -> None:
    """The largest difference of any logged loss from the first sparse variant's."""
    sparse = [row for row in rows if row["variant"] != "dense"]
    for row in sparse[1:]:
        pairs = zip(row["losses"], sparse[0]["losses"], strict=True)
        row["largest_difference"] = max(abs(mine[1] - first[1]) for mine, first in pairs)


COLUMNS = {
    "loss": ("loss", "{:.4f}"),
    "heldout_loss": ("held-out loss", "{:.4f}"),
    "largest_difference": ("largest loss difference", "{:.1e}"),
    "tokens_per_s": ("tokens/s", "{:,.0f}"),
    "step_ms": ("ms a step", "{:,.0f}"),
    "peak_memory_bytes": ("peak memory, MiB", "{:,.0f}"),
    "all_to_all_bytes_per_step": ("all-to-all, KiB a step", "{:,.0f}"),
    "dropped_share": ("dropped", "{:.2%}"),
    "load_max": ("max/mean load", "{:.2f}"),
}
_SCALE = {"peak_memory_bytes": 2**20, "all_to_all_bytes_per_step": 2**10}


def write_report(rows: list[Row], folder: Path) -> None:
    """``compare.json``, ``compare.md`` and ``compare.png`` in the folder, and the table on the terminal."""
    (folder / "compare.json").write_text(json.dumps(rows, indent=1) + "\n")
    cells = [[row["variant"], *(_cell(row, key) for key in COLUMNS)] for row in rows]
    header = ["variant", *(title for title, _ in COLUMNS.values())]
    lines = [header, ["---"] * len(header), *cells]
    (folder / "compare.md").write_text("".join("| " + " | ".join(line) + " |\n" for line in lines))
    table = Table(*header)
    for line in cells:
        table.add_row(*line)
    Console(file=sys.stdout, width=160).print(table)
    _plot(rows, folder / "compare.png")
    print(f"wrote compare.json, compare.md and compare.png to {folder}")


def _cell(row: Row, key: str) -> str:
    value = row[key]
    return "" if value is None else COLUMNS[key][1].format(value / _SCALE.get(key, 1))


def _plot(rows: list[Row], path: Path) -> None:
    """Loss curves over each other, and the load of each expert in the last logged step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (loss, load) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    for width, row in zip(range(2 * len(rows), 0, -2), rows, strict=True):
        # Thick under thin: curves that coincide stay visible.
        loss.plot(*zip(*row["losses"], strict=True), label=row["variant"], linewidth=width, alpha=0.7)
    loss.set(xlabel="step", ylabel="loss, nats a token", title="Training loss")
    loss.legend()
    sparse = [row for row in rows if row["load"]]
    for place, row in enumerate(sparse):
        total = [sum(layer) for layer in zip(*row["load"], strict=True)]
        share = [count / sum(total) for count in total]
        positions = [expert + place * 0.8 / len(sparse) for expert in range(len(share))]
        load.bar(positions, share, width=0.8 / len(sparse), label=row["variant"])
    load.set(xlabel="expert", ylabel="share of assignments, all layers", title="Load in the last logged step")
    if sparse:
        load.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)
