"""What of a DeepSpeed JSON does not combine: with the ZeRO stage, the ranks, the device, or the spread of the experts.

DeepSpeed's schema lets all of it through. Its engine then trips over it in the middle of a start, ignores it, or, at
worst, trains on wrong numbers.
"""

from __future__ import annotations

from typing import Any

from moe_scale.config import RunConfig
from moe_scale.errors import Problem
from moe_scale.parallel.device import Device
from moe_scale.parallel.launch import Launch

_WHERE = "deepspeed_config: zero_optimization"
_HPZ = "zero_hpz_partition_size"
_QUANTIZED_WEIGHTS = ("zero_quantized_weights", "zero_quantized_nontrainable_weights")


def offload_problems(zero: dict[str, Any], stage: int) -> list[Problem]:
    """Offloading that has no effect at the stage, is spelt as in older versions, or cannot be checkpointed."""
    found = []
    for old, new in (("cpu_offload", "offload_optimizer"), ("cpu_offload_params", "offload_param")):
        if zero.get(old):
            instead = f'write "{new}": {{"device": "cpu"}}'
            found.append(Problem(f"{_WHERE}.{old}", "DeepSpeed has replaced this key", instead))
    for name, stages in (("offload_optimizer", (1, 2, 3)), ("offload_param", (3,))):
        section = zero.get(name) or {}
        if section.get("device", "none") == "none":
            continue
        if stage not in stages:
            needed = " or ".join(map(str, stages))
            found.append(Problem(f"{_WHERE}.{name}", f"without effect at stage {stage}", f"needs stage {needed}"))
        if section["device"] == "nvme":
            what = "nvme: a checkpoint cannot be taken of what is swapped out to a file"
            found.append(Problem(f"{_WHERE}.{name}.device", what, "use cpu"))
    return found


def hierarchical_problems(zero: dict[str, Any], stage: int, launch: Launch) -> list[Problem]:
    """hpZ (arXiv 2306.10209), a second copy of the weights inside each group of neighbouring ranks, against the ranks.

    A group within a node has to divide it, and one of several nodes has to be whole nodes: a group that is cut by the
    border of a node would gather over the network what hpZ is there to keep off it. DeepSpeed takes a group larger than
    the run for the run.
    """
    size = zero.get(_HPZ, 1)
    if size <= 1:
        return []
    if stage < 3:
        return [Problem(f"{_WHERE}.{_HPZ}", f"without effect at stage {stage}", "needs stage 3")]
    node, world = launch.local_world_size, launch.world_size
    if world % size:
        allowed = f"choose a divisor of {node}, the ranks of a node" if node > 1 else "remove it"
        return [Problem(f"{_WHERE}.{_HPZ}", f"{size} does not divide the {_ranks(world)} of this run", allowed)]
    if node % size and size % node:
        allowed = f"choose a divisor or a multiple of {node}"
        return [Problem(f"{_WHERE}.{_HPZ}", f"{size} would cut nodes of {_ranks(node)}", allowed)]
    return []


def zenflow_problems(zero: dict[str, Any]) -> list[Problem]:
    """ZenFlow's asynchronous updates, which wrap DeepSpeed's own Adam on the host and fail in the first step here."""
    if not zero.get("zenflow"):
        return []
    what = "needs DeepSpeed's own Adam on the host, and the optimizer is the run's"
    return [Problem(f"{_WHERE}.zenflow", what, "remove it; offload_optimizer is possible")]


def quantization_problems(zero: dict[str, Any], stage: int, device: Device) -> list[Problem]:
    """ZeRO++'s quantized communication (arXiv 2306.10209) against the stage, the device and what its kernels can do."""
    found = []
    for name in _QUANTIZED_WEIGHTS:
        if not zero.get(name):
            continue
        if stage < 3:
            found.append(Problem(f"{_WHERE}.{name}", f"without effect at stage {stage}", "needs stage 3"))
        elif device.type != "cuda":
            found.append(Problem(f"{_WHERE}.{name}", f"its kernels need a GPU, not {device.name}", "remove it"))
    if zero.get("zero_quantized_gradients"):
        # DeepSpeed 0.19.8, coalesced_collectives.py and swizzled_quantize.cu: the gradient's address is read as that of
        # fp16 numbers whatever they are, and of a tensor of three dimensions whose groups of values come to more than
        # 40,960 none is written. Both without an error.
        what = "its kernel reads bf16 as if it were fp16, and skips tensors as large as the experts'"
        found.append(Problem(f"{_WHERE}.zero_quantized_gradients", what, "remove it; quantized weights are possible"))
    return found


def gradient_problems(raw: dict[str, Any], stage: int) -> list[Problem]:
    """Scaling of gradients before they are reduced, which ZeRO-3 refuses in the middle of a start or gets wrong."""
    if stage < 3:
        return []
    found = []
    factor = raw.get("gradient_predivide_factor", 1)
    if factor != 1:
        # DeepSpeed 0.19.8, stage3.py: an assertion with reduce_scatter, which is the default; without it gradients are
        # divided by the factor, and not multiplied back where that is the number of ranks.
        what = f"{factor} at stage 3, where gradients come out too small by it or the start fails"
        found.append(Problem("deepspeed_config: gradient_predivide_factor", what, "remove it, or use stage 1 or 2"))
    if raw.get("prescale_gradients"):
        what = "true at stage 3, where the start fails"
        found.append(Problem("deepspeed_config: prescale_gradients", what, "remove it, or use stage 1 or 2"))
    return found


def master_problems(raw: dict[str, Any]) -> list[Problem]:
    """Master weights or moments of 16 bits, which DeepSpeed has for its own Adam on the host alone."""
    named = {
        "bf16": ("bf16_master_weights_and_grads", "bf16_optimizer_states"),
        "fp16": ("fp16_master_weights_and_grads",),
    }
    what = "needs DeepSpeed's own Adam on the host, and the optimizer is the run's, with master weights in fp32"
    return [
        Problem(f"deepspeed_config: {section}.{name}", what, "remove it; --optim.name adamw8bit saves memory")
        for section, names in named.items()
        for name in names
        if isinstance(raw.get(section), dict) and raw[section].get(name)
    ]


def parallelism_problems(config: RunConfig, zero: dict[str, Any], launch: Launch) -> list[Problem]:
    """Expert parallelism and the backend against the number of ranks and hpZ."""
    moe = config.moe
    found: list[Problem] = []
    if not moe.enabled:
        return found
    if launch.world_size % moe.ep_size:
        what = f"{moe.ep_size} does not divide the {_ranks(launch.world_size)} of this run"
        allowed = f"start a multiple of {moe.ep_size} ranks or lower moe.ep_size"
        found.append(Problem("moe.ep_size", what, allowed))
    if zero.get(_HPZ, 1) > 1:
        what = f"{zero[_HPZ]} does not combine with"
        if moe.ep_size > 1:  # experts are sharded over fewer ranks than the rest, and hpZ has one group for all
            instead = "remove it, or set moe.ep_size 1"
            found.append(Problem(f"{_WHERE}.{_HPZ}", f"{what} moe.ep_size = {moe.ep_size}", instead))
        if moe.backend == "autoep":  # DeepSpeed's own rule
            instead = "remove it, or use another backend"
            found.append(Problem(f"{_WHERE}.{_HPZ}", f"{what} moe.backend = autoep", instead))
    return found


def _ranks(number: int) -> str:
    return "1 rank" if number == 1 else f"{number} ranks"
