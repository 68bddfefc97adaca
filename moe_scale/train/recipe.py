"""From a recipe and a command line to a running job: everything is checked here, before anything expensive starts."""

from __future__ import annotations

import contextlib
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moe_scale.checkpoint import folder as folders
from moe_scale.config import RunConfig, Scale
from moe_scale.errors import ConfigError, Problem, StoppedError, exit_on_config_error, raise_if
from moe_scale.moe.backends.support import unsupported
from moe_scale.parallel import device as devices
from moe_scale.parallel import launch as launches
from moe_scale.parallel import zero
from moe_scale.parallel.device import Device
from moe_scale.parallel.ds_json import DeepSpeedPlan, plan
from moe_scale.parallel.launch import Launch
from moe_scale.settings import read_settings, to_dict, to_yaml
from moe_scale.telemetry.quiet import quiet
from moe_scale.train import checkpoint
from moe_scale.train.faults import PreemptedError
from moe_scale.train.optim import optimizer_problems
from moe_scale.train.task import Task

EXIT_INTERRUPTED = 130

CHECKOUT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Recipe:
    """A named model and its defaults at each scale.

    Attributes:
        name: of the recipe and, by default, of the run's folder.
        config_class: the settings.
        scales: for each scale, what differs from the defaults of ``config_class``, nested as in a YAML file.
        task: makes the task from the settings.
    """

    name: str
    config_class: type[RunConfig]
    scales: Mapping[Scale, Mapping[str, Any]]
    task: Callable[[Any], Task]


@dataclass(frozen=True)
class Job:
    """A run that passed every check."""

    name: str
    config: RunConfig
    plan: DeepSpeedPlan
    launch: Launch
    device: Device
    task: Task
    resume_from: Path | None
    argv: list[str]
    remarks: tuple[str, ...] = ()

    @property
    def run_dir(self) -> Path:
        """The folder of the run."""
        return Path(self.config.output_dir).expanduser()

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step over all ranks."""
        sequences = self.plan.micro_batch * self.plan.grad_accum * self.launch.world_size
        return sequences * self.task.tokens_per_sequence

    @property
    def layout(self) -> dict[str, Any]:
        """How the run is spread, for the record: a checkpoint opens under any other."""
        moe = self.config.moe
        return {
            "ranks": self.launch.world_size,
            "ep_size": moe.ep_size if moe.enabled else 1,
            "zero_stage": self.plan.stage,
            "backend": moe.backend if moe.enabled else "none",
            "precision": self.plan.precision,
        }


def main(recipe: Recipe, argv: Sequence[str] | None = None) -> None:
    """Run a recipe from the command line. Leaves with exit code 2 and one message when the input is wrong."""
    quiet()
    with exit_codes():
        job = prepare_job(recipe, list(sys.argv[1:] if argv is None else argv))
        from moe_scale.train.loop import train

        train(job)
        dist.destroy_process_group()


@contextlib.contextmanager
def exit_codes() -> Iterator[None]:
    """Turn what ends a run early into one line from rank 0 and the process's exit code, on every rank."""
    try:
        with exit_on_config_error(), _leaving_the_group():
            yield
    except PreemptedError as error:
        _leave(str(error), error.exit_code)
    except StoppedError as error:
        _leave(f"error: {error}", error.exit_code)
    except KeyboardInterrupt:
        _leave("interrupted", EXIT_INTERRUPTED)


@contextlib.contextmanager
def _leaving_the_group() -> Iterator[None]:
    """End the process group in good order where all ranks end together."""
    try:
        yield
    except (ConfigError, StoppedError):
        if dist.is_initialized():
            dist.destroy_process_group()
        raise


def _leave(text: str, code: int) -> None:
    if launches.detect().is_main:
        print(text, file=sys.stderr, flush=True)
    raise SystemExit(code) from None


def read_run(
    recipe: Recipe, argv: list[str], launch: Launch, device: Device
) -> tuple[Any, DeepSpeedPlan, list[Problem]]:
    """The settings of a run on ``launch`` ranks of ``device``, which need not be those of this machine.

    Returns:
        the settings, with ``moe.ep_size 0`` resolved; the DeepSpeed configuration; and all that is wrong with them.
        What is wrong with the data or the folder of the run is not looked at.

    Raises:
        SystemExit: for ``--help`` and ``--print_config``.
    """
    machine_scale = devices.natural_scale(device, launch)
    if machine_scale not in recipe.scales:
        machine_scale = next(iter(recipe.scales))
    settings = read_settings(
        recipe.config_class,
        {k: dict(v) for k, v in recipe.scales.items()},
        argv,
        machine_scale=machine_scale,
        recipe=recipe.name,
    )
    config = settings.config
    if config.deepspeed_config and not Path(config.deepspeed_config).expanduser().exists():
        # The scales name files of the checkout, whatever folder the recipe is started from.
        in_checkout = CHECKOUT / config.deepspeed_config
        if in_checkout.exists():
            config = replace(config, deepspeed_config=str(in_checkout))
    if settings.print_only and not settings.problems:
        if launch.is_main:
            print(to_yaml(config), end="")
        raise SystemExit(0)

    ds_plan, ds_problems = plan(_with_ep_size(config, config.moe.ep_size or 1), launch, device)
    if config.moe.ep_size == 0:
        config = _with_ep_size(config, _widest_ep_size(config, ds_plan, launch))
    problems = ds_problems + unsupported(
        config.moe, zero_stage=ds_plan.stage, on_cpu=device.is_cpu, widths=config.expert_widths
    )
    problems += optimizer_problems(config.optim, offload=ds_plan.offload)
    return config, ds_plan, settings.problems + config.in_own_words(problems)


