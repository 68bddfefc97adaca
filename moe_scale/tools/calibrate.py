"""``moe-scale bench --calibrate``: the rates that ``moe-scale plan --calibration`` reads, measured on this machine.

Each block of a recipe's model runs forward and backward at the shape of the recipe's micro-batch. The optimizer's step
and all that ZeRO does to a gradient run on as many elements as the recipe has, up to :data:`MOST_ELEMENTS`. Under a
launcher with several ranks the blocks run on all of them at once, as in training, and an all-gather is timed too.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_scale.errors import Problem, raise_if
from moe_scale.initialization import Init
from moe_scale.models.attention import Attention, rope_tables
from moe_scale.models.decoder import dense_hidden
from moe_scale.models.layers import DenseFeedForward, TiedHead, TokenEmbedding
from moe_scale.moe.layer import MoELayer
from moe_scale.parallel import device as devices
from moe_scale.parallel import launch as launches
from moe_scale.parallel import zero
from moe_scale.parallel.groups import ParallelGroups
from moe_scale.planner.cluster import Cluster
from moe_scale.planner.model import Subject, read_subject
from moe_scale.planner.plan import Wishes, shapes_for
from moe_scale.planner.timing import flops
from moe_scale.telemetry.provenance import package_versions, source_state
from moe_scale.tools.compare import load_recipe
from moe_scale.train.optim import build_optimizer

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MOST_ELEMENTS = 50_000_000
SIZES = (1 << 12, 1 << 22)
"""Elements of the all-gathers whose difference gives bandwidth, and the rest latency."""


def calibrate(arguments: argparse.Namespace, recipe_argv: list[str]) -> dict[str, Any]:
    """Measure, print, and write ``calibration.json`` into ``arguments.output_dir``."""
    folder = Path(arguments.output_dir)
    path = folder / "calibration.json"
    problems = []
    if not arguments.output_dir:
        problems.append(Problem("--output_dir", "not given with --calibrate", "name a folder for calibration.json"))
    elif path.exists():
        problems.append(Problem("--output_dir", f"{folder} holds a calibration already", "name a new folder"))
    raise_if(problems)
    launch, device = launches.detect(), devices.detect()
    subject = this_machine(Path(arguments.calibrate), recipe_argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if device.is_cpu:
        devices.keep_freed_memory()
    if launch.world_size > 1:
        launches.export(launch)
        zero.init_distributed()
    rates = measure_rates(subject, rounds=arguments.rounds, warmup=arguments.warmup)
    record = {
        "rates": rates,
        "device": device.name,
        "ranks": launch.world_size,
        "threads": torch.get_num_threads(),
        "precision": subject.plan.precision,
        "tokens": subject.tokens,
        "rounds": arguments.rounds,
        "load_average": os.getloadavg()[0],
        "versions": package_versions(),
        "source": source_state(Path(__file__).resolve().parents[1])[0],
    }
    if launch.is_main:
        for name, rate in rates.items():
            print(f"{name:<16} {UNITS[name](rate)}")
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"wrote {path}")
    if launch.world_size > 1:
        dist.barrier()
        dist.destroy_process_group()
    return record


UNITS: dict[str, Callable[[float], str]] = {
    **dict.fromkeys(("attention", "sparse", "dense", "head"), lambda rate: f"{rate / 1e9:,.1f} GFLOP/s"),
    "update": lambda rate: f"{rate * 1e9:,.2f} ns an element",
    "link_bandwidth": lambda rate: f"{rate / 1e9:,.3f} GB/s",
    "link_latency": lambda rate: f"{rate * 1e6:,.1f} microseconds",
}


def this_machine(recipe: Path, argv: list[str]) -> Subject:
    """A recipe's run on the ranks that this process belongs to."""
    launch, device = launches.detect(), devices.detect()
    cluster = Cluster(
        "CPU" if device.is_cpu else device.name,
        device.name,
        nodes=launch.num_nodes,
        devices_per_node=launch.local_world_size,
    )
    return read_subject(load_recipe(recipe), argv, cluster)


