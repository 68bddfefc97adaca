"""One rank that measures loss-free balancing, then trains ``lm_16l``: ``balancing_cases.py CASES.json RESULT.json``.

CASES.json maps names to lists of command lines, which are trained one after the other. RESULT.json gets, from rank 0,
the load of a skewed stream at each bias update rate, and for each name the selection biases after each step.

Shapes: D model width, E experts, M sparse layers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from moe_scale.config import MoEConfig
from moe_scale.initialization import Init
from moe_scale.moe.layer import MoELayer, update_selection_biases
from moe_scale.parallel import zero
from moe_scale.parallel.collectives import mean_over_ranks, sum_over_ranks
from moe_scale.parallel.groups import ParallelGroups
from moe_scale.telemetry.quiet import quiet
from moe_scale.train import loop
from moe_scale.train import step as train_step
from moe_scale.train.recipe import prepare_job
from recipes.lm_16l import RECIPE

D_MODEL, NUM_EXPERTS = 16, 8
STEPS, MEASURED = 150, 30


def skewed_load(rate: float) -> dict[str, Any]:
    """Train one layer on tokens that point the same way, and measure the load of its last steps.

    Each rank has a stream of its own; gradients are averaged and loads summed over ranks, as in a run.
    """
    config = MoEConfig(
        num_experts=NUM_EXPERTS, top_k=2, intermediate_size=8, router="sigmoid", aux_loss_weight=0.0,
        bias_update_rate=rate,
    )  # fmt: skip
    model = nn.Sequential(MoELayer(config, D_MODEL, ParallelGroups(), Init(0)))
    layer = model[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(50 + dist.get_rank())
    common_D = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(3))
    target_DD = torch.randn(D_MODEL, D_MODEL, generator=torch.Generator().manual_seed(4)) / D_MODEL**0.5
    measured_E = torch.zeros(NUM_EXPERTS)
    for step in range(STEPS):
        x_BSD = common_D + 0.5 * torch.randn(2, 64, D_MODEL, generator=generator)
        y_BSD, stats = layer(x_BSD)
        loss = (y_BSD - x_BSD @ target_DD).square().mean() + config.aux_loss_weight * stats.aux_loss
        optimizer.zero_grad()
        loss.backward()
        for parameter in model.parameters():
            parameter.grad = mean_over_ranks(parameter.grad)
        optimizer.step()
        load_E = sum_over_ranks(stats.assignments_E)
        update_selection_biases(model, load_E.unsqueeze(0), config.bias_update_rate)
        if step >= STEPS - MEASURED:
            measured_E += load_E
    max_over_mean = (measured_E.max() / measured_E.mean()).item()
    return {"max_over_mean": max_over_mean, "agree": same_on_all_ranks(layer.selection_bias_E)}


def same_on_all_ranks(values: torch.Tensor) -> bool:
    everyones = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(everyones, values)
    return all(torch.equal(theirs, values) for theirs in everyones)


def train_recorded(argvs: list[list[str]]) -> list[dict[str, Any]]:
    """Train the command lines in turn. Returns the biases and their type as each update leaves them, step by step."""
    seen: list[dict[str, Any]] = []

    def recording(model: nn.Module, load_ME: torch.Tensor, rate: float) -> None:
        update_selection_biases(model, load_ME, rate)
        biases = [m.selection_bias_E for m in model.modules() if isinstance(m, MoELayer)]
        types = sorted({str(bias.dtype) for bias in biases})
        weights = sorted({str(p.dtype) for p in model.parameters()})
        agree = all(map(same_on_all_ranks, biases))
        seen.append({"biases": [b.tolist() for b in biases], "types": types, "weights": weights, "agree": agree})

    train_step.update_selection_biases = recording
    for argv in argvs:
        loop.train(prepare_job(RECIPE, argv))
    train_step.update_selection_biases = update_selection_biases
    return seen


def main() -> None:
    quiet()
    zero.init_distributed(timeout_minutes=1)
    cases, result = (Path(argument) for argument in sys.argv[1:])
    found: dict[str, Any] = {"loads": {rate: skewed_load(rate) for rate in (0.0, 0.01)}}
    found |= {name: train_recorded(argvs) for name, argvs in json.loads(cases.read_text()).items()}
    if dist.get_rank() == 0:
        result.write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
