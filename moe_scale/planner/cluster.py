"""The machine that a plan is for: devices, memories and links, as data with the source of each figure.

Units: bytes, bytes a second in one direction, FLOP/s, seconds. A data sheet's "GB" of bandwidth is 1e9 bytes; its "GB"
of a device's memory are what is soldered on, nearer to GiB, so memories are what drivers report.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from moe_scale.errors import ConfigError, Problem
from moe_scale.parallel.device import Device
from moe_scale.telemetry.throughput import peak_flops

GB = 1e9
GIB = 2.0**30


@dataclass(frozen=True)
class Cluster:
    """Equal nodes of equal devices.

    Attributes:
        name: of the preset.
        device_name: as a driver names it; the peaks are those that the MFU of a run is computed with.
        nodes: how many.
        devices_per_node: ranks of a node.
        device_memory: bytes of one device, as its driver reports them; of a CPU the host's.
        host_memory: bytes of one node, shared by its ranks.
        memory_bandwidth: of a device's own memory (HBM).
        intra_bandwidth: what one device sends inside its node.
        inter_bandwidth: what one device sends to other nodes: the node's adapters over its devices.
        host_bandwidth: between one device and the host.
        intra_latency, inter_latency: of one message.
        peaks: dense FLOP/s by precision, for a device that the table of peaks does not have.
        placeholder: whether the peaks are no more than something to plan with.
        reserved_memory: bytes a device that no tensor can have: context, libraries, communication buffers.
    """

    name: str
    device_name: str
    nodes: int = 1
    devices_per_node: int = 8
    device_memory: float = 79.2 * GIB
    host_memory: float = 2000 * GB
    memory_bandwidth: float = 1e12
    intra_bandwidth: float = 1e11
    inter_bandwidth: float = 25 * GB
    host_bandwidth: float = 25 * GB
    intra_latency: float = 10e-6
    inter_latency: float = 25e-6
    reserved_memory: float = 2 * GB
    peaks: Mapping[str, float] = field(default_factory=dict)
    placeholder: bool = False

    @property
    def world_size(self) -> int:
        return self.nodes * self.devices_per_node

    @property
    def is_cpu(self) -> bool:
        return self.name == "CPU"

    @property
    def device(self) -> Device:
        """The device as the checks of a run see it."""
        if self.is_cpu:
            return Device("cpu", self.device_name, bf16=True, fp16=True)
        return Device("cuda", self.device_name, bf16=True, fp16=True)

    def peak(self, precision: str) -> float:
        """Dense FLOP/s of one device. fp32 products run as TF32 where the device has it."""
        if precision in self.peaks:
            return self.peaks[precision]
        for dtype in ("tf32", "fp32") if precision == "fp32" else (precision,):
            if found := peak_flops(self.device_name, dtype):
                return found
        raise ConfigError(Problem("--cluster", f"{self.name} has no peak in {precision}", "give --peak_tflops"))


# Memory: about what drivers report in all (nvidia-smi, rocm-smi), which is the sheets' 40, 80, 141, 180 and 192 "GB"
# less what the device keeps for itself. Its bandwidth and the links inside a node: data sheets of A100, H100, H200, HGX
# B200 and MI300X, of which the links' bidirectional figures (600, 900, 900, 1800 and 896 GB/s) are halved. Between
# nodes: one adapter a device, as in DGX A100 (HDR, 200 Gbit/s), DGX H100, H200 and B200 and MI300X platforms (400
# Gbit/s). Host: PCIe 4 and 5 x16, at four fifths of 32 and 64 GB/s. Host memory: DGX of that generation. Latencies and
# reserved memory are assumptions.
# A CPU has no data sheet that says what torch reaches: its figures are placeholders until there is a calibration.
PRESETS: dict[str, Cluster] = {
    cluster.name: cluster
    for cluster in (
        Cluster("A100-40", "NVIDIA A100-SXM4-40GB", device_memory=39.4 * GIB, host_memory=1000 * GB,
                memory_bandwidth=1555 * GB, intra_bandwidth=300 * GB, inter_bandwidth=25 * GB),
        Cluster("A100-80", "NVIDIA A100-SXM4-80GB", device_memory=79.2 * GIB,
                memory_bandwidth=2039 * GB, intra_bandwidth=300 * GB, inter_bandwidth=25 * GB),
        Cluster("H100", "NVIDIA H100 80GB HBM3", device_memory=79.2 * GIB, memory_bandwidth=3350 * GB,
                intra_bandwidth=450 * GB, inter_bandwidth=50 * GB, host_bandwidth=51 * GB),
        Cluster("H200", "NVIDIA H200", device_memory=139.8 * GIB, memory_bandwidth=4800 * GB,
                intra_bandwidth=450 * GB, inter_bandwidth=50 * GB, host_bandwidth=51 * GB),
        Cluster("B200", "NVIDIA B200", device_memory=178 * GIB, memory_bandwidth=7700 * GB, host_memory=4000 * GB,
                intra_bandwidth=900 * GB, inter_bandwidth=50 * GB, host_bandwidth=51 * GB),
        Cluster("MI300X", "AMD Instinct MI300X", device_memory=192 * GIB, memory_bandwidth=5300 * GB,
                intra_bandwidth=448 * GB, inter_bandwidth=50 * GB, host_bandwidth=51 * GB),
        Cluster("CPU", "CPU", devices_per_node=1, device_memory=16 * GB, host_memory=16 * GB, reserved_memory=0.5 * GB,
                memory_bandwidth=10 * GB, intra_bandwidth=2 * GB, inter_bandwidth=1 * GB, host_bandwidth=10 * GB,
                peaks={"fp32": 1e11, "bf16": 2e11, "fp16": 1e11}, placeholder=True),
    )
}  # fmt: skip


def preset(name: str, **changes: float | int | None) -> Cluster:
    """The preset of that name with single figures replaced; those that are None stay.

    Raises:
        ConfigError: for an unknown name or figures that no machine has.
    """
    found = {key.lower(): cluster for key, cluster in PRESETS.items()}.get(name.lower())
    if found is None:
        raise ConfigError(Problem("--cluster", f"{name!r}", f"choose one of {', '.join(PRESETS)}"))
    if found.is_cpu and changes.get("device_memory") is not None:
        what = "a CPU has no memory beside its host's"
        raise ConfigError(Problem("--device_memory_gb", what, "give --host_memory_gb"))
    peak = changes.pop("peak", None)
    given = {key: value for key, value in changes.items() if value is not None}
    cluster = dataclasses.replace(found, **given)  # type: ignore[arg-type]
    if cluster.is_cpu:
        cluster = dataclasses.replace(cluster, device_memory=cluster.host_memory)
    if peak is not None:
        peaks = dict.fromkeys(("fp32", "bf16", "fp16"), float(peak))
        cluster = dataclasses.replace(cluster, peaks=peaks, placeholder=False)
    return cluster
