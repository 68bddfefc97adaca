"""Folders as runs leave them, with numbers that are made up: a loss that falls, experts that even out."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any


def router_values(layers: int, experts: int, progress: float, random: random.Random) -> dict[str, Any]:
    """What a step logs of the routers; at ``progress`` 1 loads are nearly even."""
    loads = []
    for _ in range(layers):
        weights = [math.exp(random.gauss(0, 1.5 * (1 - progress) + 0.1)) for _ in range(experts)]
        loads.append([int(4096 * weight / sum(weights)) for weight in weights])
    means = [sum(load) / experts for load in loads]
    return {
        "router/entropy": [round(0.95 - 0.3 * progress + random.random() / 20, 6) for _ in range(layers)],
        "router/logit_rms": [round(1 + progress + random.random() / 10, 6) for _ in range(layers)],
        "router/load_cv": [round(1.5 * (1 - progress) + random.random() / 10, 6) for _ in range(layers)],
        "router/load_max": [round(max(load) / mean, 6) for load, mean in zip(loads, means, strict=True)],
        "router/dropped": [round(random.random() / 50, 6) for _ in range(layers)],
        "router/tokens_per_expert": loads,
    }


def step_record(step: int, steps: int, routers: dict[str, Any], random: random.Random) -> dict[str, Any]:
    """A record of a logged step, in the order of a real one."""
    loss = 2.5 + 8 * math.exp(-8 * step / steps) + random.gauss(0, 0.05)
    tokens = 2048 * step
    return {
        "step": step,
        "tokens": tokens,
        "flops": 9e7 * tokens,
        "lr": 3e-3 * min(1.0, 20 * step / steps) * (1 - 0.9 * step / steps),
        "loss": loss + 0.02,
        "lm_loss": loss,
        "aux_loss": 1.1 + random.random() / 10,
        "z_loss": 3 + random.random(),
        **routers,
        "grad_norm": 0.9 + random.random() / 5,
        **{f"grad_norm/{part}": 0.1 + random.random() for part in ("embedding", "attention", "router", "experts")},
        "skipped_steps": 0,
        "tokens_per_s": 12_000 + 500 * random.random(),
        "step_time_s": 0.17,
        "memory_bytes": 2_600_000_000 + 1000 * step,
    }


def evaluation_record(step: int, steps: int, layers: int) -> dict[str, Any]:
    loss = 2.7 + 8 * math.exp(-8 * step / steps)
    return {
        "step": step,
        "tokens": 2048 * step,
        "eval/loss": loss,
        "eval/perplexity": math.exp(loss),
        "eval/sink_share": 0.02,
        "eval/sink_share_per_layer": [0.01 * (n + 1) for n in range(layers)],
        "weight_norm/embedding": 200.0 + step / steps,
        "weight_norm/router": [4.0 + n for n in range(layers)],
    }


def write_run(
    folder: Path,
    *,
    steps: int = 40,
    layers: int = 2,
    experts: int = 4,
    evaluate_every: int = 20,
    settings: dict[str, Any] | None = None,
    finished: bool = True,
    events: bool = True,
    seed: int = 0,
) -> Path:
    """A run with a record for each of its steps."""
    folder.mkdir(parents=True)
    drawn = random.Random(seed)
    # Routers' lists are most of the file: some are drawn, and each is written many times.
    lists = [json.dumps(router_values(layers, experts, n / 100, drawn))[1:-1] for n in range(101)]
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, steps + 1):
            line = json.dumps(step_record(step, steps, {"ROUTERS": 0}, drawn))
            file.write(line.replace('"ROUTERS": 0', lists[100 * step // steps]) + "\n")
            if step % evaluate_every == 0:
                file.write(json.dumps(evaluation_record(step, steps, layers)) + "\n")
    given = {"max_steps": steps, "output_dir": str(folder), "optim": {"lr": 3e-3}, "scale": "cpu"} | (settings or {})
    facts = {
        "started": "2026-01-02T03:04:05Z",
        "recipe": "lm_16l",
        "command": ["--max_steps", str(steps)],
        "sparse_layers": [2 * n + 1 for n in range(layers)],
        "settings": given,
        "deepspeed": {"zero_optimization": {"stage": 3}},
        "device": "a device",
        "world_size": 2,
        "source": {"commit": "0123456789abcdef", "dirty": False},
    }
    (folder / "run.json").write_text(json.dumps(facts))
    if events:
        told: list[dict[str, Any]] = [
            {"event": "start", "step": 0, "resumed": False, "ranks": 2},
            {"event": "saved", "step": steps // 2, "seconds": 1.25},
            {"event": "start", "step": steps // 2, "resumed": True, "ranks": 2},
            {"event": "skipped", "step": steps // 2 + 1, "text": "the loss is not a number"},
            *([{"event": "finished", "step": steps}] if finished else []),
        ]
        lines = [json.dumps({"time": f"2026-01-02T03:04:{n:02d}Z", **event}) + "\n" for n, event in enumerate(told)]
        (folder / "events.jsonl").write_text("".join(lines))
    if finished:
        (folder / "finished.json").write_text(json.dumps({"step": steps, "stopped_early": False, "scores": {}}))
    return folder
