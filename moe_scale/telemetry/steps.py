"""What a logged step reports: losses and expert load, averaged over micro-batches and ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_scale.parallel.collectives import mean_over_ranks, sum_over_ranks


class StepMeter:
    """Adds up one step's micro-batches on this rank, then over ranks. Nothing is read from the device before
    :meth:`record`, so that adding costs no wait.

    M sparse layers, E experts.
    """

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._parts: list[dict[str, Tensor]] = []
        self._layers: list[Tensor] = []
        self._assignments_ME: Tensor | None = None

    def add(self, output: Any) -> None:
        """Take in the output of one micro-batch: loss, lm_loss, the stacked router statistics ``moe`` or None, and
        ``parts`` of the loss by name where it has several."""
        zero = output.loss.new_zeros(())
        moe = output.moe
        router = (zero, zero) if moe is None else (moe.aux_loss.mean(), moe.z_loss.mean())
        self._losses.append(torch.stack([x.detach().double() for x in (output.loss, output.lm_loss, *router)]))
        self._parts.append({name: part.detach().double() for name, part in getattr(output, "parts", {}).items()})
        if moe is not None:
            self._layers.append(torch.stack([moe.entropy, moe.dropped, moe.logit_rms]).detach().double())
            counts = moe.assignments_E.detach().double()
            self._assignments_ME = counts if self._assignments_ME is None else self._assignments_ME + counts

    def record(self) -> dict[str, Any]:
        """The step's figures over all ranks, which must call it together. Lists have one entry a sparse layer.

        ``loss/NAME`` is a part of the loss, unweighted. ``aux_loss`` and ``z_loss`` are unweighted means over layers.
        ``router/entropy`` is a share of log E; ``router/logit_rms`` the root mean square of the router's scores;
        ``router/load_cv`` the standard deviation of the experts' load over its mean, ``router/load_max`` the largest
        load over the mean; ``router/dropped`` the share of (token, choice) pairs that found no place.
        """
        losses = mean_over_ranks(torch.stack(self._losses).mean(dim=0))
        record: dict[str, Any] = dict(zip(("loss", "lm_loss", "aux_loss", "z_loss"), losses.tolist(), strict=True))
        for name in self._parts[0]:
            part = torch.stack([parts[name] for parts in self._parts]).mean()
            record[f"loss/{name}"] = mean_over_ranks(part).item()
        if self._assignments_ME is not None:
            layers = torch.stack(self._layers)
            entropy_M = mean_over_ranks(layers[:, 0].mean(dim=0))
            logit_square_M = mean_over_ranks(layers[:, 2].square().mean(dim=0))
            dropped_M = sum_over_ranks(layers[:, 1].sum(dim=0))
            load_ME = sum_over_ranks(self._assignments_ME)
            mean_M = load_ME.mean(dim=1).clamp(min=1e-12)
            record |= {
                "router/entropy": entropy_M.tolist(),
                "router/logit_rms": logit_square_M.sqrt().tolist(),
                "router/load_cv": (load_ME.std(dim=1, correction=0) / mean_M).tolist(),
                "router/load_max": (load_ME.max(dim=1).values / mean_M).tolist(),
                "router/dropped": (dropped_M / load_ME.sum(dim=1).clamp(min=1)).tolist(),
                "router/tokens_per_expert": load_ME.long().tolist(),
            }
        return record
