"""``moe-scale compare``: the MoE backends, and a dense model of equal active FLOPs, side by side.

Each variant trains from the same initial weights on the same batches, one after the other in one start, so a comparison
runs as a recipe does: in one process, or as ranks of ``deepspeed``, ``torchrun`` or ``srun``. Before that, rank 0 times
one layer of each variant, and Hugging Face's, at the shape of the recipe's micro-batch.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import statistics
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.table import Column, Table
from torch import Tensor

from moe_scale.errors import ConfigError, Problem
from moe_scale.parallel import device as devices
from moe_scale.parallel import launch as launches
from moe_scale.parallel import zero
from moe_scale.telemetry.provenance import package_versions, source_state
from moe_scale.telemetry.terminal import Console
from moe_scale.tools.arguments import positive
from moe_scale.tools.compare_plot import plot
from moe_scale.tools.layer_comparison import HUGGING_FACE, LayerShape, compare_layers, hugging_face_problems
from moe_scale.tools.tables import markdown
from moe_scale.train.loop import train
from moe_scale.train.recipe import Job, Recipe, prepare_job

VARIANTS = {
    "custom": ["--moe.backend", "custom"],
    "deepspeed": ["--moe.backend", "deepspeed"],
    "autoep": ["--moe.backend", "autoep"],
    "dense": ["--moe.enabled", "false"],
    "triton": ["--moe.backend", "custom", "--moe.kernels", "triton"],
}
"""What is trained, and the settings that make it."""
CHOICES = {
    **dict.fromkeys(("custom", "deepspeed", "autoep"), "that backend"),
    "triton": "custom with the Triton kernels, on a GPU; left out unless named",
    "dense": "a dense model of equal active FLOPs",
    HUGGING_FACE: "Hugging Face's Qwen3-MoE block, grouped_mm; its layer alone",
}
DEFAULT_CHOICES = [name for name in CHOICES if name != "triton"]
NOT_GIVEN = {
    **dict.fromkeys(("--moe.backend", "--moe.enabled", "--resume"), "is what a comparison varies"),
    "--early_stopping.metric": "would end the variants at different steps",
}
"""Flags that a recipe has and a comparison refuses, and why."""
Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The tool's own flags; whatever else is given goes to the recipe."""
    parser.add_argument("recipe", help="file of the recipe, as recipes/lm_16l.py")
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=CHOICES,
        default=DEFAULT_CHOICES,
        help="what to compare [%(default)s]: " + "; ".join(f"{name} = {text}" for name, text in CHOICES.items()),
    )
    parser.add_argument("--rounds", type=positive, default=10, help="counted rounds of timing a layer [%(default)s]")
    parser.add_argument("--output_dir", default="runs/compare", help="folder of the comparison [%(default)s]")


def run(arguments: argparse.Namespace, recipe_argv: list[str]) -> list[Row]:
    """Measure every variant, then print a table and write ``compare.json``, ``compare.md`` and ``compare.png``.

    Args:
        arguments: of :func:`add_arguments`.
        recipe_argv: settings of the recipe, the same for every variant.

    Raises:
        ConfigError: before anything is trained, when a variant cannot run with these settings or the folder is taken.
    """
    folder = Path(arguments.output_dir).expanduser()
    recipe = load_recipe(Path(arguments.recipe))
    variants = list(dict.fromkeys(arguments.variants))
    jobs = _prepare(recipe, variants, recipe_argv, folder)
    layers = _compare_layers(variants, next(iter(jobs.values())), arguments.rounds)
    rows = []
    for name, job in jobs.items():
        devices.reset_peak_memory(job.device)
        with counted_all_to_all() as sent:
            train(job)
        if job.launch.is_main:
            rows.append(summarize(name, job, sent[0]) | layers[name])
    if rows:
        _add_differences(rows)
        if HUGGING_FACE in layers:
            rows.append(dict.fromkeys(rows[0]) | {"variant": HUGGING_FACE} | layers[HUGGING_FACE])
        write_report(rows, folder)
    dist.barrier()
    dist.destroy_process_group()
    return rows


