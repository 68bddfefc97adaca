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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.table import Table
from torch import Tensor, nn

from moe_scale.config import MoEConfig
from moe_scale.errors import Problem, raise_if
from moe_scale.initialization import Init
from moe_scale.moe.backends.support import unsupported
from moe_scale.moe.kernels import cpu_bf16
from moe_scale.moe.layer import MoELayer, make_stats
from moe_scale.parallel import device as devices
from moe_scale.parallel.groups import ParallelGroups
from moe_scale.telemetry.provenance import package_versions, source_state
from moe_scale.telemetry.terminal import Console
from moe_scale.tools.arguments import not_negative, positive
from moe_scale.tools.peers import PEERS, build_peer, peak_extra_bytes
from moe_scale.tools.tables import markdown
from moe_scale.tools.verdict import Finding, judge, median_ratio

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DEFAULT_PEERS = ["dense", "custom", "deepspeed", "hf-grouped"]
COLUMNS = ["E", "layer", "direction", "ms", "TFLOP/s", "x dense", "x custom", "peak MiB", "less grads"]
Row = dict[str, Any]
Key = TypeVar("Key")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The tool's flags."""
    parser.add_argument("--tokens", type=positive, default=2048, help="tokens T [%(default)s]")
    parser.add_argument("--d_model", type=positive, default=1024, help="model width D [%(default)s]")
    parser.add_argument("--intermediate_size", type=positive, default=512, help="expert width F [%(default)s]")
    parser.add_argument("--num_experts", type=positive, nargs="+", default=[64], help="experts E, one or several [64]")
    parser.add_argument("--top_k", type=positive, default=2, help="experts per token K [%(default)s]")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="precision [%(default)s]")
    parser.add_argument(
        "--peers", nargs="+", choices=PEERS, default=DEFAULT_PEERS, help=f"what to time: {_list_peers()}"
    )
    parser.add_argument("--rounds", type=positive, default=15, help="counted rounds; the median is taken [%(default)s]")
    parser.add_argument("--warmup", type=not_negative, default=3, help="rounds that are not counted [%(default)s]")
    parser.add_argument("--threads", type=not_negative, default=0, help="CPU threads; 0: torch's choice [%(default)s]")
    parser.add_argument(
        "--output_dir", default="", help="also write bench.json (rows), verdict.json and bench.md there"
    )
    parser.add_argument(
        "--calibrate",
        default="",
        metavar="RECIPE",
        help="instead: measure the rates that moe-scale plan --calibration reads, at a recipe's shapes; its settings "
        "may follow, and of the flags here --rounds, --warmup, --threads and --output_dir hold",
    )
    parser.add_argument(
        "--profile", action="store_true", help="with output_dir: also the operators of each layer by time"
    )


