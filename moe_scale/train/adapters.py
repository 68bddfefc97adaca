"""Adapters of a run: what is told of them at its end, and what is kept in its folder."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from moe_scale.config import LoRAConfig
from moe_scale.models.lora import adapters, save_adapters
from moe_scale.parallel.zero import full_shape, is_expert_parallel

ADAPTERS = "adapters"
"""Folder of a run with its adapters, as peft has them."""


def trained_line(model: nn.Module, lora: LoRAConfig, ep_size: int = 1) -> list[tuple[str, str]]:
    """A line of the summary about adapters; none without.

    Args:
        ep_size: ranks that share the experts, and their adapters.
    """
    if not lora.enabled:
        return []
    count = sum(
        full_shape(parameter).numel() * (ep_size if is_expert_parallel(parameter) else 1)
        for parameter in model.parameters()
        if parameter.requires_grad
    )
    where = f"{len(adapters(model))} layers, rank {lora.rank}"
    return [("adapters", f"{count:,} parameters trained, those of {where}, and the rest left as it was")]


def keep_adapters(model: nn.Module, lora: LoRAConfig, run_dir: Path, *, base: str, write: bool) -> None:
    """Write the run's adapters; all ranks together.

    Args:
        base: what the model began with, for the record.
        write: False on ranks that only help to gather.
    """
    save_adapters(model, lora, run_dir / ADAPTERS, base=base, write=write)
