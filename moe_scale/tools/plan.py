"""``moe-scale plan``: what a run needs and how fast it is, on a cluster that need not be there.

Parameters, FLOPs, memory a rank, traffic, time of a step, and days and cost of a token budget, from a recipe and its
settings; of recipes whose model is no decoder, parameters and model states, and what machines hold them. Nothing is
trained, no process group is made, and no GPU is needed.
"""

from __future__ import annotations

import argparse
import json
import shlex
import tempfile
from pathlib import Path
from typing import Any

from moe_scale.errors import ConfigError, Problem, raise_if
from moe_scale.planner.cluster import GB, PRESETS, Cluster, preset
from moe_scale.planner.model import Subject, read_subject
from moe_scale.planner.plan import DISK_RATE, Plan, Wishes, make_plan
from moe_scale.planner.report import show, show_search, show_simulation, show_states
from moe_scale.planner.search import Layout, flags, search
from moe_scale.planner.simulate import MOST_RANKS, Simulation, simulate_plan
from moe_scale.planner.states import plan_states
from moe_scale.planner.timing import Rates, calibration_problems, read_rates
from moe_scale.telemetry.provenance import package_versions, source_state
from moe_scale.tools.arguments import not_negative, not_negative_number, positive, positive_number
from moe_scale.tools.compare import load_recipe
from moe_scale.train.recipe import Recipe

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
OF_STATES = {
    *("recipe", "tool", "cluster", "nodes", "devices_per_node", "device_memory_gb", "host_memory_gb", "reserved_gb"),
    *("disk_gbps", "output_dir"),
}
"""Options that have a say in model states; the others are of activations, traffic and time."""
ZIPF, SPREAD = 0.3, 0.02
"""What a simulation takes when it is not told."""


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
        "--imbalance",
        type=positive_number,
        default=1.0,
        help="rows of the fullest rank over the mean, with ep_size above 1 [%(default)s]",
    )
    parser.add_argument(
        "--disk_gbps", type=positive_number, default=DISK_RATE / GB, help="a rank writes a checkpoint at, GB/s [1]"
    )
    parser.add_argument("--calibration", default="", help="rates that moe-scale bench --calibrate measured")
    parser.add_argument(
        "--search",
        action="store_true",
        help="rank ZeRO stage, ep_size, micro-batch, recomputation and offload; the best one is planned, and with "
        "--output_dir its DeepSpeed JSON and command are written",
    )
    parser.add_argument(
        "--simulate",
        type=positive,
        default=0,
        metavar="N",
        help=f"draw routings and slow ranks for N ranks, up to {MOST_RANKS:,}, instead of --nodes",
    )
    parser.add_argument(
        "--zipf",
        type=not_negative_number,
        default=None,
        help=f"with --simulate, experts' load: n-th ~ n^-s, none above 1/K [{ZIPF}]",
    )
    parser.add_argument(
        "--routing",
        default="",
        help="with --simulate, a run's metrics.jsonl: the load that it measured, instead of Zipf's",
    )
    parser.add_argument(
        "--straggler_spread",
        type=not_negative_number,
        default=None,
        help=f"with --simulate: a rank's slowdown is e^|x| with x normal of this deviation, up to 1 [{SPREAD}]",
    )
    parser.add_argument(
        "--simulation_seed", type=not_negative, default=None, help="with --simulate, of what is drawn [0]"
    )
    parser.add_argument("--output_dir", default="", help="also write plan.json there")


def run(arguments: argparse.Namespace, recipe_argv: list[str]) -> dict[str, Any]:
    """Print the plan, and write it into a folder."""
    raise_if(_problems(arguments))
    cluster = cluster_of(arguments)
    recipe = load_recipe(Path(arguments.recipe))
    subject = read_subject(recipe, recipe_argv, cluster)
    if not subject.is_decoder:
        return _run_states(arguments, recipe, subject)
    rates = read_rates(arguments.calibration) if arguments.calibration else Rates()
    wishes = wishes_of(arguments)
    raise_if([*_without_effect(arguments, subject), *calibration_problems(subject, rates)])
    found: dict[str, Any] = {}
    best = None
    if arguments.search:
        outcomes = search(recipe, subject, wishes, rates)
        found["search"] = [outcome.record() for outcome in outcomes]
        best = outcomes[0]
        if best.why:
            show_search(outcomes)
            what = f"none of {len(outcomes)} layouts fits {cluster.nodes} x {cluster.devices_per_node} {cluster.name}"
            raise ConfigError(Problem("--search", what, "plan more or larger devices; why each fails is said above"))
    plan = best.plan if best and best.plan else make_plan(subject, wishes, rates)
    simulation = _simulate(plan, arguments) if arguments.simulate else None
    if best:
        found["command"] = command(plan, best.layout, arguments, recipe_argv)
    if simulation:
        found["simulation"] = simulation.record()
    record = plan.record() | found
    folder = arguments.output_dir and Path(arguments.output_dir)
    written = write(folder, record, best is not None) if folder else []
    if best:
        show_search(outcomes)
    show(plan)
    if best:
        print(found["command"])
        if cluster.nodes > 1 and not Path(hostfile(cluster)).exists():
            print(f"note: there is no {hostfile(cluster)} here; write it first, one line a node")
    if simulation:
        show_simulation(simulation)
    if written:
        print(f"wrote {', '.join(written)} to {folder}")
    return record


