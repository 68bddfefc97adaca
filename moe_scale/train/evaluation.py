"""Held-out scores during a run: which are the best so far, when to stop, and back to the best weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from moe_scale.checkpoint.reader import Reader
from moe_scale.config import EarlyStoppingConfig
from moe_scale.moe.layer import SparseLayer
from moe_scale.parallel.zero_state import squared_weight_norms
from moe_scale.train import checkpoint, snapshot
from moe_scale.train.optim import part_of

if TYPE_CHECKING:
    from moe_scale.train.run import Run

Way = Literal["lower", "higher"]
"""Which scores are better."""

BEST, STOPPING, EVALUATED, OVERFITTING = "best", "stopping", "evaluated_step", "overfitting"
"""What the scores of a checkpoint hold besides scores: the best so far, the state of :class:`Patience`, the step of the
evaluation that gave them, and the state of :class:`moe_scale.train.signs.OverfittingWatch`."""

RESTORED = "eval/restored_step"
"""In the last record of a run with early stopping: the step whose weights it ends with."""


def only_scores(scores: Mapping[str, Any]) -> dict[str, Any]:
    """The scores of a checkpoint without what it keeps beside them."""
    return {name: score for name, score in scores.items() if name not in (BEST, STOPPING, EVALUATED, OVERFITTING)}


def is_better(score: float, than: float | None, way: Way, by: float = 0.0) -> bool:
    """Whether a score is better than another by more than ``by``. Anything finite is better than nothing."""
    if not math.isfinite(score):
        return False
    return than is None or (than - score if way == "lower" else score - than) > by


class Patience:
    """Counts the evaluations since a score last improved by more than ``early_stopping.min_delta``.

    Improvements are measured from the last one, so that many small steps add up to one.

    Args:
        config: when to stop.
        way: which scores are better.
        kept: the state of the run that is continued, if there is one.
    """

    def __init__(self, config: EarlyStoppingConfig, way: Way, kept: Mapping[str, Any] | None = None):
        self.config, self.way = config, way
        same = kept is not None and kept["metric"] == config.metric
        self.reference: float | None = kept["reference"] if kept and same else None
        """The score of the last improvement; None before the first."""
        self.stale: int = kept["stale"] if kept and same else 0
        """Evaluations since then."""

    def look(self, scores: Mapping[str, Any]) -> None:
        """Take in the scores of an evaluation. One that is not a number is no improvement."""
        score = scores[self.config.metric]
        if is_better(score, self.reference, self.way, self.config.min_delta):
            self.reference, self.stale = score, 0
        else:
            self.stale += 1

    @property
    def is_over(self) -> bool:
        return self.stale >= self.config.patience

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"metric": self.config.metric, "reference": self.reference, "stale": self.stale}

    def __str__(self) -> str:
        by = f" by more than {self.config.min_delta:g}" if self.config.min_delta else ""
        seen = "was never a number" if self.reference is None else f"got no better than {self.reference:.4f}{by}"
        return f"{self.config.metric} {seen} in {self.stale} evaluation{'s' if self.stale > 1 else ''}"


def evaluate(run: Run) -> bool:
    """Score the held-out data. Returns whether it is the best so far, where the settings ask for the best."""
    state, wanted = run.state, run.job.config.best_metric
    scores = score(run)
    settle_best(run)
    best = state.scores.get(BEST)
    state.scores = scores | {EVALUATED: state.step} | ({BEST: best} if best else {})
    run.tell(run.overfitting.evaluated(scores["eval/loss"], state.step))
    if run.patience is not None:
        run.patience.look(scores)
        state.scores[STOPPING] = run.patience.state()
    if not wanted:
        return False
    so_far = best["value"] if best and best["score"] == wanted else None
    if not is_better(scores[wanted], so_far, run.job.task.scores[wanted]):
        return False
    run.new_best = {"score": wanted, "value": scores[wanted]}
    return True


def score(run: Run) -> dict[str, Any]:
    """Score the held-out data, write it down and say it, and no more; all ranks together."""
    state, wanted = run.state, run.job.config.best_metric
    run.at("evaluation")
    scores = run.job.task.evaluate(run.engine)
    run.logger.log({"step": state.step, "tokens": state.tokens} | scores | weight_norms(run))
    shown = f", {wanted} {scores[wanted]:.4f}" if wanted not in ("", "eval/loss") else ""
    run.progress.message(f"step {state.step}: held-out loss {scores['eval/loss']:.4f}{shown}")
    return scores


def weight_norms(run: Run) -> dict[str, Any]:
    """L2 norms of the weights, ``weight_norm/<part>``, those of routers and experts by sparse layer; all ranks
    together."""
    layers = [name for name, module in run.engine.module.named_modules() if isinstance(module, SparseLayer)]

    def label(name: str) -> tuple[str, int]:
        part = part_of(name)
        layer = next((n for n, path in enumerate(layers) if name.startswith(f"{path}.")), -1)
        return part, layer if part in ("router", "experts") else -1

    norms: dict[str, Any] = {}
    for (part, layer), square in squared_weight_norms(run.engine, label).items():
        key = f"weight_norm/{part}"
        norms[key] = math.sqrt(square) if layer < 0 else [*norms.get(key, []), math.sqrt(square)]
    return norms


def settle_best(run: Run) -> None:
    """A score is the best so far once its checkpoint is there."""
    run.saver.wait()
    if run.new_best and not run.agreement.any(bool(run.saver.failure))[0]:
        run.state.scores[BEST] = run.new_best
    run.new_best = None


def restore_best(run: Run) -> list[tuple[str, str]]:
    """At the end of a run with early stopping: take the weights and scores of ``checkpoints/best``; all ranks together.

    Returns:
        a line (label, text) for the summary.
    """
    if run.patience is None:
        return []
    state = run.state
    run.at("restoring the best weights")
    ended = f"stopped at step {state.step}: {run.patience}" if run.patience.is_over else f"not before step {state.step}"
    settle_best(run)
    best = state.scores.get(BEST)
    found = checkpoint.best_intact(run.job.run_dir)
    if found is None or best is None or best["score"] != run.patience.config.metric:  # it was never a number
        return [("early stopping", f"{ended}; there is no best checkpoint, and the weights are the last ones")]
    path, index = found
    if index.step != state.step:
        snapshot.put(run.engine, Reader(path, index), step=index.step)
        state.scores = index.scores
    # The last scores of a run's record are those of the weights that it ends with.
    run.logger.log({"step": state.step, "tokens": state.tokens} | only_scores(state.scores) | {RESTORED: index.step})
    value = index.scores[BEST]["value"]
    return [("early stopping", f"{ended}; the weights are those of step {index.step}, the best, with {value:.4f}")]
