"""What every recipe has: optimizer, evaluation, checkpoints, faults, telemetry, and the run itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from moe_scale.config.base import (
    Count,
    Duration,
    Fraction,
    NonEmptyText,
    NonNegativeFloat,
    NonNegativeInt,
    PathText,
    PositiveFloat,
    PositiveInt,
    Scale,
    Seed,
    Strict,
    setting,
)
from moe_scale.config.moe import MoEConfig
from moe_scale.errors import Problem


@dataclass(frozen=True)
class OptimConfig(Strict):
    """Optimizer and learning-rate schedule. Weight decay acts on matrices only: not on norms, biases or embeddings."""

    name: Literal["adamw", "adamw8bit"] = setting(
        "adamw", "adamw (torch) or adamw8bit (bitsandbytes: 2 bytes of state a parameter instead of 8)"
    )
    lr: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] = setting(3e-4, "peak learning rate")
    beta1: Fraction = setting(0.9, "decay of the first moment")
    beta2: Fraction = setting(0.95, "decay of the second moment")
    eps: PositiveFloat = setting(1e-8, "added to the root of the second moment")
    weight_decay: NonNegativeFloat = setting(0.1, "decoupled weight decay of matrices")
    schedule: Literal["cosine", "wsd", "constant"] = setting(
        "cosine", "after warm-up: cosine, wsd (warmup-stable-decay) or constant"
    )
    warmup_steps: NonNegativeInt = setting(100, "steps of linear warm-up from 0")
    decay_steps: NonNegativeInt = setting(0, "wsd: steps of the final decay; 0 means a fifth of max_steps")
    min_lr_ratio: Fraction = setting(0.1, "last learning rate as a share of the peak (cosine and wsd)")


@dataclass(frozen=True)
class EvalConfig(Strict):
    """Evaluation on held-out data."""

    every: NonNegativeInt = setting(500, "steps between evaluations; 0 evaluates at the end only")
    at_start: bool = setting(
        False, "also evaluate before the first step: zero-shot scores of the weights that a run begins with"
    )


@dataclass(frozen=True)
class EarlyStoppingConfig(Strict):
    """Ending a run whose held-out score has stopped getting better, with the weights that had the best one."""

    metric: str = setting(
        "",
        "held-out score to stop by, as eval/loss: its best checkpoint is kept as checkpoints/best (as with "
        "checkpoint.save_best), and its weights are those that the run ends with; empty never stops",
    )
    patience: PositiveInt = setting(5, "evaluations in a row without an improvement that end the run")
    min_delta: NonNegativeFloat = setting(0.0, "an improvement is one by more than this, since the last improvement")


@dataclass(frozen=True)
class CheckpointConfig(Strict):
    """Checkpoints in ``<output_dir>/checkpoints``. The last step is always saved."""

    every: NonNegativeInt = setting(0, "steps between checkpoints; 0 saves at the end only")
    keep_last: NonNegativeInt = setting(3, "newest checkpoints that stay; 0 keeps all")
    keep_every: NonNegativeInt = setting(0, "checkpoints at multiples of so many steps stay as well; 0 means none")
    save_best: str = setting(
        "", "held-out score, as eval/loss: save whenever it is the best so far, and keep that one as checkpoints/best"
    )
    background: bool = setting(
        True, "write while training goes on, from a copy in host memory; false takes no copy, and training waits"
    )


@dataclass(frozen=True)
class FaultConfig(Strict):
    """What a run does about steps and ranks that go wrong."""

    max_bad_steps: PositiveInt = setting(
        10, "steps in a row whose loss or gradient is not a number: each is skipped, so many end the run"
    )
    spike_factor: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)] = setting(
        0.0,
        "go back to the newest checkpoint, and on with later data, when the loss exceeds so many times the mean of "
        "the last 50 steps; 0 never does",
    )
    max_rollbacks: NonNegativeInt = setting(3, "spikes that a run goes back for; the next one ends it")
    collapse_share: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = setting(
        0.75, "warn when one expert is sent more than this share of a layer's tokens ..."
    )
    collapse_steps: PositiveInt = setting(100, "... for so many steps")
    overfit_evaluations: NonNegativeInt = setting(
        3,
        "warn when the held-out loss has been above its best for so many evaluations in a row while the training loss "
        "fell; 0 never does",
    )
    dropped_share: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = setting(
        0.2, "warn when a layer has dropped more than this share of its (token, choice) pairs for collapse_steps steps"
    )
    certain_entropy: Fraction = setting(
        0.02,
        "warn when the router of a layer has been so certain for collapse_steps steps: entropy of its distribution as "
        "a share of log E; its gradient is then next to nothing",
    )
    hang_minutes: PositiveFloat = setting(
        20.0,
        "end the run when a rank has made no progress for so long, naming each rank's last step and phase; beyond 30, "
        "collectives give up first and name nobody",
    )

    def problems(self, where: str) -> list[Problem]:
        if 0 < self.spike_factor <= 1:
            return [Problem(f"{where}.spike_factor", f"{self.spike_factor}", "choose more than 1, or 0 for never")]
        return []


@dataclass(frozen=True)
class TelemetryConfig(Strict):
    """What is measured and where it goes. ``metrics.jsonl`` in the run's folder is always written."""

    every: PositiveInt = setting(10, "steps between logged steps")
    tensorboard: bool = setting(True, "also write TensorBoard events to <output_dir>/tensorboard")
    wandb: Literal["auto", "off", "offline", "online"] = setting(
        "auto",
        "Weights & Biases: auto is online with a login and off without one; offline writes to <output_dir>/wandb",
    )
    wandb_project: str = setting("moe_scale", "project of Weights & Biases")
    rank_logs: bool = setting(
        True, "a log of every rank's own, with its seconds by phase, warnings and errors: <output_dir>/logs/rank_*.log"
    )


