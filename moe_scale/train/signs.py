"""Signs that a run is getting worse, each told once: a router that collapses, is certain or drops; overfitting."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from moe_scale.config import FaultConfig


class CollapseWatch:
    """Warns, once a layer, when one expert takes most of the tokens for long.

    Args:
        layers: numbers of the sparse layers.
        top_k: experts that a token is sent to.
    """

    def __init__(self, config: FaultConfig, layers: Sequence[int], top_k: int):
        self.config, self.layers, self.top_k = config, layers, top_k
        self._since: dict[int, int] = {}
        self._warned: set[int] = set()

    def look(self, record: dict[str, Any]) -> list[str]:
        """Warnings after a logged step.

        Args:
            record: its record, with ``router/tokens_per_expert`` as one list a layer.
        """
        found = []
        for layer, counts in zip(self.layers, record.get("router/tokens_per_expert", []), strict=False):
            share = self.top_k * max(counts) / max(sum(counts), 1)
            even = self.top_k / len(counts)
            if share <= self.config.collapse_share or even >= self.config.collapse_share:
                self._since.pop(layer, None)
                continue
            steps = record["step"] - self._since.setdefault(layer, record["step"])
            if steps >= self.config.collapse_steps and layer not in self._warned:
                self._warned.add(layer)
                found.append(
                    f"warning: expert {counts.index(max(counts))} of layer {layer} has taken {share:.0%} of the "
                    f"tokens, for {steps} steps now: the router has collapsed. Raise --moe.aux_loss_weight (0.01), use "
                    "--moe.router sigmoid, or add --moe.router_jitter 0.01"
                )
        return found


class RouterWatch:
    """Warns, once a layer, when its experts have turned many tokens away for long, or its router is too certain.

    Args:
        layers: numbers of the sparse layers.
        router: their kind. Experts that choose leave tokens to others: that is no sign there.
    """

    def __init__(self, config: FaultConfig, layers: Sequence[int], router: str = "softmax"):
        self.config, self.layers, self.router = config, layers, router
        self._since: dict[tuple[str, int], int] = {}
        self._warned: set[tuple[str, int]] = set()

    def look(self, record: dict[str, Any]) -> list[str]:
        """Warnings after a logged step.

        Args:
            record: its record, with one value a layer of ``router/dropped``, ``router/entropy``,
                ``router/logit_rms`` and ``router/tokens_per_expert``.
        """
        found = []
        columns = ("router/dropped", "router/entropy", "router/logit_rms", "router/tokens_per_expert")
        for layer, *row in zip(self.layers, *(record.get(name, []) for name in columns), strict=False):
            dropped, entropy, logit_rms, counts = row
            many = dropped > self.config.dropped_share and self.router != "expert_choice"
            if self._for_long("dropped", layer, many, record["step"]):
                found.append(
                    f"warning: the experts of layer {layer} turn {dropped:.0%} of their tokens away, and have for "
                    f"{self.config.collapse_steps} steps: raise --moe.capacity_factor or --moe.aux_loss_weight, or use "
                    "--moe.dispatch dropless"
                )
            # One expert is certain, and scores that are all zero belong to a router that has none to learn.
            certain = len(counts) > 1 and logit_rms > 0 and entropy < self.config.certain_entropy
            if self._for_long("certain", layer, certain, record["step"]):
                found.append(
                    f"warning: the router of layer {layer} is certain of nearly every token (entropy {entropy:.1%} of "
                    f"its most, scores of {logit_rms:.1f}), and has been for {self.config.collapse_steps} steps: it "
                    "can hardly change its mind. Set --moe.z_loss_weight 0.001 or raise it, or lower --optim.lr"
                )
        return found

    def _for_long(self, sign: str, layer: int, seen: bool, step: int) -> bool:
        """Whether a sign has been seen in all looks of the last ``collapse_steps`` steps, for the first time."""
        key = sign, layer
        if not seen:
            self._since.pop(key, None)
            return False
        if step - self._since.setdefault(key, step) < self.config.collapse_steps or key in self._warned:
            return False
        self._warned.add(key)
        return True


class OverfittingWatch:
    """Warns, once, when the held-out loss rises while the training loss falls."""

    def __init__(self, config: FaultConfig):
        self.config = config
        self._trained: list[float] = []
        self._best: tuple[float, int, float] | None = None
        """The best held-out loss, its step, and the training loss before it."""
        self._above = 0
        self._warned = False

    def trained(self, loss: float) -> None:
        """Take in the loss of a logged step, without what is added to it for the routers."""
        self._trained.append(loss)

    def evaluated(self, loss: float, step: int) -> list[str]:
        """The warning after an evaluation that came to this held-out loss, if it is due."""
        if not self._trained or not self.config.overfit_evaluations:
            return []
        training, self._trained = statistics.fmean(self._trained), []
        if not math.isfinite(loss):
            return []
        if self._best is None or loss < self._best[0]:
            self._best, self._above = (loss, step, training), 0
            return []
        best, at, then = self._best
        self._above = self._above + 1 if loss > best and training < then else 0
        if self._above < self.config.overfit_evaluations or self._warned:
            return []
        self._warned = True
        return [
            f"warning: the held-out loss was {best:.4f} at step {at} and is {loss:.4f}, while the training loss fell "
            f"from {then:.4f} to {training:.4f}: the model overfits. Stop here (--early_stopping.metric eval/loss), "
            "train on more data, or with more dropout or --optim.weight_decay"
        ]
