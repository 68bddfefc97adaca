"""``moe-scale sweep``: train a recipe with many settings, by grid or at random, and tell which of them mattered.

Every trial is a training run of its own in a folder below the sweep's. A sweep that was stopped goes on when the same
command is given again. The same entry point runs the trials of a W&B sweep.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_scale.errors import ConfigError, Problem, raise_if
from moe_scale.parallel import device as devices
from moe_scale.parallel import launch as launches
from moe_scale.telemetry.provenance import hide_arguments
from moe_scale.tools import sweep_plan
from moe_scale.tools.arguments import not_empty, not_negative, positive
from moe_scale.tools.compare import load_recipe
from moe_scale.tools.sweep_plan import OF_A_TRIAL, Plan, trial_argv
from moe_scale.tools.sweep_plot import plot
from moe_scale.tools.sweep_reach import check_reference
from moe_scale.tools.sweep_report import is_finished, make_report, write_report
from moe_scale.tools.sweep_run import command, locked, train_trials, trial_command, visible_gpus
from moe_scale.tools.sweep_trials import KINDS, Space, make_trials, read_space
from moe_scale.tools.sweep_wandb import run_trial, sweep_file, trial_folder, trial_settings, write_sweep_file
from moe_scale.train.recipe import Recipe, read_run

OF_THE_PLAN: Mapping[str, Any] = {
    "grid": [], "draw": [], "trials": None, "draw_seed": 0, "variant": [], "repeats": 1, "ranks": 1,
}  # fmt: skip
"""Arguments that make a sweep what it is, with their defaults."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The tool's own flags; whatever else is given goes to the recipe, for every trial."""
    parser.add_argument("recipe", help="file of the recipe, as recipes/lm_16l.py")
    what = parser.add_argument_group("what varies; grid or draws, variants and repeats are combined with each other")
    what.add_argument(
        "--grid", action="append", default=[], metavar="NAME=V1,V2", help="values of a setting: moe.num_experts=2,4"
    )
    what.add_argument(
        "--draw", action="append", default=[], metavar="NAME=KIND:...", help=f"instead, values drawn at random: {KINDS}"
    )
    what.add_argument("--trials", type=positive, metavar="N", help="how many draws")
    what.add_argument("--draw_seed", type=not_negative, default=0, metavar="S", help="seed of the draws [%(default)s]")
    what.add_argument(
        "--variant", action="append", default=[], metavar="NAME: a=b c=d",
        help='settings that go together: --variant "moe:" --variant "dense: moe.enabled=false"',
    )  # fmt: skip
    what.add_argument(
        "--repeats",
        type=positive,
        default=1,
        metavar="N",
        help="trials of the same settings with seeds of their own [%(default)s]",
    )
    how = parser.add_argument_group("how")
    how.add_argument("--metric", type=not_empty, help="held-out score that counts [the first of the recipe's task]")
    how.add_argument(
        "--reach", type=not_empty, metavar="VARIANT",
        help="also tell what tokens, FLOPs and seconds each trial took to the best score of this variant",
    )  # fmt: skip
    how.add_argument("--ranks", type=positive, default=1, metavar="N", help="of a trial, on this machine [%(default)s]")
    how.add_argument("--parallel", type=positive, default=1, metavar="N", help="trials at once [%(default)s]")
    how.add_argument("--output_dir", default="runs/sweep", metavar="DIR", help="folder of the sweep [%(default)s]")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--dry_run", action="store_true", help="check all trials, print their commands, and stop")
    other.add_argument("--report_only", action="store_true", help="make table and plots anew from what is there")
    other.add_argument(
        "--wandb_sweep", type=Path, metavar="FILE", help="write the sweep for `wandb sweep FILE`, and stop"
    )
    other.add_argument(
        "--trial", nargs=argparse.REMAINDER, metavar="NAME=VALUE",
        help="last of all: run the one trial of these settings; this is what a W&B agent does",
    )  # fmt: skip


