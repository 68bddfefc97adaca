"""``moe-scale bench``: how fast one MoE layer is, against its peers and against a dense layer of the same FLOPs.

All layers are timed in turn, round after round, in one process, so that a machine whose speed drifts slows all of them
alike; the medians of the rounds are reported, and ratios rather than times are what to quote.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from moe_scale.config import MoEConfig
from moe_scale.errors import raise_if
from moe_scale.initialization import Init
from moe_scale.moe.backends.support import unsupported
from moe_scale.moe.dispatch import combine_rows, gather_rows
from moe_scale.moe.layer import MoELayer, make_stats
from moe_scale.parallel import device as devices
from moe_scale.parallel.groups import ParallelGroups
from moe_scale.telemetry.provenance import package_versions, source_state
from moe_scale.tools.peers import PEERS, build_peer, peak_extra_bytes

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DEFAULT_PEERS = ["dense", "custom", "deepspeed", "hf-grouped"]
COLUMNS = ["E", "layer", "direction", "ms", "TFLOP/s", "x dense", "peak MiB"]
Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The tool's flags."""
    parser.add_argument("--tokens", type=int, default=2048, help="tokens T [%(default)s]")
    parser.add_argument("--d_model", type=int, default=1024, help="model width D [%(default)s]")
    parser.add_argument("--intermediate_size", type=int, default=512, help="expert width F [%(default)s]")
    parser.add_argument("--num_experts", type=int, nargs="+", default=[64], help="experts E, one or several [64]")
    parser.add_argument("--top_k", type=int, default=2, help="experts per token K [%(default)s]")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="precision [%(default)s]")
    parser.add_argument(
        "--peers", nargs="+", choices=PEERS, default=DEFAULT_PEERS, help=f"what to time: {_list_peers()}"
    )
    parser.add_argument("--rounds", type=int, default=15, help="counted rounds; the median is taken [%(default)s]")
    parser.add_argument("--warmup", type=int, default=3, help="rounds that are not counted [%(default)s]")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice [%(default)s]")
    parser.add_argument("--output_dir", default="", help="also write bench.json and bench.md there")
    parser.add_argument(
        "--profile", action="store_true", help="with output_dir: also the operators of each layer by time"
    )


def run(arguments: argparse.Namespace) -> list[Row]:
    """Time everything that was asked for, print a table, and write the files where a folder was given."""
    device = devices.current()
    if device.type == "cpu":
        devices.keep_freed_memory()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if "triton" in arguments.peers:
        raise_if(unsupported(MoEConfig(kernels="triton"), zero_stage=0, on_cpu=device.type == "cpu"))
    rows: list[Row] = []
    for num_experts in arguments.num_experts:
        config = MoEConfig(
            num_experts=num_experts, top_k=arguments.top_k, intermediate_size=arguments.intermediate_size
        )
        rows += bench_shape(config, arguments, device)
    _show(rows)
    if arguments.output_dir:
        folder = Path(arguments.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "bench.json").write_text(json.dumps(rows, indent=1) + "\n")
        lines = [COLUMNS, ["---"] * len(COLUMNS), *map(_cells, rows)]
        (folder / "bench.md").write_text("".join("| " + " | ".join(line) + " |\n" for line in lines))
        print(f"wrote bench.json and bench.md to {folder}")
    return rows


def bench_shape(config: MoEConfig, arguments: argparse.Namespace, device: torch.device) -> list[Row]:
    """Rows of one shape: each peer forward, backward and both, and the parts of this project's layer."""
    dtype, tokens, d_model = DTYPES[arguments.dtype], arguments.tokens, arguments.d_model
    layers = {name: build_peer(name, config, d_model).to(device, dtype) for name in arguments.peers}
    input_seed, grad_seed = Init(1), Init(2)
    x_BSD = input_seed.normal_(torch.empty(1, tokens, d_model, device=device), 1.0).to(dtype).requires_grad_()
    grad_BSD = grad_seed.normal_(torch.empty(1, tokens, d_model, device=device), 1.0).to(dtype)

    samples: dict[tuple[str, str], list[float]] = {}
    for round_number in range(arguments.warmup + arguments.rounds):
        for name, layer in layers.items():
            forward, backward = _time_once(layer, x_BSD, grad_BSD)
            if round_number >= arguments.warmup:
                for direction, seconds in (("forward", forward), ("backward", backward), ("both", forward + backward)):
                    samples.setdefault((name, direction), []).append(seconds)
    medians = {key: statistics.median(values) for key, values in samples.items()}
    if arguments.profile and arguments.output_dir:
        for name, layer in layers.items():
            path = Path(arguments.output_dir) / f"profile_{name}_{config.num_experts}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(profile(functools.partial(_step, layer, x_BSD, grad_BSD), device))
    peaks = {
        name: peak_extra_bytes(functools.partial(_step, layer, x_BSD, grad_BSD), device)
        for name, layer in layers.items()
    }

    shared = {
        "tokens": tokens,
        "d_model": d_model,
        "intermediate_size": config.intermediate_size,
        "num_experts": config.num_experts,
        "top_k": config.top_k,
        "dtype": arguments.dtype,
        "device": devices.detect().name,
        "threads": torch.get_num_threads(),
        "rounds": arguments.rounds,
        "load_average": os.getloadavg()[0],
        "versions": package_versions(),
        "source": source_state(Path(__file__).resolve().parents[1])[0],
    }
    forward_flops = 6 * tokens * config.top_k * d_model * config.intermediate_size
    rows = []
    for (name, direction), seconds in medians.items():
        flops = forward_flops * {"forward": 1, "backward": 2, "both": 3}[direction]
        floor = medians.get(("dense", direction))
        rows.append(
            {
                "name": name,
                "direction": direction,
                "median_ms": seconds * 1e3,
                "tflops": flops / seconds / 1e12,
                "ratio_to_dense": seconds / floor if floor else None,
                "peak_bytes": peaks[name] if direction == "both" else None,
                **shared,
            }
        )
    if "custom" in layers:
        parts = time_parts(config, x_BSD.detach(), grad_BSD, rounds=arguments.rounds, warmup=arguments.warmup)
        rows += [
            {
                "name": f"custom/{part}",
                "direction": direction,
                "median_ms": seconds * 1e3,
                "tflops": None,
                "ratio_to_dense": None,
                "peak_bytes": None,
                **shared,
            }
            for (part, direction), seconds in parts.items()
        ]
    return rows


