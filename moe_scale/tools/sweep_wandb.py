"""Sweeps of Weights & Biases: the file that ``wandb sweep`` takes, and the one trial that ``wandb agent`` starts.

The agent replaces ``${args}`` in the file's command by one word ``--name=value`` a parameter. It sets the variables
``WANDB_SWEEP_ID``, ``WANDB_RUN_ID`` and ``WANDB_SWEEP_PARAM_PATH``, by which the run's W&B sink joins the sweep.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from moe_scale.errors import ConfigError, Problem
from moe_scale.telemetry.provenance import write_atomically
from moe_scale.tools.sweep_plan import Plan
from moe_scale.tools.sweep_trials import Draw, Space, trial_name, value_of


def sweep_file(space: Space, plan: Plan, settings: Sequence[str], *, project: str, folder: Path) -> dict[str, Any]:
    """What ``wandb sweep`` takes: https://docs.wandb.ai/models/sweeps/sweep-config-keys.

    Args:
        space: what varies. Draws become a random search of as many runs, a grid a grid.
        plan: the checked trials; their number, metric and recipe count here.
        settings: of the recipe, for all trials.
        project: of W&B.
        folder: of the sweep; those of the runs are below it.
    """
    parameters: dict[str, Any] = {
        name: {"values": [value_of(v) for v in values]} for name, values in space.grid.items()
    }
    parameters |= {draw.name: _distribution(draw) for draw in space.draws}
    if space.variants:
        parameters["variant"] = {"values": list(space.variants)}
    if space.seeds:
        parameters["seed"] = {"values": list(space.seeds)}
    command = ["moe-scale", "sweep", plan.recipe, "--output_dir", str(folder)]
    command += ["--ranks", str(plan.ranks)] if plan.ranks > 1 else []
    for name, fixed in space.variants.items():
        command += ["--variant", f"{name}: {' '.join(f'{key}={shlex.quote(value)}' for key, value in fixed.items())}"]
    return {
        "program": plan.recipe,
        "project": project,
        "name": folder.name,
        "method": "random" if space.draws else "grid",
        "metric": {"name": plan.metric, "goal": "minimize" if plan.scores[plan.metric] == "lower" else "maximize"},
        "parameters": parameters,
        **({"run_cap": len(plan.trials)} if space.draws else {}),
        "command": [*command, *settings, "--trial", "${args}"],
    }


def _distribution(draw: Draw) -> dict[str, Any]:
    if draw.kind == "choice":
        return {"values": [value_of(choice) for choice in draw.choices]}
    if draw.kind == "int":
        return {"distribution": "int_uniform", "min": int(draw.low), "max": int(draw.high)}
    distribution = {"log": "log_uniform_values", "uniform": "uniform"}[draw.kind]
    return {"distribution": distribution, "min": draw.low, "max": draw.high}


def write_sweep_file(content: Mapping[str, Any], path: Path) -> None:
    """Write the YAML.

    Raises:
        ConfigError: if the file is there already, or cannot be written.
    """
    if path.exists():
        raise ConfigError(Problem("--wandb_sweep", f"{path} exists", "choose another name", this_host_only=True))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, yaml.safe_dump(dict(content), sort_keys=False, width=120).encode())
    except OSError as error:
        raise ConfigError(Problem("--wandb_sweep", f"{path} cannot be written: {error.strerror}")) from None


def run_trial(command: Sequence[str]) -> NoReturn:
    """Become the trial: signals of the agent, and the exit code, are then the run's own."""
    sys.stdout.flush()
    os.execve(command[0], list(command), dict(os.environ))


def trial_settings(given: Sequence[str], variants: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """The settings behind ``--trial``, as ``--name=value``; ``variant`` stands for those that it names.

    Raises:
        ConfigError: for other words, and unknown variants.
    """
    settings: dict[str, str] = {}
    for word in given:
        name, equals, value = word.lstrip("-").partition("=")
        if not (name and equals):
            raise ConfigError(
                Problem("--trial", f"unexpected word {word!r}", "write NAME=VALUE after it, and nothing else")
            )
        if name != "variant":
            settings[name] = value
        elif value in variants:
            settings |= variants[value]
        else:
            known = ", ".join(variants) or "none is given by --variant"
            raise ConfigError(Problem("--trial", f"no variant {value!r}", f"choose one of {known}"))
    return settings


def trial_folder(folder: Path, given: Sequence[str]) -> Path:
    """A trial's folder: named as the agent's run, or after its settings."""
    run_id = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None
    shown = {word.lstrip("-").partition("=")[0]: word.partition("=")[2] for word in given}
    return folder / "trials" / (run_id or trial_name(shown, set()))