def load_recipe(path: Path) -> Recipe:
    """The ``RECIPE`` that a recipe's file defines.

    Raises:
        ConfigError: if the file is not there, does not run, or defines none.
    """
    example = "for example recipes/lm_16l.py"
    if not path.is_file():
        raise ConfigError(Problem("recipe", f"{path} is no file", example, this_host_only=True))
    spec = importlib.util.spec_from_file_location(f"recipe {path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(Problem("recipe", f"{path} is no Python file", example))
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever a user's file may do
        del sys.modules[spec.name]
        what = f"{type(error).__name__}: {error}".rstrip(": ")
        raise ConfigError(Problem("recipe", f"{path}{_line_of(error, path)} cannot be loaded: {what}")) from None
    if not isinstance(getattr(module, "RECIPE", None), Recipe):
        raise ConfigError(Problem("recipe", f"{path} defines no RECIPE", example))
    return module.RECIPE


def _line_of(error: BaseException, path: Path) -> str:
    """``:12``, the line of ``path`` that raised the error, where one did."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    number = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else lines[-1] if lines else None
    return f":{number}" if number else ""


def _prepare(recipe: Recipe, variants: list[str], argv: list[str], folder: Path) -> dict[str, Job]:
    """The jobs of all that is trained, checked before the first one starts; the problems of all variants at once."""
    jobs: dict[str, Job] = {}
    problems = [
        Problem(flag, what, f"leave it out; --variants chooses from {', '.join(CHOICES)}")
        for flag, what in NOT_GIVEN.items()
        if any(word == flag or word.startswith(f"{flag}=") for word in argv)
    ]
    trained = [name for name in variants if name in VARIANTS]
    for name in trained:
        # Curves are held against each other step by step: all variants take all steps.
        fixed = ["--resume", "never", "--early_stopping.metric", "", "--output_dir", str(folder / name)]
        try:
            jobs[name] = prepare_job(recipe, [*argv, *VARIANTS[name], *fixed])
        except ConfigError as error:
            problems += error.problems
    if _holds_a_comparison(folder):
        here = f"{folder} already holds a comparison"
        problems = [p for p in problems if p.where != "output_dir"]
        problems.append(Problem("output_dir", here, "choose another --output_dir", this_host_only=True))
    if not trained:
        problems.append(Problem("--variants", f"{HUGGING_FACE} alone", "add one that is trained, as custom"))
    for job in list(jobs.values())[:1]:
        if not hasattr(getattr(job.config, "model", None), "d_model"):
            problems.append(Problem("recipe", f"{recipe.name} has no model.d_model", "choose one with sparse layers"))
        if HUGGING_FACE in variants:
            problems += hugging_face_problems(job.config.moe)
    if problems:
        raise ConfigError(dict.fromkeys(problems))
    return jobs


def _holds_a_comparison(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("compare.json", *(f"{v}/run.json" for v in VARIANTS)))


def _compare_layers(variants: list[str], job: Job, rounds: int) -> dict[str, Row]:
    """The layers' figures, on rank 0; the other ranks wait for it and get none."""
    if job.device.is_cpu:
        devices.keep_freed_memory()
    launches.export(job.launch)
    zero.init_distributed()
    rows: dict[str, Row] = {}
    if job.launch.is_main:
        config: Any = job.config
        seq_len = job.task.tokens_per_sequence
        shape = LayerShape(job.plan.micro_batch, seq_len, config.model.d_model, job.plan.precision)
        print(f"timing one layer of {', '.join(variants)}: {shape}", flush=True)
        rows = compare_layers(variants, config.moe, shape, devices.current(), rounds=rounds)
        for row in rows.values():
            row |= {"layer_shape": str(shape), "layer_rounds": rounds}
    dist.barrier()
    return rows


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
    "layer_difference": ("layer: output difference", "{:.1e}"),
    "layer_forward_ms": ("layer: ms forward", "{:,.2f}"),
    "layer_backward_ms": ("layer: ms backward", "{:,.2f}"),
    "layer_peak_bytes": ("layer: peak memory, MiB", "{:,.1f}"),
    "tokens_per_s": ("tokens/s", "{:,.0f}"),
    "step_ms": ("ms a step", "{:,.0f}"),
    "peak_memory_bytes": ("peak memory, MiB", "{:,.0f}"),
    "all_to_all_bytes_per_step": ("all-to-all, KiB a step", "{:,.0f}"),
    "dropped_share": ("dropped", "{:.2%}"),
    "load_max": ("max/mean load", "{:.2f}"),
}
_SCALE = {"layer_peak_bytes": 2**20, "peak_memory_bytes": 2**20, "all_to_all_bytes_per_step": 2**10}


def write_report(rows: list[Row], folder: Path) -> None:
    """``compare.json``, ``compare.md`` and ``compare.png`` in the folder, and the table on the terminal."""
    (folder / "compare.json").write_text(json.dumps(rows, indent=1) + "\n")
    cells = [[row["variant"], *(_cell(row, key) for key in COLUMNS)] for row in rows]
    header = ["variant", *(title for title, _ in COLUMNS.values())]
    notes = _notes(rows)
    (folder / "compare.md").write_text(
        f"{markdown(header, cells)}\n\n{notes}\n\n![Loss, load, time of a layer](compare.png)\n"
    )
    plot(rows, folder / "compare.png")
    table = Table(*(Column(title, overflow="fold") for title in header))
    for line in cells:
        table.add_row(*line)
    Console(file=sys.stdout, width=190).print(table)
    print(notes)
    print(f"wrote compare.json, compare.md and compare.png to {folder}")


def _notes(rows: list[Row]) -> str:
    """What the table's figures are, and where they come from."""
    first = rows[0]
    versions = package_versions()
    software = ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "deepspeed", "transformers"))
    source, _ = source_state(Path(__file__).resolve().parents[1])
    commit = f"commit {source['commit'][:12]}{' and changes' if source['dirty'] else ''}" if source else "no commit"
    reference = next((row["variant"] for row in rows if row["variant"] != "dense"), "")
    return (
        f"{first['steps']} steps on {first['world_size']} x {first['device']}, ep_size {first['ep_size']}; losses are "
        f"compared with those of {reference or 'nothing'}. Layer: one with all experts on rank 0, "
        f"{first['layer_shape']}, median of {first['layer_rounds']} rounds in turn; its difference is from custom with "
        f"the same weights in fp32, as a share of the largest output, its peak memory what a step allocates beyond the "
        f"weights. {software}; {commit}."
    )


def _cell(row: Row, key: str) -> str:
    value = row[key]
    return "" if value is None else COLUMNS[key][1].format(value / _SCALE.get(key, 1))