@dataclass(frozen=True)
class RunConfig(Strict):
    """What every recipe has: the length of the run, its folder, and how it is sharded, saved and logged."""

    scale: Scale = setting("cpu", "size of the recipe: cpu, 1gpu, 1node or multinode")
    deepspeed_config: PathText = setting(
        "", "DeepSpeed JSON: ZeRO stage, precision, batch; empty takes the scale's own"
    )
    deepspeed_override: tuple[str, ...] = setting(
        (), "changes to that JSON, as zero_optimization.stage=2 train_micro_batch_size_per_gpu=4"
    )
    max_steps: Count = setting(1000, "optimizer steps")
    output_dir: NonEmptyText = setting("runs/{recipe}", "folder of the run; {recipe} stands for the recipe's name")
    resume: Literal["never", "auto", "must"] = setting(
        "never",
        "auto continues from the newest intact checkpoint in output_dir, or begins where there is none; must takes the "
        "newest one and nothing else",
    )
    max_time: Duration = setting(
        "",
        "save and stop before so much time has passed since the set-up of training began, as Slurm writes it: 90 "
        "(minutes), 1:30:00 or 2-12:00:00",
    )
    seed: Seed = setting(1234, "seed of the weights, the order of the data and the sampling")
    zero_init: bool = setting(True, "with ZeRO-3: build the model sharded, so that no rank ever holds all of it")
    moe: MoEConfig = setting(MoEConfig, "the mixture-of-experts layer")
    optim: OptimConfig = setting(OptimConfig, "optimizer and schedule")
    eval: EvalConfig = setting(EvalConfig, "evaluation")
    early_stopping: EarlyStoppingConfig = setting(EarlyStoppingConfig, "ending a run that gets no better")
    checkpoint: CheckpointConfig = setting(CheckpointConfig, "what is saved, and what is kept of it")
    faults: FaultConfig = setting(FaultConfig, "what is done when a run goes wrong")
    telemetry: TelemetryConfig = setting(TelemetryConfig, "logging")

    def problems(self) -> list[Problem]:
        """What is wrong with the settings as they stand, whatever the machine."""
        found = self.moe.problems("moe") + self.faults.problems("faults")
        if self.optim.schedule != "constant" and self.optim.warmup_steps >= self.max_steps:
            found.append(
                Problem(
                    "optim.warmup_steps",
                    f"{self.optim.warmup_steps} leaves no step of max_steps = {self.max_steps}",
                    f"choose at most {self.max_steps - 1}",
                )
            )
        if self.faults.spike_factor and not (self.checkpoint.every or self.best_metric):
            found.append(
                Problem(
                    "faults.spike_factor",
                    f"{self.faults.spike_factor} with checkpoint.every = 0: there is never a checkpoint to go back to",
                    "set checkpoint.every",
                )
            )
        found += self._early_stopping_problems()
        decay = self.wsd_decay_steps
        if self.optim.schedule == "wsd" and self.optim.warmup_steps + decay > self.max_steps:
            found.append(
                Problem(
                    "optim.decay_steps",
                    f"warm-up {self.optim.warmup_steps} + decay {decay} > max_steps {self.max_steps}",
                    "shorten one of them",
                )
            )
        return found

    def _early_stopping_problems(self) -> list[Problem]:
        metric, best = self.early_stopping.metric, self.checkpoint.save_best
        if not metric:
            return []
        found = []
        if not self.eval.every:
            what = f"{metric} with eval.every = 0: it is known at the end alone"
            found.append(Problem("early_stopping.metric", what, "set eval.every"))
        if best and best != metric:
            what = f"{best}, and early_stopping.metric = {metric}: there is one best checkpoint"
            found.append(Problem("checkpoint.save_best", what, "name one score, or leave it empty"))
        return found

    def in_own_words(self, problems: list[Problem]) -> list[Problem]:
        """The problems under the names that this recipe has for the settings."""
        return problems

    def remarks(self) -> list[str]:
        """What is allowed but a user should know, one sentence each; printed when the run starts."""
        return []

    @property
    def best_metric(self) -> str:
        """The held-out score whose best checkpoint is kept; empty for none."""
        return self.early_stopping.metric or self.checkpoint.save_best

    @property
    def expert_widths(self) -> dict[str, int]:
        """Widths of the residual streams that have experts (D), by the settings that say them."""
        model: Any = getattr(self, "model", None)  # every recipe has one, each of its own kind
        return {} if model is None else {"model.d_model": model.d_model}

    @property
    def wsd_decay_steps(self) -> int:
        return self.optim.decay_steps or -(-self.max_steps // 5)