def run(arguments: argparse.Namespace, settings: list[str]) -> None:
    """Do what the command line asks for.

    Raises:
        ConfigError: before anything is started, with the problems of all trials.
        SystemExit: with exit code 1 if a trial failed.
        PreemptedError: after a SIGTERM, when the running trials have ended.
        KeyboardInterrupt: the same after a Ctrl-C.
    """
    folder = Path(arguments.output_dir).expanduser()
    raise_if(_contradictions(arguments, settings))
    if arguments.report_only:
        of_folder = _with_metric(_of_report(arguments, settings, folder), arguments.metric)
        if arguments.reach:
            check_reference(of_folder, arguments.reach)
        report(of_folder, folder, arguments.reach or "")
        return
    recipe = load_recipe(Path(arguments.recipe))
    if arguments.trial is not None:
        run_trial(_trial_command(arguments, recipe, settings, folder))
    space = _space(arguments, recipe, settings)
    plan, stored, project = _plan(arguments, recipe, settings, space, folder)
    if arguments.reach:
        check_reference(plan, arguments.reach)
    if arguments.wandb_sweep:
        content = sweep_file(space, plan, settings, project=project, folder=folder)
        write_sweep_file(content, arguments.wandb_sweep)
        print(f"wrote {arguments.wandb_sweep}: `wandb sweep {arguments.wandb_sweep}` starts it, and says how agents do")
    elif arguments.dry_run:
        print("\n".join(_described(plan, folder)))
    elif not _train(plan, folder, arguments.parallel, stored, arguments.reach or ""):
        raise SystemExit(1)


def report(plan: Plan, folder: Path, reference: str = "") -> None:
    """Tables on the terminal, ``sweep.md``, ``results.json`` and the plots, from what is in the folder."""
    found = make_report(plan, folder, reference)
    write_report(found, folder, plot(found, folder))


# --- what was asked for ----------------------------------------------------------------------------------------------


def _contradictions(arguments: argparse.Namespace, settings: list[str]) -> list[Problem]:
    """What cannot be meant, as far as the command line alone tells."""
    found = []
    if launches.detect().world_size > 1:
        what = "was started as several ranks"
        found.append(Problem("moe-scale sweep", what, "start it once; --ranks N starts the ranks of each trial"))
    found += [
        Problem(f"--{name}", "is what a sweep gives each trial", "leave it out")
        for name in OF_A_TRIAL
        if name in {*_names(settings), *(text.partition("=")[0] for text in [*arguments.grid, *arguments.draw])}
    ]
    if arguments.draw_seed and not arguments.draw:
        found.append(Problem("--draw_seed", "is of draws, and there are none", "leave it out, or give --draw"))
    if arguments.parallel > 1 and (arguments.wandb_sweep or arguments.trial is not None):
        found.append(Problem("--parallel", "with trials that W&B agents start", "leave it out: start several agents"))
    if arguments.trial is not None:
        given = [name for name in ("grid", "draw", "trials", "metric", "reach") if getattr(arguments, name)]
        found += [Problem(f"--{name}", "with --trial, which is one trial", "leave it out") for name in given]
    if arguments.reach and arguments.wandb_sweep:
        found.append(Problem("--reach", "is of a report, and none is made", "leave it out"))
    if not arguments.report_only and not devices.detect().is_cpu:
        wanted, there = arguments.parallel * arguments.ranks, len(visible_gpus())
        if wanted > there:
            what = f"{arguments.parallel} trials of {arguments.ranks} ranks need {wanted} GPUs, and there are {there}"
            found.append(Problem("--parallel", what, "choose fewer trials at once, or fewer --ranks"))
    return found


def _space(arguments: argparse.Namespace, recipe: Recipe, settings: list[str]) -> Space:
    """What varies; repeats get a seed each, counted from the recipe's own.

    Raises:
        ConfigError: for what cannot be read, and for settings of the recipe that the sweep varies.
    """
    space = read_space(arguments.grid, arguments.draw, arguments.variant)
    if arguments.repeats > 1:
        config, _, _ = read_run(recipe, settings, launches.detect(), devices.detect())
        space = replace(space, seeds=tuple(config.seed + number for number in range(arguments.repeats)))
    varied = [name for name in space.varied if name in _names(settings)]
    raise_if([Problem(f"--{name}", "is what the sweep varies", "leave it out") for name in varied])
    return replace(space, trials=arguments.trials or 0, draw_seed=arguments.draw_seed)


def _names(settings: list[str]) -> set[str]:
    """Names of the settings on a recipe's command line."""
    return {word.partition("=")[0].removeprefix("--") for word in settings if word.startswith("--")}


def _asked(arguments: argparse.Namespace, settings: list[str]) -> dict[str, Any]:
    """What another start has to give as well."""
    return {"recipe": arguments.recipe, "settings": hide_arguments(settings)} | {
        n: getattr(arguments, n) for n in OF_THE_PLAN
    }


