"""A small checkpoint with everything that one can hold, as four ranks would write it, without any rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from moe_scale.checkpoint import folder as folders
from moe_scale.checkpoint.index import BLOCK, MOMENTS, WEIGHT, Index
from moe_scale.checkpoint.reader import persistent_buffers
from moe_scale.checkpoint.writer import Piece, join, write_part
from moe_scale.config import LMConfig
from moe_scale.models.decoder import DecoderLM
from moe_scale.models.lora import add_adapters
from moe_scale.settings import read_settings, to_dict

SETTINGS = """
model: {num_layers: 2, d_model: 16, num_heads: 4, num_kv_heads: 2, vocab_size: 64}
moe: {num_experts: 4, intermediate_size: 8, router: sigmoid}
"""


def small_config(folder: Path) -> LMConfig:
    path = folder / "small.yaml"
    path.write_text(SETTINGS)
    read = read_settings(LMConfig, {"cpu": {}}, ["--config", str(path)], machine_scale="cpu", recipe="lm_16l")
    assert not read.problems
    return read.config


def small_model(config: LMConfig) -> DecoderLM:
    model = DecoderLM(config.model, config.moe, seed=5)
    with torch.no_grad():
        for buffer in persistent_buffers(model).values():
            buffer.normal_(generator=torch.Generator().manual_seed(1))
        if config.lora.enabled:
            add_adapters(model, config.lora, seed=5)
            for name, parameter in model.named_parameters():
                if ".lora_" in name:
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    return model


def write_checkpoint(run_dir: Path, config: LMConfig, *, step: int = 7, world_size: int = 4) -> Path:
    """A checkpoint of :func:`small_model`: each tensor cut over the ranks, its second moment in 8 bits."""
    target = folders.checkpoints_of(run_dir) / folders.name_of(step)
    partial = folders.begin(target)
    pieces: list[list[Piece]] = [[] for _ in range(world_size)]
    model = small_model(config)
    state = {**dict(model.named_parameters()), **persistent_buffers(model)}
    for number, (name, values) in enumerate(state.items()):
        flat, shape = values.detach().reshape(-1), tuple(values.shape)
        share = -(-flat.numel() // world_size) if number % 3 else flat.numel()  # some lie on one rank alone
        for rank, start in enumerate(range(0, flat.numel(), share)):
            part = flat[start : start + share].clone()
            pieces[rank].append(Piece(name, shape, WEIGHT, start, part))
            pieces[rank].append(Piece(name, shape, MOMENTS[0], start, part * 2))
            codes = (torch.arange(len(part)) % 256).to(torch.uint8)
            in_block = start % BLOCK
            scales = torch.full(((in_block + len(part) - 1) // BLOCK + 1,), float(number + 1))
            pieces[rank].append(Piece(name, shape, MOMENTS[1], start, codes, scales, in_block))
    own: dict[str, Any] = {"data": {"samples": 1}, "rng": {}}
    parts = [write_part(partial, pieces[r], own, rank=r, world_size=world_size) for r in range(world_size)]
    tensors, sizes, ranks = join(parts, partial)
    tables = {MOMENTS[1]: [i / 255 for i in range(256)]}
    optimizer = {"name": "adamw8bit", "steps": step, "schedule_steps": step, "skipped": 0, "loss_scaler": None}
    Index(
        step=step,
        tokens=100,
        kind="decoder",
        settings=to_dict(config),
        layout={"ranks": world_size},
        optimizer=optimizer | {"tables": tables},
        scores={},
        tensors=tensors,
        sizes=sizes,
        ranks=ranks,
    ).write(partial)
    folders.finish(target)
    return target