def measure_rates(subject: Subject, *, rounds: int, warmup: int) -> dict[str, float]:
    """FLOP/s of whole blocks, seconds an element of the update, and among ranks bandwidth and latency."""
    moe, model = subject.config.moe, subject.config.model
    plain = dataclasses.replace(model, activation_checkpointing=False)
    config = dataclasses.replace(subject.config, model=plain)
    subject = dataclasses.replace(subject, config=config)
    counts = flops(subject, shapes_for(subject, Wishes()))
    layers = model.num_layers
    blocks = {
        "attention": (
            _AttentionBlock(subject),
            (counts["attention projections"] + counts["attention scores"]) / layers,
        ),
        "head": (_LossBlock(subject), counts["head"]),
    }
    dense = counts.get("dense ffn", 0.0) / layers
    if moe.enabled:
        raise_if(_mixed_layers(moe.every))
        work = counts["experts"] + counts.get("router", 0.0)
        blocks["sparse"] = _FeedForwardBlock(subject), work / layers + dense
    else:
        blocks["dense"] = _FeedForwardBlock(subject), dense
    device = devices.current()
    samples: dict[str, list[float]] = {name: [] for name in (*blocks, "update")}
    modules = {name: block.to(device, DTYPES[subject.plan.precision]) for name, (block, _) in blocks.items()}
    update = _Update(subject, device)
    runs: dict[str, Callable[[], None]] = {name: functools.partial(_pass, module) for name, module in modules.items()}
    runs["update"] = update
    for number in range(warmup + rounds):
        for name, run in runs.items():
            seconds = _seconds(run)
            if number >= warmup:
                samples[name].append(seconds)
    rates = {name: count / statistics.median(samples[name]) for name, (_, count) in blocks.items()}
    rates["update"] = statistics.median(samples["update"]) / update.elements
    if subject.world_size > 1:
        rates |= _link(rounds)
    return rates


def _mixed_layers(every: int) -> list[Problem]:
    if every == 1:
        return []
    return [Problem("moe.every", f"{every}", "calibrate with moe.every 1, or with moe.enabled false")]


class _Block(nn.Module):
    """A block that is timed on hidden states of the micro-batch's shape."""

    def __init__(self, subject: Subject):
        super().__init__()
        self.shape = (subject.plan.micro_batch, subject.config.data.seq_len, subject.config.model.d_model)
        self.norm = nn.RMSNorm(self.shape[2], eps=subject.config.model.norm_eps)

    def inputs(self) -> Tensor:
        parameter = next(self.parameters())
        x_BSD = torch.empty(self.shape, dtype=parameter.dtype, device=parameter.device)
        return Init(1).normal_(x_BSD, 1.0).requires_grad_()


class _AttentionBlock(_Block):
    def __init__(self, subject: Subject):
        super().__init__(subject)
        self.config = subject.config.model
        self.attention = Attention(self.config, Init(0), 1.0)

    def forward(self, x_BSD: Tensor) -> Tensor:
        seq_len = x_BSD.shape[1]
        rope = rope_tables(seq_len, self.config.head_width, self.config.rope_theta, x_BSD.device)
        # As packed documents have it; every query sees what came before, which costs as much as any other mask.
        mask = torch.ones(seq_len, seq_len, dtype=torch.bool, device=x_BSD.device).tril().expand(len(x_BSD), 1, -1, -1)
        return x_BSD + self.attention(self.norm(x_BSD), rope, mask)[0]