def run(arguments: argparse.Namespace, recipe_argv: list[str] | None = None) -> dict[str, Any]:
    """Time everything that was asked for, print a table and a verdict, and write both into a folder.

    Args:
        recipe_argv: settings of the recipe that ``--calibrate`` names.

    Returns:
        ``rows``, one a layer or part, shape and direction; and ``verdict``, one a target. With ``--calibrate`` rates.
    """
    if arguments.calibrate:
        from moe_scale.tools.calibrate import calibrate  # it imports what imports this module

        return calibrate(arguments, recipe_argv or [])
    _check(arguments)
    device = devices.current()
    if device.type == "cpu":
        devices.keep_freed_memory()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if "triton" in arguments.peers:
        raise_if(unsupported(MoEConfig(kernels="triton"), zero_stage=0, on_cpu=device.type == "cpu"))
    rows, findings = bench(arguments, device)
    results = {"rows": rows, "verdict": [{**found._asdict(), "reached": found.reached} for found in findings]}
    if arguments.output_dir:
        folder = Path(arguments.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        for name, part in (("bench", "rows"), ("verdict", "verdict")):
            (folder / f"{name}.json").write_text(json.dumps(results[part], indent=1) + "\n")
        (folder / "bench.md").write_text(markdown(COLUMNS, [_cells(row) for row in rows]) + "\n")
    _show(rows, findings)
    if arguments.output_dir:
        print(f"wrote bench.json, verdict.json and bench.md to {folder}")
    return results


def _check(arguments: argparse.Namespace) -> None:
    problems = [
        Problem("--top_k", f"{arguments.top_k} of {size} experts", f"choose 1 to {size}")
        for size in arguments.num_experts
        if arguments.top_k > size
    ]
    if arguments.profile and not arguments.output_dir:
        problems.append(Problem("--profile", "without --output_dir", "name a folder for the profiles"))
    if arguments.output_dir and (Path(arguments.output_dir) / "bench.json").exists():
        problems.append(Problem("--output_dir", f"{arguments.output_dir} holds a bench already", "name a new folder"))
    raise_if(problems)


def bench(arguments: argparse.Namespace, device: torch.device) -> tuple[list[Row], list[Finding]]:
    """Each layer of each shape forward, backward and both; the parts of this project's layer; and the verdict."""
    dtype, tokens, d_model = DTYPES[arguments.dtype], arguments.tokens, arguments.d_model
    configs = {
        size: MoEConfig(num_experts=size, top_k=arguments.top_k, intermediate_size=arguments.intermediate_size)
        for size in sorted(set(arguments.num_experts))
    }
    layers = {
        (size, name): build_peer(name, config, d_model).to(device, dtype)
        for size, config in configs.items()
        for name in arguments.peers
    }
    input_seed, grad_seed = Init(1), Init(2)
    x_BSD = input_seed.normal_(torch.empty(1, tokens, d_model, device=device), 1.0).to(dtype).requires_grad_()
    grad_BSD = grad_seed.normal_(torch.empty(1, tokens, d_model, device=device), 1.0).to(dtype)

    samples = sample_layers(layers, x_BSD, grad_BSD, rounds=arguments.rounds, warmup=arguments.warmup)
    if arguments.profile and arguments.output_dir:
        for (size, name), layer in layers.items():
            path = Path(arguments.output_dir) / f"profile_{name}_{size}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(profile(functools.partial(step_once, layer, x_BSD, grad_BSD), device))
    peaks, weight_grads = {}, {}
    for key, layer in layers.items():
        x_BSD.grad = None  # left by the layer before, its release would count for this one
        layer.zero_grad(set_to_none=True)
        peaks[key] = peak_extra_bytes(functools.partial(step_once, layer, x_BSD, grad_BSD), device)
        weight_grads[key] = sum(p.grad.nbytes for p in layer.parameters() if p.grad is not None)
        layer.zero_grad(set_to_none=True)

    rows = []
    for key, name in ((key, key[1]) for key in layers):
        shared = _circumstances(configs[key[0]], arguments)
        forward_flops = 6 * tokens * arguments.top_k * d_model * arguments.intermediate_size
        for direction, passes in (("forward", 1), ("backward", 2), ("both", 3)):
            mine, floor = samples[direction][key], samples[direction].get((key[0], "dense"))
            ours, both = samples[direction].get((key[0], "custom")), direction == "both"
            median = statistics.median(mine)
            rows.append(
                {
                    "name": name,
                    "direction": direction,
                    "median_ms": median * 1e3,
                    "tflops": passes * forward_flops / median / 1e12,
                    "ratio_to_dense": median_ratio(mine, floor) if floor else None,
                    "ratio_to_custom": median_ratio(mine, ours) if ours else None,
                    "ratio_to_fewest_experts": median_ratio(mine, samples[direction][min(configs), name]),
                    "peak_bytes": peaks[key] if both else None,
                    "peak_bytes_without_weight_grads": peaks[key] - weight_grads[key] if both else None,
                    **shared,
                }
            )
    for size, config in configs.items():
        if (size, "custom") in layers:
            parts = time_parts(config, x_BSD.detach(), grad_BSD, rounds=arguments.rounds, warmup=arguments.warmup)
            rows += [
                {
                    "name": f"custom/{part}",
                    "direction": direction,
                    "median_ms": seconds * 1e3,
                    **_circumstances(config, arguments),
                }
                for (part, direction), seconds in parts.items()
            ]
    own_grads = {size: count for (size, name), count in weight_grads.items() if name == "custom"}
    return rows, judge(samples["both"], peaks, own_grads)


def _circumstances(config: MoEConfig, arguments: argparse.Namespace) -> Row:
    device = devices.detect()
    return {
        "tokens": arguments.tokens,
        "d_model": arguments.d_model,
        "intermediate_size": config.intermediate_size,
        "num_experts": config.num_experts,
        "top_k": config.top_k,
        "dtype": arguments.dtype,
        "device": device.name,
        "emulated": device.is_cpu and _is_emulated(arguments.dtype),
        "compiled": device.is_cpu
        and cpu_bf16.has_kernel(DTYPES[arguments.dtype], arguments.d_model, config.intermediate_size),
        "threads": torch.get_num_threads(),
        "rounds": arguments.rounds,
        "load_average": os.getloadavg()[0],
        "versions": package_versions(),
        "source": source_state(Path(__file__).resolve().parents[1])[0],
    }


def _is_emulated(dtype: str) -> bool:
    """Whether this CPU lacks instructions for products of the type: then torch's own are no floor for anything."""
    return dtype == "fp16" or (dtype == "bf16" and not devices.has_fast_bf16_cpu())


def sample_layers(
    layers: Mapping[Key, nn.Module], x_BSD: Tensor, grad_BSD: Tensor, *, rounds: int, warmup: int
) -> dict[str, dict[Key, list[float]]]:
    """Seconds of each layer in each round, "forward", "backward" and "both", timed in turn round after round."""
    samples: dict[str, dict[Key, list[float]]] = {"forward": {}, "backward": {}, "both": {}}
    for round_number in range(warmup + rounds):
        for key, layer in layers.items():
            forward, backward = _time_once(layer, x_BSD, grad_BSD)
            if round_number >= warmup:
                for direction, seconds in (("forward", forward), ("backward", backward), ("both", forward + backward)):
                    samples[direction].setdefault(key, []).append(seconds)
    return samples


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
    """(part, forward seconds, backward seconds) of one pass; gradients of ones stand for those from above.

    The experts include the gather before and the combine after them, as kernels join the three.
    """
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
    routed = layer.route(x, None, None)
    routed = routed._replace(logits_TE=leaf(routed.logits_TE), probs_TE=leaf(routed.probs_TE))
    timed(
        "statistics",
        lambda: make_stats(layer.config, routed, plan.dropped, 1, None),
        lambda s: [s.aux_loss, s.z_loss],
    )
    x, plan = leaf(x_TD), plan._replace(weight_N=leaf(plan.weight_N))
    timed("experts", lambda: layer.experts(x, plan.counts_E, plan), lambda y: [y])
    return results


def _time_once(layer: nn.Module, x_BSD: Tensor, grad_BSD: Tensor) -> tuple[float, float]:
    """Seconds of one forward and one backward pass; clearing the gradients is not counted.

    They are the layer's own of the round before, as in training: cleared after the step instead, their memory goes to
    the next layer, and on a CPU the layers' times shift against each other by a tenth and more.
    """
    layer.zero_grad(set_to_none=True)
    x_BSD.grad = None
    start = _now()
    output = layer(x_BSD)
    middle = _now()
    output.backward(grad_BSD)
    return middle - start, _now() - middle


def step_once(layer: nn.Module, x_BSD: Tensor, grad_BSD: Tensor) -> None:
    """One forward and one backward pass from cleared gradients."""
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
    def cell(name: str, form: str = ".2f", scale: float = 1.0) -> str:
        return format(row[name] * scale, form) if row.get(name) is not None else ""

    return [
        cell("num_experts", "d", 1),
        row["name"],
        row["direction"],
        cell("median_ms"),
        cell("tflops", ".3f"),
        cell("ratio_to_dense"),
        cell("ratio_to_custom"),
        cell("peak_bytes", ".0f", 2**-20),
        cell("peak_bytes_without_weight_grads", ".0f", 2**-20),
    ]


def _show(rows: list[Row], findings: list[Finding]) -> None:
    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*_cells(row))
    console = Console()
    console.print(table)
    for found in findings:
        console.print(str(found), highlight=False)
    if rows and rows[0]["emulated"]:
        console.print(
            f"note: this CPU has no instructions for {rows[0]['dtype']}. The custom layer multiplies in fp32 instead, "
            "the others as torch does, so that their times say little: see --dtype fp32.",
            highlight=False,
        )
