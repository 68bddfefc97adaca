"""``moe-scale plan``: what a run needs and how fast it is, on a cluster that need not be there.

Parameters, FLOPs, memory a rank, traffic, time of a step, and days and cost of a token budget, from a recipe and its
settings. Nothing is trained, no process group is made, and no GPU is needed.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from moe_scale.errors import Problem, raise_if
from moe_scale.planner.cluster import GB, PRESETS, Cluster, preset
from moe_scale.planner.model import read_subject
from moe_scale.planner.plan import DISK_RATE, Wishes, make_plan
from moe_scale.planner.report import show
from moe_scale.planner.timing import Rates, read_rates
from moe_scale.telemetry.provenance import package_versions, source_state
from moe_scale.tools.arguments import positive, positive_number
from moe_scale.tools.compare import load_recipe

FIGURES = {
    "device_memory_gb": ("device_memory", GB, "memory of a device, GB"),
    "host_memory_gb": ("host_memory", GB, "memory of a host, GB"),
    "memory_gbps": ("memory_bandwidth", GB, "bandwidth of a device's memory, GB/s"),
    "intra_gbps": ("intra_bandwidth", GB, "what a device sends inside its node, GB/s"),
    "inter_gbps": ("inter_bandwidth", GB, "what a device sends to other nodes, GB/s"),
    "host_gbps": ("host_bandwidth", GB, "between a device and its host, GB/s"),
    "intra_latency_us": ("intra_latency", 1e-6, "of a message inside a node, microseconds"),
    "inter_latency_us": ("inter_latency", 1e-6, "of a message between nodes, microseconds"),
    "reserved_gb": ("reserved_memory", GB, "of a device, for context and libraries, GB"),
    "peak_tflops": ("peak", 1e12, "dense peak of a device in the run's precision, TFLOP/s"),
}
"""Figures of a preset that a flag replaces: field, unit, help."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The tool's own flags; whatever else is given goes to the recipe."""
    parser.add_argument("recipe", help="file of the recipe, as recipes/lm_16l.py; its settings follow")
    parser.add_argument("--cluster", default="H100", help=f"kind of device: {', '.join(PRESETS)} [%(default)s]")
    parser.add_argument("--nodes", type=positive, default=1, help="nodes [%(default)s]")
    parser.add_argument("--devices_per_node", type=positive, default=None, help="ranks of a node [8; of a CPU 1]")
    for flag, (_, _, text) in FIGURES.items():
        parser.add_argument(f"--{flag}", type=positive_number, default=None, help=f"{text} [the preset's]")
    parser.add_argument("--tokens", type=positive_number, default=None, help="budget, as 1e12 [that of max_steps]")
    parser.add_argument("--price", type=positive_number, default=None, help="of a device-hour, in any currency")
    parser.add_argument(
        "--one_document", action="store_true", help="sequences lie inside one document: attention needs no mask"
    )
    parser.add_argument(
        "--imbalance", type=positive_number, default=1.0, help="rows of the fullest rank over the mean [%(default)s]"
    )
    parser.add_argument(
        "--disk_gbps", type=positive_number, default=DISK_RATE / GB, help="a rank writes a checkpoint at, GB/s [1]"
    )
    parser.add_argument("--calibration", default="", help="rates that moe-scale bench --calibrate measured")
    parser.add_argument("--output_dir", default="", help="also write plan.json there")


def run(arguments: argparse.Namespace, recipe_argv: list[str]) -> dict[str, Any]:
    """Print the plan, and write it into a folder."""
    raise_if(_problems(arguments))
    cluster = cluster_of(arguments)
    recipe = load_recipe(Path(arguments.recipe))
    rates = read_rates(arguments.calibration) if arguments.calibration else Rates()
    subject = read_subject(recipe, recipe_argv, cluster)
    plan = make_plan(subject, wishes_of(arguments), rates)
    show(plan)
    record = plan.record()
    if arguments.output_dir:
        write(Path(arguments.output_dir), record)
    return record


def cluster_of(arguments: argparse.Namespace) -> Cluster:
    """The preset with what the command line replaces."""
    given = {field: getattr(arguments, flag) for flag, (field, _, _) in FIGURES.items()}
    scaled = {
        field: None if v is None else v * unit
        for (field, unit, _), v in zip(FIGURES.values(), given.values(), strict=True)
    }
    return preset(arguments.cluster, nodes=arguments.nodes, devices_per_node=arguments.devices_per_node, **scaled)


def wishes_of(arguments: argparse.Namespace) -> Wishes:
    return Wishes(
        tokens=arguments.tokens,
        price=arguments.price,
        masked=not arguments.one_document,
        imbalance=arguments.imbalance,
        disk_rate=arguments.disk_gbps * GB,
    )


def write(folder: Path, record: dict[str, Any]) -> None:
    """``plan.json``, with what made it."""
    made_by = {"versions": package_versions(), "source": source_state(Path(__file__).resolve().parents[1])[0]}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(json.dumps(record | made_by, indent=1) + "\n")
    print(f"wrote {folder / 'plan.json'}")


def _problems(arguments: argparse.Namespace) -> list[Problem]:
    found = []
    if arguments.imbalance < 1:
        found.append(Problem("--imbalance", f"{arguments.imbalance}", "the fullest rank has at least the mean: from 1"))
    if arguments.output_dir:
        folder = Path(arguments.output_dir)
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if (folder / "plan.json").exists():
            found.append(Problem("--output_dir", f"{folder} holds a plan already", "name a new folder"))
        elif not existing.is_dir() or not os.access(existing, os.W_OK):
            found.append(Problem("--output_dir", f"{folder} cannot be written", "name another folder"))
    return found