def _plan(
    arguments: argparse.Namespace, recipe: Recipe, settings: list[str], space: Space, folder: Path
) -> tuple[Plan, Plan | None, str]:
    """The checked plan; the one that is in the folder already; and the project of W&B."""
    stored = None if arguments.wandb_sweep else sweep_plan.read_plan(folder)
    if stored:
        sweep_plan.refuse_another(stored, _asked(arguments, settings), folder)
    trials = make_trials(space)
    done = [p.trial.name for p in stored.trials if is_finished(p, stored.metric, folder)] if stored else []
    jobs = sweep_plan.check_trials(recipe, trials, settings, arguments.ranks, folder, done)
    first = next(iter(jobs.values()))
    plan = sweep_plan.make_plan(
        recipe,
        trials,
        jobs,
        settings,
        recipe_file=arguments.recipe,
        arguments=_asked(arguments, settings),
        factors=space.factors,
        drawn=bool(space.draws),
        metric=stored.metric if stored else next(iter(first.task.scores)),
        scores=dict(first.task.scores),
        ranks=arguments.ranks,
        origin={**sweep_plan.origin(sys.argv[1:]), "parallel": arguments.parallel},
    )
    if stored:
        sweep_plan.refuse_changed(stored, plan, folder)
    return _with_metric(plan, arguments.metric), stored, first.config.telemetry.wandb_project


def _with_metric(plan: Plan, metric: str | None) -> Plan:
    if metric is not None and metric not in plan.scores:
        raise ConfigError(Problem("--metric", metric, f"choose one of {', '.join(plan.scores)}"))
    return replace(plan, metric=metric or plan.metric)


def _of_report(arguments: argparse.Namespace, settings: list[str], folder: Path) -> Plan:
    """The plan in the folder. Its arguments need not be given again; if any are, they have to be the same."""
    plan = sweep_plan.read_plan(folder)
    if plan is None:
        raise ConfigError(Problem("--report_only", f"{folder} holds no sweep", "name its folder by --output_dir"))
    given = settings or any(getattr(arguments, name) != default for name, default in OF_THE_PLAN.items())
    sweep_plan.refuse_another(plan, _asked(arguments, settings) if given else {"recipe": arguments.recipe}, folder)
    return plan


# --- what is done ----------------------------------------------------------------------------------------------------


def _train(plan: Plan, folder: Path, parallel: int, stored: Plan | None, reference: str) -> bool:
    """Train and report. Returns whether all trials are finished."""
    if stored:
        if stored.origin["commit"] != plan.origin["commit"]:
            print(f"note: begun at commit {stored.origin['commit']}, goes on at {plan.origin['commit']}")
        most = max(parallel, stored.origin["parallel"])
        plan = replace(plan, origin={**stored.origin, "parallel": most})
    with locked(folder) as lock:
        sweep_plan.write_plan(plan, folder)
        print(f"{len(plan.trials)} trials, compared by {plan.metric}; logs in {folder / 'trials'}", flush=True)
        finished = train_trials(plan, folder, parallel, lock)
        report(plan, folder, reference)
    return finished


def _described(plan: Plan, folder: Path) -> list[str]:
    """The trials with their commands; those that are finished say so."""
    lines = [
        f"# {len(plan.trials)} trials of {plan.ranks} rank{'s' if plan.ranks > 1 else ''}, compared by {plan.metric}"
    ]
    for planned in plan.trials:
        what = " ".join(f"{name}={value}" for name, value in planned.trial.settings.items()) or "as the recipe is"
        done = ", finished" if is_finished(planned, plan.metric, folder) else ""
        steps = f"{planned.max_steps:,} steps, {planned.flops_per_token:.3e} training FLOPs a token{done}"
        lines += [f"# {planned.trial.name}: {what}; {steps}", shlex.join(trial_command(plan, planned, folder))]
    return lines


def _trial_command(arguments: argparse.Namespace, recipe: Recipe, settings: list[str], folder: Path) -> list[str]:
    """What runs the one trial of ``--trial``."""
    given = trial_settings(arguments.trial, read_space([], [], arguments.variant).variants)
    run_dir = trial_folder(folder, arguments.trial)
    return command(arguments.recipe, trial_argv(recipe, given, settings), run_dir, arguments.ranks)
