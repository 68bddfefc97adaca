"""``moe-scale bench --calibrate``: the rates that ``moe-scale plan --calibration`` reads, measured on this machine.

Each block of a recipe's model runs forward and backward at the shape of the recipe's micro-batch. What ZeRO and the
optimizer do is timed apart, in a real engine over parameters of the same shapes that compute nothing. Under a launcher
with several ranks all of them run at once, as in training; what ZeRO sends is then part of its time.
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

from moe_scale.config import MoEConfig
from moe_scale.errors import Problem, raise_if
from moe_scale.initialization import Init
from moe_scale.models.attention import Attention, rope_tables
from moe_scale.models.layers import DenseFeedForward, TiedHead, TokenEmbedding, dense_hidden
from moe_scale.moe.layer import MoELayer
from moe_scale.parallel import device as devices
from moe_scale.parallel import launch as launches
from moe_scale.parallel import zero
from moe_scale.parallel.groups import ParallelGroups
from moe_scale.planner.cluster import Cluster
from moe_scale.planner.model import Subject, decoder_problems, read_subject
from moe_scale.planner.plan import Wishes, shapes_for
from moe_scale.planner.timing import flops, layout_of, stepped_elements
from moe_scale.telemetry.provenance import package_versions, source_state
from moe_scale.tools.compare import load_recipe
from moe_scale.tools.plan import cannot_be_written
from moe_scale.train.engine import build_engine

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
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
    elif why := cannot_be_written(folder):
        problems.append(Problem("--output_dir", f"{folder} cannot be written: {why}", "name another folder"))
    raise_if(problems)
    launch, device = launches.detect(), devices.detect()
    subject = this_machine(Path(arguments.calibrate), recipe_argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if device.is_cpu:
        devices.keep_freed_memory()
    launches.export(launch)
    zero.init_distributed()
    calibration = Calibration(subject, zero.make_groups(subject.ep_size))
    rates = calibration.measure(rounds=arguments.rounds, warmup=arguments.warmup)
    record = {
        "rates": rates,
        "device": device.name,
        "layout": layout_of(subject),
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
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")
        for name, rate in rates.items():
            print(f"{name:<16} {UNITS[name](rate)}")
        print(f"wrote {path}")
    dist.barrier()
    calibration.close()
    dist.destroy_process_group()
    return record


UNITS: dict[str, Callable[[float], str]] = {
    **dict.fromkeys(("attention", "sparse", "dense", "head"), lambda rate: f"{rate / 1e9:,.1f} GFLOP/s"),
    **dict.fromkeys(("micro", "update"), lambda rate: f"{rate * 1e9:,.2f} ns an element"),
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
    subject = read_subject(load_recipe(recipe), argv, cluster)
    raise_if(decoder_problems(subject))
    return subject


class Calibration:
    """The blocks of a recipe's model, and a stand-in for all of its parameters, ready to be timed in turn."""

    def __init__(self, subject: Subject, groups: ParallelGroups):
        moe, model = subject.config.moe, subject.config.model
        plain = dataclasses.replace(model, activation_checkpointing=False)
        self.subject = dataclasses.replace(subject, config=dataclasses.replace(subject.config, model=plain))
        raise_if(_mixed_layers(moe))
        counts, layers = flops(self.subject, shapes_for(self.subject, Wishes())), model.num_layers
        dense = counts.get("dense ffn", 0.0) / layers
        scores = counts["attention projections"] + counts["attention scores"]
        blocks: dict[str, nn.Module] = {"attention": _AttentionBlock(self.subject), "head": _LossBlock(self.subject)}
        self.work = {"attention": scores / layers, "head": counts["head"]}
        name = "sparse" if moe.enabled else "dense"
        blocks[name] = _FeedForwardBlock(self.subject)
        self.work[name] = (counts.get("experts", 0.0) + counts.get("router", 0.0)) / layers + dense
        dtype = DTYPES[subject.plan.precision]
        self.blocks = {name: block.to(devices.current(), dtype) for name, block in blocks.items()}
        engine_device = devices.detect()
        self.engine = build_engine(lambda: _StandIn(subject, groups), subject.config, subject.plan, engine_device)

    def measure(self, *, rounds: int, warmup: int) -> dict[str, float]:
        """FLOP/s of whole blocks; seconds an element of ZeRO's work for a micro-batch and for the update.

        Among several ranks also the bandwidth and latency of an all-gather.
        """
        samples: dict[str, list[float]] = {name: [] for name in (*self.blocks, "micro", "update")}
        for number in range(warmup + rounds):
            found = {name: _seconds(functools.partial(_pass, block)) for name, block in self.blocks.items()}
            found["micro"], found["update"] = self._zero_s()
            if number >= warmup:
                for name, seconds in found.items():
                    samples[name].append(seconds)
        medians = {name: statistics.median(each) for name, each in samples.items()}
        rates = {name: count / medians[name] for name, count in self.work.items()}
        rates["micro"] = medians["micro"] / sum(p.numel for p in self.subject.parameters)
        rates["update"] = medians["update"] / stepped_elements(self.subject)
        return rates | (_link(rounds) if self.subject.world_size > 1 else {})

    def _zero_s(self) -> tuple[float, float]:
        """Seconds of the stand-in's micro-batch, in the mean of a step's, and of its update."""
        micro = update = 0.0
        x = torch.ones((), device=devices.current(), dtype=DTYPES[self.subject.plan.precision], requires_grad=True)
        for _ in range(self.subject.plan.grad_accum):
            micro += _seconds(lambda: self.engine.backward(self.engine(x)))
            update = _seconds(self.engine.step)
        return micro / self.subject.plan.grad_accum, update

    def close(self) -> None:
        """Let go of the stand-in's engine."""
        self.engine.destroy()


def _mixed_layers(moe: MoEConfig) -> list[Problem]:
    if moe.every == 1 or not moe.enabled:
        return []
    return [Problem("moe.every", f"{moe.every}", "calibrate with moe.every 1, or with moe.enabled false")]


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
        return self.head(self.norm(x_BSD.flatten(0, 1) + embedded_TD), ids_T).loss / len(ids_T)


def _pass(block: Any) -> None:
    block.zero_grad(set_to_none=True)
    output = block(block.inputs())
    output.backward(torch.ones_like(output))


class _StandIn(nn.Module):
    """All parameters of a run, each in a module of its own, and no computation: what is left of a step is ZeRO's."""

    def __init__(self, subject: Subject, groups: ParallelGroups):
        super().__init__()
        self.held = nn.ModuleList(
            _Holder(p.shape, groups if p.expert_parallel else ParallelGroups()) for p in subject.parameters
        )

    def forward(self, x: Tensor) -> Tensor:
        for holder in self.held:
            x = holder(x)
        return x


class _Holder(nn.Module):
    def __init__(self, shape: tuple[int, ...], groups: ParallelGroups):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))
        zero.mark_expert_parameters([self.weight], groups)

    def forward(self, x: Tensor) -> Tensor:
        return _Touch.apply(x, self.weight)


class _Touch(torch.autograd.Function):
    """x as it is; the weight gets a gradient of zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.shape = weight.shape
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], grads[0].new_zeros(ctx.shape)


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
