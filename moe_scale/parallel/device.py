"""The device of this process, as DeepSpeed's accelerator abstraction gives it: CPU, CUDA, ROCm and others alike."""

from __future__ import annotations

import base64
import ctypes
import logging
import os
import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from moe_scale.config import Scale
from moe_scale.parallel.launch import Launch


def accelerator():
    """DeepSpeed's accelerator object; on a machine without one, the CPU."""
    if "deepspeed" in sys.modules:
        return sys.modules["deepspeed"].accelerator.get_accelerator()
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.ERROR)  # "Setting accelerator to CPU" is no news on a machine without one
    try:
        from deepspeed.accelerator import get_accelerator

        return get_accelerator()
    finally:
        logger.setLevel(level)


@dataclass(frozen=True)
class Device:
    """What the checks and the telemetry need to know of the device, in plain values."""

    type: str
    name: str
    bf16: bool
    fp16: bool

    @property
    def is_cpu(self) -> bool:
        return self.type == "cpu"


def detect() -> Device:
    found = accelerator()
    kind = found.device_name()
    if kind == "cpu":
        return cpu()
    return Device(
        kind, torch.get_device_module(kind).get_device_name(), found.is_bf16_supported(), found.is_fp16_supported()
    )


def cpu() -> Device:
    """This machine's CPU, also where it has something faster."""
    fp16 = accelerator().device_name() != "cpu" or bool(accelerator().is_fp16_supported())
    return Device("cpu", _cpu_name(), bf16=True, fp16=fp16)


def current() -> torch.device:
    """The device of this rank, once the process group is up."""
    found = accelerator()
    return torch.device(found.current_device_name())


def natural_scale(device: Device, launch: Launch) -> Scale:
    """The scale of a recipe that fits where it was started."""
    if device.is_cpu:
        return "cpu"
    if launch.world_size == 1:
        return "1gpu"
    return "1node" if launch.num_nodes == 1 else "multinode"


def peak_memory_bytes(device: Device) -> int:
    """Most memory held so far: by the allocator on an accelerator, by the whole process on a CPU."""
    if not device.is_cpu:
        return int(accelerator().max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory(device: Device) -> None:
    """Begin :func:`peak_memory_bytes` anew on an accelerator; a process on a CPU has one peak for good."""
    if not device.is_cpu:
        accelerator().reset_peak_memory_stats()


def rng_states() -> dict[str, str]:
    """The states of this rank's random generators, as text: the host's, and the device's where it has its own."""
    states = {"cpu": torch.get_rng_state()}
    found = accelerator()
    if found.device_name() != "cpu":
        states[found.device_name()] = found.get_rng_state()
    return {name: base64.b64encode(state.cpu().numpy().tobytes()).decode() for name, state in states.items()}


def set_rng_states(states: Mapping[str, str]) -> None:
    """Put back what :func:`rng_states` gave."""
    for name, text in states.items():
        state = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        if name == "cpu":
            torch.set_rng_state(state)
        elif name == accelerator().device_name():  # another kind of device has other states
            accelerator().set_rng_state(state)


def keep_freed_memory() -> bool:
    """Make this process reuse the memory of freed tensors instead of handing it back to the system; for CPU runs.

    glibc maps large blocks one by one and unmaps them when freed, so that every large gradient is built on pages that
    the kernel has to hand out and clear anew: on two cores a third of a training step. Returns whether it took
    effect; without glibc nothing is changed.
    """
    mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h
    try:
        libc = ctypes.CDLL(None)
        return bool(libc.mallopt(mmap_threshold, 1 << 30) and libc.mallopt(trim_threshold, (1 << 31) - 1))
    except (OSError, AttributeError):
        return False


def cpu_flags() -> frozenset[str]:
    """The features that the CPU has, by Linux's names; none where that is not known."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="ignore") as info:
            return frozenset(next((line for line in info if line.startswith("flags")), "").split())
    except OSError:
        return frozenset()


def has_fast_bf16_cpu() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware (AVX512-BF16 or AMX)."""
    return not cpu_flags().isdisjoint({"avx512_bf16", "amx_bf16"})


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="ignore") as info:
            name = next((line.split(":", 1)[1].strip() for line in info if line.startswith("model name")), "CPU")
    except OSError:
        name = "CPU"
    return f"{name} ({len(os.sched_getaffinity(0))} cores)" if hasattr(os, "sched_getaffinity") else name
