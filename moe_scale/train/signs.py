"""Signs that a run is getting worse, each told once: a router that collapses, is certain or drops; overfitting."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from moe_scale.config import FaultConfig


class _Lasting:
    """Notices, once each, what is seen in every look for so many steps."""

    def __init__(self, steps: int):
        self.steps = steps
        self._since: dict[Hashable, int] = {}
        self._told: set[Hashable] = set()

    def steps_of(self, sign: Hashable, step: int, *, seen: bool) -> int:
        """Take in a look; for how many steps the sign has lasted where that is to be told now, else 0."""
        if not seen:
            self._since.pop(sign, None)
            return 0
        lasted = step - self._since.setdefault(sign, step)
        if lasted < self.steps or sign in self._told:
            return 0
        self._told.add(sign)
        return lasted


class CollapseWatch:
    """Warns, once a layer, when one expert takes most of the tokens for long.

    Args:
        layers: numbers of the sparse layers.
        top_k: experts that a token is sent to.
    """

    def __init__(self, config: FaultConfig, layers: Sequence[int], top_k: int):
        self.config, self.layers, self.top_k = config, layers, top_k
        self._lasting = _Lasting(config.collapse_steps)

    def look(self, record: dict[str, Any]) -> list[str]:
        """Warnings after a logged step.

        Args:
            record: its record, with ``router/tokens_per_expert`` as one list a layer.
        """
        found = []
        for layer, counts in zip(self.layers, record.get("router/tokens_per_expert", []), strict=False):
            share = self.top_k * max(counts) / max(sum(counts), 1)
            even = self.top_k / len(counts)
            collapsed = even < self.config.collapse_share < share
            if steps := self._lasting.steps_of(layer, record["step"], seen=collapsed):
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
        self._lasting = _Lasting(config.collapse_steps)

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
            if steps := self._lasting.steps_of(("dropped", layer), record["step"], seen=many):
                found.append(
                    f"warning: the experts of layer {layer} turn {dropped:.0%} of their tokens away, and have for "
                    f"{steps} steps: raise --moe.capacity_factor or --moe.aux_loss_weight, or use "
                    "--moe.dispatch dropless"
                )
            # One expert is certain, and scores that are all zero belong to a router that has none to learn.
            certain = len(counts) > 1 and logit_rms > 0 and entropy < self.config.certain_entropy
            if steps := self._lasting.steps_of(("certain", layer), record["step"], seen=certain):
                found.append(
                    f"warning: the router of layer {layer} is certain of nearly every token (entropy {entropy:.1%} of "
                    f"its most, scores of {logit_rms:.1f}), and has been for {steps} steps: it "
                    "can hardly change its mind. Set --moe.z_loss_weight 0.001 or raise it, or lower --optim.lr"
                )
        return found


class OverfittingWatch:
    """Warns, once, when the held-out loss rises while the training loss falls.

    Args:
        config: after how many evaluations.
        kept: the state of the run that is continued, if there is one.
    """

    def __init__(self, config: FaultConfig, kept: Mapping[str, Any] | None = None):
        self.config = config
        kept = kept or {"trained": [0.0, 0], "best": None, "above": 0, "warned": False}
        self._sum, self._count = kept["trained"]
        self._best: list[float] | None = kept["best"]
        """The best held-out loss, its step, and the training loss before it."""
        self._above: int = kept["above"]
        self._warned: bool = kept["warned"]

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        trained = [self._sum, self._count]
        return {"trained": trained, "best": self._best, "above": self._above, "warned": self._warned}

    def trained(self, loss: float) -> None:
        """Take in the loss of a logged step, without what is added to it for the routers."""
        if math.isfinite(loss):
            self._sum, self._count = self._sum + loss, self._count + 1

    def evaluated(self, loss: float, step: int) -> list[str]:
        """The warning after an evaluation that came to this held-out loss, if it is due."""
        if not self._count or not self.config.overfit_evaluations:
            return []
        training, self._sum, self._count = self._sum / self._count, 0.0, 0
        if not math.isfinite(loss):
            return []
        if self._best is None or loss < self._best[0]:
            self._best, self._above = [loss, step, training], 0
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