def _run_states(arguments: argparse.Namespace, recipe: Recipe, subject: Subject) -> dict[str, Any]:
    """The same for a recipe of which model states alone are modelled."""
    what = f"without effect on {subject.recipe}, whose model is no decoder: its model states alone are planned"
    raise_if([Problem(f"--{name}", what, "leave it out") for name in _given(arguments) if name not in OF_STATES])
    plan = plan_states(recipe, subject, arguments.disk_gbps * GB)
    record = plan.record()
    written = write(Path(arguments.output_dir), record, False) if arguments.output_dir else []
    show_states(plan)
    if written:
        print(f"wrote {', '.join(written)} to {arguments.output_dir}")
    return record


def _given(arguments: argparse.Namespace) -> list[str]:
    """Options whose value is not their default."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return [name for name, value in vars(arguments).items() if value != parser.get_default(name)]


def _simulate(plan: Plan, arguments: argparse.Namespace) -> Simulation:
    return simulate_plan(
        plan,
        zipf=ZIPF if arguments.zipf is None else arguments.zipf,
        routing=arguments.routing,
        spread=SPREAD if arguments.straggler_spread is None else arguments.straggler_spread,
        seed=arguments.simulation_seed or 0,
    )


def command(plan: Plan, layout: Layout, arguments: argparse.Namespace, recipe_argv: list[str]) -> str:
    """The command that trains a layout which a search found; a hostfile of that name may have to be written first."""
    cluster = plan.subject.cluster
    if cluster.nodes > 1:
        start = ["deepspeed", "--hostfile", hostfile(cluster)]
    else:
        start = ["deepspeed", "--num_accelerators" if cluster.is_cpu else "--num_gpus", str(cluster.devices_per_node)]
    layouts = {word for word in flags(layout) if word.startswith("--")}
    kept = without(recipe_argv, {"--deepspeed_override", "--scale", "--output_dir", *layouts})
    sharding = ["--deepspeed_override", *plan.subject.config.deepspeed_override]
    if arguments.output_dir:  # where all of it is in one file
        kept = without(kept, {"--deepspeed_config"})
        sharding = ["--deepspeed_config", str(Path(arguments.output_dir) / "deepspeed.json")]
    words = [*start, arguments.recipe, "--scale", plan.subject.config.scale, *kept, *flags(layout), *sharding]
    return shlex.join(words)


def hostfile(cluster: Cluster) -> str:
    """The file that a command of several nodes names."""
    return f"hostfiles/{cluster.nodes}x{cluster.devices_per_node}"


def without(argv: list[str], names: set[str]) -> list[str]:
    """A command line without these flags and their values."""
    kept, leaving = [], False
    for word in argv:
        if word.startswith("--"):
            leaving = word.partition("=")[0] in names
        if not leaving:
            kept.append(word)
    return kept


def cluster_of(arguments: argparse.Namespace) -> Cluster:
    """The preset with what the command line replaces."""
    given = {flag: getattr(arguments, flag) for flag in FIGURES}
    figures = {FIGURES[flag][0]: None if value is None else value * FIGURES[flag][1] for flag, value in given.items()}
    nodes, per_node = arguments.nodes, arguments.devices_per_node
    if arguments.simulate:
        per_node = min(arguments.simulate, per_node or preset(arguments.cluster).devices_per_node)
        nodes = arguments.simulate // per_node
    return preset(arguments.cluster, nodes=nodes, devices_per_node=per_node, **figures)


def wishes_of(arguments: argparse.Namespace) -> Wishes:
    return Wishes(
        tokens=arguments.tokens,
        price=arguments.price,
        masked=not arguments.one_document,
        imbalance=arguments.imbalance,
        disk_rate=arguments.disk_gbps * GB,
    )


def write(folder: Path, record: dict[str, Any], searched: bool) -> list[str]:
    """``plan.json``, with what made it; of a search also the best layout's ``deepspeed.json`` and ``command.txt``.
    Returns their names."""
    made_by = {"versions": package_versions(), "source": source_state(Path(__file__).resolve().parents[1])[0]}
    texts = {"plan.json": json.dumps(record | made_by, indent=1, allow_nan=False)}
    if searched:
        texts["deepspeed.json"] = json.dumps(record["deepspeed"], indent=1, allow_nan=False)
        texts["command.txt"] = record["command"]
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text + "\n")
    return list(texts)


def _problems(arguments: argparse.Namespace) -> list[Problem]:
    found = []
    if arguments.imbalance < 1:
        found.append(Problem("--imbalance", f"{arguments.imbalance}", "the fullest rank has at least the mean: from 1"))
    found += _simulation_problems(arguments) if arguments.simulate else _needs_simulation(arguments)
    if arguments.search and arguments.calibration:
        what = "with --calibration, whose rates hold for the one layout that was measured"
        found.append(Problem("--search", what, "leave one of them out"))
    if arguments.output_dir:
        folder = Path(arguments.output_dir)
        names = ["plan.json", *(["deepspeed.json", "command.txt"] if arguments.search else [])]
        if held := [name for name in names if (folder / name).exists()]:
            what = f"{folder} holds a plan already: {', '.join(held)}"
            found.append(Problem("--output_dir", what, "name a new folder"))
        elif why := cannot_be_written(folder):
            found.append(Problem("--output_dir", f"{folder} cannot be written: {why}", "name another folder"))
    return found


def cannot_be_written(folder: Path) -> str:
    """Why files cannot be made in a folder, which may be yet to be made; empty when they can."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def _needs_simulation(arguments: argparse.Namespace) -> list[Problem]:
    given = [n for n in ("zipf", "straggler_spread", "simulation_seed") if getattr(arguments, n) is not None]
    given += ["routing"] if arguments.routing else []
    return [Problem(f"--{name}", "without effect without --simulate", "give --simulate too") for name in given]


