"""A sweep's plan: its trials with what was found out about each, checked as their ranks would, and kept in a file.

``sweep.json`` is what a second start compares itself with, and all that a report needs besides the trials' folders.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moe_scale.errors import ConfigError, Problem, raise_if
from moe_scale.parallel import device as devices
from moe_scale.parallel.launch import Launch
from moe_scale.settings import leaves, to_dict
from moe_scale.telemetry.provenance import hide, hide_arguments, package_versions, source_state, write_atomically
from moe_scale.tools.sweep_trials import Trial, words
from moe_scale.train.recipe import Job, Recipe, prepare_job

FORMAT = 1
FILE = "sweep.json"
OF_A_TRIAL = ("output_dir", "resume")
"""Settings that a sweep gives each trial."""


@dataclass(frozen=True)
class Planned:
    """A trial and what its settings come to.

    Attributes:
        trial: its name and what sets it apart.
        argv: the recipe's command line, without the folder.
        max_steps: optimizer steps.
        flops_per_token: training FLOPs a token, as the task counts them.
        resolved: all settings and the DeepSpeed JSON.
    """

    trial: Trial
    argv: list[str]
    max_steps: int
    flops_per_token: float
    resolved: dict[str, Any]

    def folder(self, sweep: Path) -> Path:
        return sweep / "trials" / self.trial.name

    def log(self, sweep: Path) -> Path:
        return sweep / "trials" / f"{self.trial.name}.log"

    def failure(self, sweep: Path) -> Path:
        """How the trial failed; not there when it did not."""
        return sweep / "trials" / f"{self.trial.name}.failed"


@dataclass(frozen=True)
class Plan:
    """A sweep.

    Attributes:
        recipe: file of the recipe.
        arguments: what was asked for, in plain values: another start has to ask for the same.
        factors: what varies, but for the seeds of repeats.
        drawn: whether values were drawn.
        metric: name of the score that trials are compared by.
        scores: all scores of the task, and which way each is better.
        ranks: of a trial.
        trials: in the order of training.
        origin: command, commit, versions and machine of the first start.
    """

    recipe: str
    arguments: dict[str, Any]
    factors: list[str]
    drawn: bool
    metric: str
    scores: dict[str, str]
    ranks: int
    trials: list[Planned]
    origin: dict[str, Any]

    @property
    def repeats(self) -> bool:
        """Whether trials differ by seed alone."""
        return len({p.trial.cell for p in self.trials}) < len(self.trials)


def check_trials(
    recipe: Recipe, trials: Sequence[Trial], settings: list[str], ranks: int, folder: Path, done: Sequence[str]
) -> dict[str, Job]:
    """The job of every trial, as ``moe-scale launch`` checks one; nothing is started.

    Args:
        trials: to be checked.
        settings: of the recipe, for all trials.
        ranks: of a trial, on this machine.
        folder: of the sweep.
        done: names of finished trials, whose folders are not looked at.

    Raises:
        ConfigError: with the problems of all trials, each with the trials that have it.
    """
    launch = Launch(0, ranks, 0, ranks, "env" if ranks > 1 else "none")
    device = devices.detect()
    jobs: dict[str, Job] = {}
    having: dict[Problem, list[str]] = {}
    for trial in trials:
        argv = [*trial_argv(recipe, trial.settings, settings), "--resume=auto"]
        argv.append(f"--output_dir={folder / 'trials' / trial.name}")
        try:
            jobs[trial.name] = prepare_job(recipe, argv, launch, device, look_at_folder=trial.name not in done)
        except ConfigError as error:
            for problem in dict.fromkeys(error.problems):
                having.setdefault(problem, []).append(trial.name)
    raise_if([_with_trials(problem, names, len(trials)) for problem, names in having.items()])
    return jobs


def trial_argv(recipe: Recipe, mine: Mapping[str, str], settings: list[str]) -> list[str]:
    """The recipe's command line for a trial, without folder; ``mine``, the trial's own, last, as later ones win."""
    lists = {leaf.path for leaf in leaves(recipe.config_class) if str(leaf.annotation).startswith("tuple")}
    return [*settings, *words(mine, lists)]


def _with_trials(problem: Problem, names: list[str], of: int) -> Problem:
    if len(names) == of:
        return problem
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return Problem(problem.where, f"{problem.what} (in {len(names)} of {of} trials: {shown})", problem.allowed)


def make_plan(
    recipe: Recipe,
    trials: Sequence[Trial],
    jobs: Mapping[str, Job],
    settings: list[str],
    *,
    recipe_file: str,
    **rest: Any,
) -> Plan:
    """The plan of checked trials; ``rest`` are the other attributes of :class:`Plan`."""
    planned = []
    for trial in trials:
        job = jobs[trial.name]
        config = {name: value for name, value in to_dict(job.config).items() if name not in OF_A_TRIAL}
        resolved = {"settings": hide(config), "deepspeed": hide(job.plan.json)}
        argv = trial_argv(recipe, trial.settings, settings)
        planned.append(Planned(trial, argv, job.config.max_steps, job.task.flops_per_token, resolved))
    return Plan(recipe=recipe_file, trials=planned, **rest)


def origin(argv: Sequence[str]) -> dict[str, Any]:
    """Where and of what a sweep is begun."""
    source, _ = source_state(Path(__file__).resolve().parents[1])
    return {
        "started": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": shlex.join(["moe-scale", *hide_arguments(list(argv))]),
        "commit": commit_text(source),
        "packages": package_versions(),
        "device": devices.detect().name,
    }


def commit_text(source: Mapping[str, Any] | None) -> str:
    """``9fdb0fe13a2b and changes`` of what ``run.json`` has as ``source``."""
    return f"{source['commit'][:12]}{' and changes' if source['dirty'] else ''}" if source else "no commit"


# --- the file --------------------------------------------------------------------------------------------------------


def write_plan(plan: Plan, folder: Path) -> None:
    """Write ``sweep.json``, without what looks like a secret.

    Raises:
        ConfigError: if the folder cannot be written.
    """
    content = {"format": FORMAT, **asdict(plan)}
    for trial in content["trials"]:
        trial["argv"] = hide_arguments(trial["argv"])
    try:
        (folder / "trials").mkdir(parents=True, exist_ok=True)
        write_atomically(folder / FILE, json.dumps(content, indent=1).encode() + b"\n")
    except OSError as error:
        what = f"{folder} cannot be written: {error.strerror}"
        raise ConfigError(Problem("output_dir", what, "choose another folder", this_host_only=True)) from None


def read_plan(folder: Path) -> Plan | None:
    """The plan in the folder; None where there is none.

    Raises:
        ConfigError: if the file cannot be read, or the folder holds something else.
    """
    path = folder / FILE
    if not path.exists():
        if (folder / "trials").exists():
            what = f"{folder} holds trials, but no {FILE} that says of what"
            raise ConfigError(Problem("output_dir", what, "choose another --output_dir", this_host_only=True))
        return None
    try:
        found = json.loads(path.read_text())
        if found.pop("format") != FORMAT:
            raise ValueError("another format")
        trials = [Planned(**{**planned, "trial": Trial(**planned["trial"])}) for planned in found.pop("trials")]
        return Plan(trials=trials, **found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"{path} is no plan of a sweep that this version reads: {error}"
        raise ConfigError(Problem("output_dir", what, "choose another --output_dir", this_host_only=True)) from None


def refuse_another(stored: Plan, arguments: Mapping[str, Any], folder: Path) -> None:
    """Raises ConfigError if the folder's sweep was started with other arguments."""
    asked = json.loads(json.dumps(arguments))
    problems = [
        Problem(
            f"--{name}" if name != "settings" else "settings of the recipe",
            f"{_show(asked[name])}, but the sweep in {folder} was started with {_show(stored.arguments.get(name))}",
            "give the same to continue it, or choose another --output_dir",
        )
        for name in asked
        if asked[name] != stored.arguments.get(name)
    ]
    raise_if(problems)


def refuse_changed(stored: Plan, plan: Plan, folder: Path) -> None:
    """Raises ConfigError if the same arguments have come to mean something else: a YAML or JSON file was changed."""
    problems: list[Problem] = []
    for old, new in zip(stored.trials, plan.trials, strict=True):
        if old.trial != new.trial:
            what = (
                f"{folder} was begun by a version that planned {old.trial.name} where this one plans {new.trial.name}"
            )
            problems.append(Problem("output_dir", what, "choose another --output_dir"))
        before, now = _flat(old.resolved), _flat(json.loads(json.dumps(new.resolved, default=str)))
        problems += [
            Problem(name, f"is now {_show(now[name])}, and was {_show(before[name])} when {folder} was begun",
                    "change it back, or choose another --output_dir")
            for name in before
            if name in now and before[name] != now[name]
        ]  # fmt: skip
    raise_if(list(dict.fromkeys(problems)))


def _show(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(word, str) for word in value):
        return shlex.join(value) or "none"
    return json.dumps(value) if value or value == 0 else "none"


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return {key.removeprefix("settings."): value for key, value in flat.items()}