def time_parts(
    config: MoEConfig, x_BSD: Tensor, grad_BSD: Tensor, *, rounds: int, warmup: int
) -> dict[tuple[str, str], float]:
    """Median seconds of each step of this project's layer, run one at a time on what the step before it gave."""
    layer = MoELayer(config, x_BSD.shape[-1], ParallelGroups(), Init(0)).to(x_BSD.device, x_BSD.dtype)
    x_TD, grad_TD = x_BSD.flatten(0, 1), grad_BSD.flatten(0, 1)
    samples: dict[tuple[str, str], list[float]] = {}
    for round_number in range(warmup + rounds):
        for part, forward, backward in _parts_once(layer, x_TD, grad_TD):
            if round_number >= warmup:
                samples.setdefault((part, "forward"), []).append(forward)
                samples.setdefault((part, "backward"), []).append(backward)
    return {key: statistics.median(values) for key, values in samples.items()}


def _parts_once(layer: MoELayer, x_TD: Tensor, grad_TD: Tensor) -> list[tuple[str, float, float]]:
    """(part, forward seconds, backward seconds) of one pass; gradients of ones stand for those from above."""
    results = []

    def timed(part: str, step: Callable[[], Any], outputs: Callable[[Any], list[Tensor]]) -> Any:
        layer.zero_grad(set_to_none=True)
        start = _now()
        result = step()
        middle = _now()
        with_grad = [out for out in outputs(result) if out.requires_grad]
        if with_grad:
            torch.autograd.backward(with_grad, [torch.ones_like(out) for out in with_grad])
        results.append((part, middle - start, _now() - middle))
        return result

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().requires_grad_()

    x = leaf(x_TD)
    routing = timed("route", lambda: layer.route(x, None, None), lambda r: [r.weights_TK, r.logits_TE])
    plan = timed("plan", lambda: layer.plan(routing, len(x), None), lambda _: [])
    timed(
        "statistics",
        lambda: make_stats(layer.config, layer.route(x, None, None), plan.dropped, 1, None),
        lambda s: [s.aux_loss, s.z_loss],
    )
    rows = timed("gather", lambda: gather_rows(leaf(x_TD), plan), lambda y: [y])
    rows = leaf(rows)
    expert_rows = timed("experts", lambda: layer.experts(rows, plan.counts_E), lambda y: [y])
    plan = plan._replace(weight_N=leaf(plan.weight_N))
    expert_rows = leaf(expert_rows)
    timed("combine", lambda: combine_rows(expert_rows, plan, len(x_TD)), lambda y: [y])
    return results


def _time_once(layer: nn.Module, x_BSD: Tensor, grad_BSD: Tensor) -> tuple[float, float]:
    """Seconds of one forward and one backward pass; clearing the gradients is not counted."""
    layer.zero_grad(set_to_none=True)
    x_BSD.grad = None
    start = _now()
    output = layer(x_BSD)
    middle = _now()
    output.backward(grad_BSD)
    return middle - start, _now() - middle


def _step(layer: nn.Module, x_BSD: Tensor, grad_BSD: Tensor) -> None:
    layer.zero_grad(set_to_none=True)
    x_BSD.grad = None
    layer(x_BSD).backward(grad_BSD)


def _now() -> float:
    """Seconds, once all queued work of the device is done."""
    devices.accelerator().synchronize()
    return time.perf_counter()


def _list_peers() -> str:
    return "; ".join(f"{name} = {text}" for name, text in PEERS.items())


def profile(step: Callable[[], Any], device: torch.device) -> str:
    """A table of what ``step`` spends its time on: kernels on an accelerator, operators on a CPU; longest first."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as record:
        step()
        devices.accelerator().synchronize()
    key = "self_cpu_time_total" if device.type == "cpu" else f"self_{device.type}_time_total"
    return record.key_averages().table(sort_by=key, row_limit=60, max_name_column_width=80)


def _cells(row: Row) -> list[str]:
    peak, ratio, rate = row["peak_bytes"], row["ratio_to_dense"], row["tflops"]
    return [
        str(row["num_experts"]),
        row["name"],
        row["direction"],
        f"{row['median_ms']:.2f}",
        f"{rate:.3f}" if rate else "",
        f"{ratio:.2f}" if ratio else "",
        f"{peak / 2**20:.0f}" if peak else "",
    ]


def _show(rows: list[Row]) -> None:
    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*_cells(row))
    Console().print(table)
