"""The DeepSpeed JSON of a run: read, checked against the run, and completed.

The file says how a run is sharded and stepped: ZeRO stage, precision, batch, offload. Optimizer, schedule and the
model are this project's settings, so a file that also sets those contradicts the run and is refused.
"""

from __future__ import annotations

import copy
import difflib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moe_scale.config import RunConfig
from moe_scale.errors import Problem
from moe_scale.parallel.device import Device
from moe_scale.parallel.ds_combinations import (
    gradient_problems,
    hierarchical_problems,
    master_problems,
    offload_problems,
    parallelism_problems,
    quantization_problems,
    zenflow_problems,
)
from moe_scale.parallel.launch import Launch

Precision = Literal["fp32", "bf16", "fp16"]

_OWNED = {
    "optimizer": "use --optim.name, --optim.lr and so on",
    "scheduler": "use --optim.schedule, --optim.warmup_steps and so on",
    "expert_parallel": "use --moe.backend autoep with --moe.ep_size",
    "tensorboard": "use --telemetry.tensorboard",
    "wandb": "use --telemetry.wandb",
}
_SECTIONS = {
    "zero_optimization",
    "bf16",
    "fp16",
    "data_types",
    "aio",
    "comms_logger",
    "flops_profiler",
    "timers",
    "checkpoint",
    "csv_monitor",
    "compile",
}
_SWITCHES = {
    "prescale_gradients",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
}
_NUMBERS = {"gradient_clipping": 0, "gradient_predivide_factor": 1, "steps_per_print": 1}
"""Each with the least that it can be."""
_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_KNOWN = _SECTIONS | _SWITCHES | _NUMBERS.keys() | {*_BATCH, "communication_data_type"}
_PRECISION = {
    "bf16": {
        "enabled",
        "immediate_grad_update",
        "check_grad_overflow",
        "bf16_master_weights_and_grads",
        "bf16_optimizer_states",
    },
    "fp16": {
        "enabled",
        "auto_cast",
        "loss_scale",
        "initial_scale_power",
        "loss_scale_window",
        "hysteresis",
        "consecutive_hysteresis",
        "min_loss_scale",
        "fp16_master_weights_and_grads",
    },
}


@dataclass(frozen=True)
class DeepSpeedPlan:
    """The checked DeepSpeed configuration and the figures that the rest of the run reads from it."""

    json: dict[str, Any]
    stage: int
    micro_batch: int
    grad_accum: int
    precision: Precision

    @property
    def offload(self) -> bool:
        zero = self.json.get("zero_optimization", {})
        return any(
            (zero.get(f"offload_{part}") or {}).get("device", "none") != "none" for part in ("optimizer", "param")
        )


