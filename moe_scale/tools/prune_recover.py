"""Train a pruned model a little, by its recipe: a process of its own, as a sweep's trials are."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, NoReturn

from moe_scale.config import LMConfig
from moe_scale.errors import ConfigError, Problem, StoppedError, raise_if
from moe_scale.models.build import build_model
from moe_scale.parallel import device as devices
from moe_scale.parallel.launch import Launch
from moe_scale.settings import to_dict, to_yaml
from moe_scale.telemetry.provenance import write_atomically
from moe_scale.tools.compare import load_recipe
from moe_scale.tools.sweep_run import LAST_LINES, OF_A_LAUNCHER, command
from moe_scale.train.faults import PreemptedError
from moe_scale.train.recipe import Job, prepare_job

RECOVERED, SETTINGS, LOG = "recovered", "recover.yaml", "recover.log"
"""In the folder of the weights: the run that begins with them, its settings, and what it said."""

LR_SHARE = 0.1
"""Peak learning rate of a recovery as a share of the run's own."""


class RecoveryError(StoppedError):
    """The recipe did not end well. The weights that it began with are there all the same."""


@dataclass(frozen=True)
class Recovery:
    """What is asked for.

    Attributes:
        steps: optimizer steps.
        ranks: of the run, on this machine.
        recipe: its file.
        argv: settings over those that the run had.
    """

    steps: int
    ranks: int
    recipe: Path
    argv: tuple[str, ...] = ()

    def settings(self, config: LMConfig, pretrained: str) -> LMConfig:
        """Those of the run that the weights are from, but for what belongs to a short one: a lower learning rate, a
        warm-up of at most a tenth, the data in an order of its own, an evaluation and a checkpoint at the end."""
        moe, optim = config.moe, config.optim
        warmup = min(optim.warmup_steps, self.steps // 10)
        return replace(
            config,
            max_steps=self.steps,
            max_time="",
            resume="auto",
            seed=config.seed + 1,
            model=replace(config.model, pretrained=pretrained),
            moe=replace(moe, ep_size=math.gcd(moe.ep_size, self.ranks) if moe.ep_size else 0),
            optim=replace(optim, lr=LR_SHARE * optim.lr, warmup_steps=warmup, decay_steps=0),
            eval=replace(config.eval, every=0, sample_tokens=0),
            early_stopping=replace(config.early_stopping, metric=""),
            checkpoint=replace(config.checkpoint, every=0, save_best=""),
            faults=replace(config.faults, spike_factor=0.0),
        )

    def check(self, config: LMConfig, folder: Path) -> Job:
        """See that a run with these settings would start, but for the weights, which are not there yet.

        Raises:
            ConfigError: with every problem.
        """
        launch = Launch(0, self.ranks, 0, self.ranks, "env" if self.ranks > 1 else "none")
        with tempfile.TemporaryDirectory() as aside:
            settings = Path(aside) / SETTINGS
            settings.write_text(to_yaml(self.settings(config, "")))
            argv = ["--config", str(settings), *self.argv, "--output_dir", str(folder / RECOVERED)]
            job = prepare_job(load_recipe(self.recipe), argv, launch, devices.detect(), look_at_folder=False)
        assert isinstance(job.config, LMConfig)
        own = [
            Problem(f"--{name}", f"{value} as a setting of the recovery, which has its own", f"leave it out; {instead}")
            for name, value, is_own, instead in (
                ("max_steps", job.config.max_steps, self.steps, "--recover says how many steps"),
                ("model.pretrained", job.config.model.pretrained, "", "it begins with the pruned model"),
            )
            if value != is_own
        ]
        raise_if(own)
        raise_if(_of_another_model(config, job))
        return job

    def run(self, config: LMConfig, pretrained: Path, folder: Path) -> Path:
        """Train. Returns the run's folder.

        Args:
            config: of the weights.
            pretrained: the model folder or run that has them.
            folder: where the run, its settings and its log are put.

        Raises:
            RecoveryError: with the last lines of its log, if it fails.
            PreemptedError: when SIGTERM asked to stop, and the run has ended.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / SETTINGS, to_yaml(self.settings(config, str(pretrained))).encode())
            log = (folder / LOG).open("wb")
        except OSError as error:
            raise ConfigError(Problem("--output_dir", f"{folder} cannot be written: {error.strerror}")) from None
        argv = ["--config", str(folder / SETTINGS), *self.argv]
        with log, _ended_with_this(command(str(self.recipe), argv, folder / RECOVERED, self.ranks), log) as process:
            code = process.wait()
        if code:
            lines = [line for line in (folder / LOG).read_text(errors="replace").splitlines() if line.strip()]
            last = "\n".join(f"    {line}" for line in lines[-LAST_LINES:])
            raise RecoveryError(f"recovery failed with exit code {code}; the end of {folder / LOG}:\n{last}")
        return folder / RECOVERED


def _of_another_model(config: LMConfig, job: Job) -> list[Problem]:
    """The settings of a run that make its weights other ones than those of ``config``."""
    pruned, given = (
        {name: tuple(weight.shape) for name, weight in build_model(job.task.model_kind, settings).named_parameters()}
        for settings in (to_dict(config), to_dict(job.config) | {"lora": {}})
    )
    if pruned == given:
        return []
    name = next(name for name in [*pruned, *given] if pruned.get(name) != given.get(name))
    are, would_be = (", ".join(map(str, shapes.get(name, ()))) or "none" for shapes in (pruned, given))
    changed = [
        f"--{section}.{setting}"
        for section in ("model", "moe")
        for setting, value in to_dict(getattr(job.config, section)).items()
        if value != getattr(getattr(config, section), setting) and setting not in ("pretrained", "ep_size")
    ]
    what = f"the recovery's model would not be the pruned one: its {name} is ({are}) and would be ({would_be})"
    return [Problem(" ".join(changed), what, "leave out what changes the model")]


@contextlib.contextmanager
def _ended_with_this(argv: list[str], log: IO[bytes]) -> Iterator[subprocess.Popen]:
    """A process that is asked to stop, and waited for, when this one is."""
    environ = {name: value for name, value in os.environ.items() if name not in OF_A_LAUNCHER}
    before = signal.signal(signal.SIGTERM, _stop)
    process = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environ, start_new_session=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
        signal.signal(signal.SIGTERM, before)


def _stop(number: int, frame: object) -> NoReturn:
    raise PreemptedError("stopped by SIGTERM; what was written before is there")
