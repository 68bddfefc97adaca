"""Optimizer, parameter groups and learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moe_scale.config import OptimConfig, RunConfig
from moe_scale.errors import Problem
from moe_scale.parallel.zero import expert_group_name, full_shape

PARTS = ("embedding", "projections", "attention", "router", "experts", "ffn", "norms", "adapters")
"""Groups of parameters whose gradient norms are reported apart."""


PROJECTIONS = (
    *("project.", "pooling.", "head."),  # into the stream of a classifier, and out of it
    *("project_text.", "project_image.", "fusion.project_", "match.", "temperature."),  # of texts and images
)
"""How names of maps into a model's stream and out of it begin. A patch embedding is one, ``image.*.projection.``."""


def part_of(name: str) -> str:
    """Which of :data:`PARTS` a parameter belongs to, by its name in any backend."""
    if ".lora_" in name:
        return "adapters"
    if ".experts." in name:
        return "experts"
    if ".moe.dense." in name:
        return "ffn"
    if ".moe." in name:
        return "router"
    if "norm" in name:
        return "norms"
    if "attention." in name or ".self_attn." in name:
        return "attention"
    if name.startswith(PROJECTIONS) or ".projection." in name:
        return "projections"
    return "ffn" if any(part in name for part in (".ffn.", ".mlp.", ".linear")) else "embedding"


def parameters_by_part(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The model's trainable parameters under the part that each belongs to; empty parts are left out."""
    parts: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts.setdefault(part_of(name), []).append(parameter)
    return {part: parts[part] for part in PARTS if part in parts}


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups: matrices decay; norms, vectors and the embedding do not.

    Parameters that hold different experts on different ranks get groups of their own, labelled as DeepSpeed wants
    them at ZeRO stages 1 and 2.
    """
    groups: dict[tuple[bool, str], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        # Experts' biases are stacked to two dimensions and are vectors all the same.
        is_matrix = len(full_shape(parameter)) >= 2 and not name.endswith("bias")
        decays = is_matrix and part_of(name) != "embedding"
        expert_group = expert_group_name(parameter)
        if (decays, expert_group) not in groups:
            label = expert_group or ("decayed" if decays else "undecayed")
            groups[decays, expert_group] = {
                "params": [],
                "weight_decay": weight_decay if decays else 0.0,
                "name": label,
                **({"moe": True} if expert_group else {}),
            }
        groups[decays, expert_group]["params"].append(parameter)
    return list(groups.values())


def build_optimizer(model: nn.Module, config: OptimConfig, *, fused: bool = False) -> torch.optim.Optimizer:
    """AdamW over :func:`parameter_groups`: torch's, or bitsandbytes' with 8-bit moments.

    Args:
        fused: let torch update in one kernel, without temporaries of the size of the parameters.
    """
    groups = parameter_groups(model, config.weight_decay)
    common: dict[str, Any] = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    if config.name == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, **common)
    return torch.optim.AdamW(groups, **common, fused=fused)


def optimizer_problems(config: OptimConfig, *, offload: bool = False) -> list[Problem]:
    """Whether what ``config.name`` needs is there."""
    if config.name == "adamw8bit" and offload:
        return [Problem("optim.name", "adamw8bit with an optimizer on the host", "use adamw, or do not offload")]
    if config.name == "adamw8bit":
        try:
            import bitsandbytes  # noqa: F401
        except Exception as error:  # an import of a compiled package can fail in any way
            return [
                Problem(
                    "optim.name",
                    f"adamw8bit needs bitsandbytes, which does not import: {error}",
                    "pip install bitsandbytes, or use adamw",
                    this_host_only=True,
                )
            ]
    return []


def build_schedule(optimizer: torch.optim.Optimizer, config: RunConfig) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning-rate schedule, stepped once an optimizer step: linear up from 0, then as ``optim.schedule`` says."""
    # The same curves are in transformers.optimization, whose import takes seconds: it brings the whole trainer, and
    # where peft is installed torch's compiler as well. (Its get_wsd_schedule warms up from the last learning rate.)
    curves: dict[str, Callable[[int, RunConfig], float]] = {
        "constant": lambda *_: 1.0, "cosine": _cosine_factor, "wsd": _wsd_factor
    }  # fmt: skip
    warmup, after = config.optim.warmup_steps, curves[config.optim.schedule]

    def factor(step: int) -> float:
        return step / warmup if step < warmup else after(step, config)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _cosine_factor(step: int, config: RunConfig) -> float:
    """Half a cosine (arXiv 1608.03983) from the end of the warm-up down to the last share."""
    warmup, last = config.optim.warmup_steps, config.optim.min_lr_ratio
    done = (step - warmup) / max(config.max_steps - warmup, 1)
    return last + (1 - last) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def _wsd_factor(step: int, config: RunConfig) -> float:
    """Warmup-stable-decay (arXiv 2404.06395): level, then linear down to the last share."""
    decay, last = config.wsd_decay_steps, config.optim.min_lr_ratio
    remaining = max(config.max_steps - step, 0)
    return 1.0 if remaining >= decay else last + (1 - last) * remaining / decay