def plan(config: RunConfig, launch: Launch, device: Device) -> tuple[DeepSpeedPlan, list[Problem]]:
    """Read ``config.deepspeed_config``, apply the overrides and check the result against the run.

    Returns:
        the plan, as far as it could be made, and every problem found. With problems the plan must not be run.
    """
    problems: list[Problem] = []
    where = "deepspeed_config"
    raw = _read(config.deepspeed_config, problems)
    if problems:
        # Nothing was read: what else could be said of it would be noise.
        return DeepSpeedPlan({}, 3, 1, 1, "fp32"), problems
    _override(raw, config.deepspeed_override, problems)

    for key, instead in _OWNED.items():
        if key in raw:
            problems.append(Problem(f"{where}: {key}", "this section contradicts the run's own settings", instead))
    for key in sorted(raw.keys() - _KNOWN - _OWNED.keys()):
        close = difflib.get_close_matches(key, _KNOWN, n=1)
        problems.append(
            Problem(f"{where}: {key}", "unknown key", f"did you mean {close[0]}?" if close else "remove it")
        )

    wrong_kinds = _value_problems(raw)
    problems += wrong_kinds
    zero = _section(raw, "zero_optimization")
    stage = zero.get("stage", 0)
    if not isinstance(stage, int) or isinstance(stage, bool) or not 0 <= stage <= 3:
        problems.append(Problem(f"{where}: zero_optimization.stage", f"{stage!r}", "choose 0, 1, 2 or 3"))
        stage = 0
    if not wrong_kinds:
        problems += gradient_problems(raw, stage) + master_problems(raw)
    wrong_values = _zero_section_problems(zero)
    problems += wrong_values
    if not wrong_values:
        problems += offload_problems(zero, stage) + hierarchical_problems(zero, stage, launch)
        problems += quantization_problems(zero, stage, device) + zenflow_problems(zero)
    problems += parallelism_problems(config, {} if wrong_values else zero, launch)
    precision = _precision(raw, device, problems)
    micro_batch, grad_accum = _batch(raw, launch, problems)

    resolved = copy.deepcopy(raw)
    resolved["train_micro_batch_size_per_gpu"] = micro_batch
    resolved["gradient_accumulation_steps"] = grad_accum
    resolved["train_batch_size"] = micro_batch * grad_accum * launch.world_size
    resolved.setdefault("gradient_clipping", 1.0)
    if precision == "bf16" and stage > 0 and grad_accum > 1:
        # DeepSpeed's default adds micro-batches up in bf16, whose 8 bits lose what the later ones contribute.
        resolved.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    resolved.setdefault("steps_per_print", 2**31 - 1)  # the run has its own progress line
    if config.optim.name == "adamw8bit":
        resolved["zero_allow_untested_optimizer"] = True
    if zero.get("offload_optimizer"):
        # The optimizer is the run's, so DeepSpeed must not insist on replacing it by its CPU Adam.
        resolved.setdefault("zero_force_ds_cpu_optimizer", False)
    return DeepSpeedPlan(resolved, stage, micro_batch, grad_accum, precision), problems


def _read(name: str, problems: list[Problem]) -> dict[str, Any]:
    where = "deepspeed_config"
    if not name:
        problems.append(Problem(where, "no DeepSpeed JSON given", "for example ds_configs/zero3_1gpu.json"))
        return {}
    try:
        raw = json.loads(Path(name).expanduser().read_text(encoding="utf-8-sig"), object_pairs_hook=_without_duplicates)
    except (OSError, RuntimeError) as error:  # RuntimeError: ~ of a user who has no home folder, or deep nesting
        why = getattr(error, "strerror", None) or error
        problems.append(Problem(where, f"cannot read {name}: {why}", this_host_only=True))
        return {}
    except ValueError as error:
        problems.append(Problem(where, f"{name} is not valid JSON: {error}", this_host_only=True))
        return {}
    if not isinstance(raw, dict):
        problems.append(Problem(where, f"{name} holds a {type(raw).__name__}", "it must hold an object { }"))
        return {}
    return raw


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, unless it has a key twice: one of the two values would be lost."""
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"{key!r} is given twice")
    return dict(pairs)


def _override(raw: dict[str, Any], overrides: tuple[str, ...], problems: list[Problem]) -> None:
    for item in overrides:
        path, equals, text = item.partition("=")
        if not equals or not all(path.split(".")):
            problems.append(Problem("deepspeed_override", f"{item!r}", "write key=value, as zero_optimization.stage=2"))
            continue
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = text
        *sections, name = path.split(".")
        node = raw
        for section in sections:
            if not isinstance(node.setdefault(section, {}), dict):
                problems.append(Problem("deepspeed_override", f"{item!r}: {section} is not a section"))
                break
            node = node[section]
        else:
            node[name] = value


def _section(raw: dict[str, Any], name: str) -> dict[str, Any]:
    section = raw.get(name, {})
    return section if isinstance(section, dict) else {}  # anything else is one of _value_problems


def _value_problems(raw: dict[str, Any]) -> list[Problem]:
    """Known keys whose value is of the wrong kind."""
    wrong: dict[str, str] = {}
    wrong |= {key: "it must be an object { }" for key in _SECTIONS if not isinstance(raw.get(key, {}), dict)}
    wrong |= {key: "choose true or false" for key in _SWITCHES if not isinstance(raw.get(key, True), bool)}
    for key, least in _NUMBERS.items():
        value = raw.get(key, least)
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf:
            wrong[key] = f"it must be a number from {least}"
    if raw.get("communication_data_type", "fp32") not in ("fp32", "bf16", "fp16"):
        wrong["communication_data_type"] = "choose fp32, bf16 or fp16"
    return [Problem(f"deepspeed_config: {key}", f"{raw[key]!r}", wrong[key]) for key in raw if key in wrong]


def _zero_section_problems(zero: dict[str, Any]) -> list[Problem]:
    """Let DeepSpeed's own schema of the section speak, so that a misspelt key is found before the launch."""
    from pydantic import ValidationError

    from moe_scale.parallel.zero import zero_section_schema

    try:
        zero_section_schema()(**zero)
    except ValidationError as error:
        return [
            Problem(
                "deepspeed_config: zero_optimization." + ".".join(map(str, e["loc"])),
                "unknown key" if e["type"] == "extra_forbidden" else f"{e['input']!r}",
                "remove it" if e["type"] == "extra_forbidden" else e["msg"].removeprefix("Input ").split(", unable")[0],
            )
            for e in error.errors()
            if e["loc"][:1] != ("stage",)
        ]
    except (AssertionError, ValueError, TypeError) as error:
        return [Problem("deepspeed_config: zero_optimization", str(error).splitlines()[0])]
    return []