def prepare_job(
    recipe: Recipe,
    argv: list[str],
    launch: Launch | None = None,
    device: Device | None = None,
    *,
    look_at_folder: bool = True,
) -> Job:
    """Read and check everything about a run, on this rank alone.

    Args:
        recipe: what is trained.
        argv: the settings.
        launch: the rank whose view is checked, if not this process's own.
        device: of that rank.
        look_at_folder: False for a job that is not to be run: whatever is in ``output_dir`` does not matter.

    Raises:
        ConfigError: with every problem found.
        SystemExit: for ``--help`` and ``--print_config``.
    """
    launch = launch or launches.detect()
    device = device or devices.detect()
    config, ds_plan, problems = read_run(recipe, argv, launch, device)
    try:
        zero.check_version()
    except ConfigError as error:
        problems += error.problems
    task = recipe.task(config)
    problems += task.check()
    scores = {
        "checkpoint.save_best": config.checkpoint.save_best,
        "early_stopping.metric": config.early_stopping.metric,
    }
    for name, score in scores.items():
        if score and score not in task.scores:
            problems.append(Problem(name, f"{score!r}", f"choose one of {', '.join(task.scores)}"))
    job = Job(recipe.name, config, ds_plan, launch, device, task, None, argv)
    resume_from, resume_problems, remarks = _resume(job) if look_at_folder else (None, [], ())
    raise_if(problems + resume_problems)
    begins = () if resume_from else tuple(task.remarks())
    return replace(job, resume_from=resume_from, remarks=(*remarks, *begins))


def _with_ep_size(config: Any, ep_size: int) -> Any:
    return replace(config, moe=replace(config.moe, ep_size=ep_size))


def _widest_ep_size(config: RunConfig, plan: DeepSpeedPlan, launch: Launch) -> int:
    """The most ranks of one node that can share the experts, as far as sharding allows expert parallelism at all."""
    spreads = plan.stage == 3 and plan.json.get("zero_optimization", {}).get("zero_hpz_partition_size", 1) == 1
    return math.gcd(config.moe.num_experts, launch.local_world_size) if spreads else 1


def _resume(job: Job) -> tuple[Path | None, list[Problem], tuple[str, ...]]:
    """The checkpoint to continue from, what stands in the way of starting in ``output_dir``, and remarks."""

    def here(where: str, what: str, allowed: str) -> Problem:
        return Problem(where, what, allowed, this_host_only=True)

    config, run_dir = job.config, job.run_dir
    if problem := _cannot_hold_a_run(run_dir):
        return None, [here("output_dir", f"{run_dir} {problem}", "choose another folder")], ()
    if config.resume == "never":
        if (run_dir / "run.json").exists() or (run_dir / "metrics.jsonl").exists():
            instead = "continue it with --resume auto, or choose another --output_dir"
            return None, [here("output_dir", f"{run_dir} already holds a run", instead)], ()
        return None, [], ()
    try:
        intact, damaged = checkpoint.candidates(run_dir)
    except ConfigError as error:
        return None, error.problems, ()
    if damaged and (config.resume == "must" or not intact):
        instead = (
            f"use --resume auto, which takes {intact[0][0].name}"
            if intact
            else f"none is intact: move {folders.checkpoints_of(run_dir)} away to start anew"
        )
        return None, [replace(p, allowed=p.allowed or instead) for error in damaged for p in error.problems], ()
    if not intact:
        if config.resume == "must":
            return None, [here("resume", f"{run_dir} holds no checkpoint", "use --resume auto to start anew")], ()
        begun = (run_dir / "metrics.jsonl").exists()
        anew = f"{run_dir} has no checkpoint: the run begins anew, and its earlier metrics are kept under another name"
        return None, [], (anew,) if begun else ()
    path, index = intact[0]
    remarks = tuple(f"a damaged checkpoint is passed over: {error}" for error in damaged)
    problems = checkpoint.structure_problems(path, index, to_dict(config))
    if index.step > config.max_steps:
        what = f"{config.max_steps}, but {path.name} is already there"
        problems.append(here("max_steps", what, f"choose {index.step}, or more to train on"))
    return path, problems, (*remarks, *checkpoint.changed_settings(index, to_dict(config)))


def _cannot_hold_a_run(run_dir: Path) -> str:
    """Why the folder cannot be made or written to; empty when it can."""
    checkpoints = folders.checkpoints_of(run_dir)
    if checkpoints.exists() and not checkpoints.is_dir():
        return f"cannot hold checkpoints: {checkpoints} is a file"
    nearest = (checkpoints, run_dir, *run_dir.absolute().parents)
    existing = next(path for path in nearest if path.exists())
    if not existing.is_dir():
        return "is a file" if existing == run_dir else f"cannot be made: {existing} is a file"
    try:
        with tempfile.TemporaryFile(dir=existing):
            return ""
    except OSError as error:
        return f"cannot be written: {error.strerror}"