class _FeedForwardBlock(_Block):
    def __init__(self, subject: Subject):
        super().__init__(subject)
        moe, width = subject.config.moe, subject.config.model.d_model
        self.sparse = moe.enabled
        self.ffn: nn.Module
        if moe.enabled:
            alone = dataclasses.replace(moe, ep_size=1, num_experts=moe.num_experts)
            self.ffn = MoELayer(alone, width, ParallelGroups(), Init(0))
        else:
            self.ffn = DenseFeedForward(width, dense_hidden(moe), Init(0))

    def forward(self, x_BSD: Tensor) -> Tensor:
        if not self.sparse:
            return x_BSD + self.ffn(self.norm(x_BSD))
        ids_BS = torch.zeros(x_BSD.shape[:2], dtype=torch.int64, device=x_BSD.device)
        y_BSD, stats = self.ffn(self.norm(x_BSD), None, ids_BS)
        return x_BSD + y_BSD + (stats.aux_loss + stats.z_loss).to(x_BSD.dtype)


class _LossBlock(_Block):
    def __init__(self, subject: Subject):
        super().__init__(subject)
        model = subject.config.model
        self.embedding = TokenEmbedding(model.vocab_size, model.d_model, Init(0))
        self.head = TiedHead(self.embedding, model.loss_chunk_tokens)

    def forward(self, x_BSD: Tensor) -> Tensor:
        ids_T = torch.arange(x_BSD.shape[0] * x_BSD.shape[1], device=x_BSD.device) % len(self.embedding.weight)
        embedded_TD = self.embedding(ids_T)
        return self.head(self.norm(x_BSD.flatten(0, 1) + embedded_TD), ids_T) / len(ids_T)


def _pass(block: _Block) -> None:
    block.zero_grad(set_to_none=True)
    output = block(block.inputs())
    output.backward(torch.ones_like(output))


class _Update:
    """What ZeRO does to the gradients of a step, and the optimizer's step, on flat tensors."""

    def __init__(self, subject: Subject, device: torch.device):
        sharded = sum(subject.shard(p) if subject.plan.stage else p.numel for p in subject.parameters)
        self.elements = min(sharded, MOST_ELEMENTS)
        dtype = DTYPES[subject.plan.precision]
        self.gradient = torch.full((self.elements,), 1e-3, dtype=dtype, device=device)
        self.bucket, self.held = torch.empty_like(self.gradient), torch.empty_like(self.gradient)
        self.weights, self.gathered = torch.zeros_like(self.gradient), torch.empty_like(self.gradient)
        self.master = nn.Parameter(torch.zeros(self.elements, device=device))
        holder = nn.ParameterDict({"master": self.master})
        self.optimizer = build_optimizer(holder, subject.config.optim, fused=device.type != "cpu")

    def __call__(self) -> None:
        self.gathered.copy_(self.weights)  # the parameters, before their use
        self.bucket.copy_(self.gradient)
        self.held.copy_(self.bucket.div_(1.0))
        finite, norm = self.held.norm().isfinite(), self.held.norm()
        self.master.grad = self.held.float() if self.held.dtype != torch.float32 else self.held.clone()
        self.master.grad.mul_(1.0 / max(1.0, float(norm) * float(finite)))
        self.optimizer.step()
        self.weights.copy_(self.master.detach())


def _link(rounds: int) -> dict[str, float]:
    """Bandwidth that one rank sends with, and what a call costs beside, of all-gathers over all ranks."""
    world, times = dist.get_world_size(), []
    for size in SIZES:
        mine = torch.zeros(size, device=devices.current())
        everyones = torch.empty(size * world, device=devices.current())
        gather = functools.partial(dist.all_gather, list(everyones.chunk(world)), mine)
        gather()
        times.append(statistics.median(_seconds(gather) for _ in range(rounds)))
    sent = (SIZES[1] - SIZES[0]) * 4 * (world - 1)
    bandwidth = sent / max(times[1] - times[0], 1e-9)
    return {"link_bandwidth": bandwidth, "link_latency": max(times[0] - SIZES[0] * 4 * (world - 1) / bandwidth, 1e-9)}


def _seconds(work: Callable[[], Any]) -> float:
    devices.accelerator().synchronize()
    start = time.perf_counter()
    work()
    devices.accelerator().synchronize()
    return time.perf_counter() - start