def _precision(raw: dict[str, Any], device: Device, problems: list[Problem]) -> Precision:
    enabled = {}
    for name in ("bf16", "fp16"):
        section = _section(raw, name)
        problems += [
            Problem(
                f"deepspeed_config: {name}.{key}", "unknown key", f"choose one of {', '.join(sorted(_PRECISION[name]))}"
            )
            for key in section
            if key not in _PRECISION[name]
        ]
        value = section.get("enabled", False)
        if not isinstance(value, bool):
            problems.append(Problem(f"deepspeed_config: {name}.enabled", f"{value!r}", "choose true or false"))
        enabled[name] = value is True
    if all(enabled.values()):
        problems.append(
            Problem("deepspeed_config: bf16, fp16", "both are enabled", "enable one of them, or none for fp32")
        )
    if enabled["bf16"]:
        if not device.bf16:
            problems.append(
                Problem("deepspeed_config: bf16.enabled", f"{device.name} has no bf16", "use fp16, or none for fp32")
            )
        return "bf16"
    if enabled["fp16"]:
        if not device.fp16:
            problems.append(
                Problem("deepspeed_config: fp16.enabled", f"{device.name} has no fp16", "use bf16, or none for fp32")
            )
        return "fp16"
    return "fp32"


def _batch(raw: dict[str, Any], launch: Launch, problems: list[Problem]) -> tuple[int, int]:
    """Micro-batch per rank and accumulation steps, from any two of DeepSpeed's three batch figures."""
    where = "deepspeed_config"
    figures: dict[str, int | None] = {}
    for name in _BATCH:
        value = raw.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            problems.append(Problem(f"{where}: {name}", f"{value!r}", "it must be a whole number from 1"))
            return 1, 1
        figures[name] = value
    total, micro, accum = figures.values()
    world = launch.world_size
    if micro is None and total is None:
        problems.append(
            Problem(f"{where}: train_micro_batch_size_per_gpu", "not given", "sequences per rank and forward pass")
        )
        return 1, 1
    if total is None:
        return micro or 1, accum or 1
    per_step = world * (micro or 1) * (accum or 1)
    if total % per_step or (micro and accum and total != per_step):
        problems.append(
            Problem(
                f"{where}: train_batch_size",
                f"{total} != train_micro_batch_size_per_gpu {micro or 1} * gradient_accumulation_steps {accum or 1}"
                f" * {world} rank{'s' if world > 1 else ''} = {per_step}",
                "leave train_batch_size out, or make it the product",
            )
        )
        return micro or 1, accum or 1
    if micro is None:
        return total // per_step, accum or 1
    return micro, accum or total // per_step