def _without_effect(arguments: argparse.Namespace, subject: Subject) -> list[Problem]:
    """Options that the run's own settings leave nothing to do."""
    found = []
    if arguments.imbalance != 1 and subject.ep_size == 1 and not arguments.search:
        what = f"{arguments.imbalance} at ep_size 1, where every rank computes its own rows"
        found.append(Problem("--imbalance", what, "leave it out, or set moe.ep_size"))
    if not subject.config.moe.enabled:
        given = ["zipf"] if arguments.zipf is not None else []
        given += ["routing"] if arguments.routing else []
        found += [Problem(f"--{name}", "without effect on a dense model", "leave it out") for name in given]
    return found


def _simulation_problems(arguments: argparse.Namespace) -> list[Problem]:
    ranks, found = arguments.simulate, []
    if arguments.routing and arguments.zipf is not None:
        found.append(Problem("--zipf", "with --routing, which says the load", "leave one of them out"))
    if arguments.imbalance != 1:
        what = "with --simulate, which draws the ranks' rows"
        found.append(Problem("--imbalance", what, "leave one of them out"))
    if (arguments.straggler_spread or 0) > 1:
        what = f"{arguments.straggler_spread}: the slowest of many ranks would be some 60 times slower"
        found.append(Problem("--straggler_spread", what, "choose 0 to 1"))
    if ranks > MOST_RANKS:
        found.append(Problem("--simulate", f"{ranks:,} ranks", f"choose at most {MOST_RANKS:,}"))
    if arguments.nodes != 1:
        found.append(Problem("--nodes", f"{arguments.nodes} with --simulate {ranks}", "leave one of them out"))
    if arguments.cluster.lower() in {name.lower() for name in PRESETS}:
        per_node = arguments.devices_per_node or preset(arguments.cluster).devices_per_node
        if ranks > per_node and ranks % per_node:
            what = f"{ranks} ranks do not fill nodes of {per_node}"
            found.append(Problem("--simulate", what, f"choose a multiple of {per_node}, or --devices_per_node"))
    return found
