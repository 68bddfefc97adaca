"""The Triton kernels without a GPU: what they compute, that a compiler takes them, that the host waits for nothing.

What they compute is in ``interpreted_cases.py``: the interpreter has to be on before Triton is imported, so that file
is run in a process of its own. Those of ``tests/numerics/test_gpu.py`` run them on a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_scale.config import MoEConfig
from moe_scale.initialization import Init
from moe_scale.moe.layer import MoELayer
from moe_scale.parallel.groups import ParallelGroups
from tests.ranks import REPO

triton = pytest.importorskip("triton")


@pytest.mark.slow
def test_the_kernels_compute_what_they_should() -> None:
    cases = Path(__file__).with_name("interpreted_cases.py")
    command = [sys.executable, "-m", "pytest", str(cases), "-q", "-p", "no:cacheprovider"]
    ran = subprocess.run(
        command, cwd=REPO, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=280
    )
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    assert " passed" in ran.stdout
    assert "skipped" not in ran.stdout


# --- compiled for a Hopper GPU, which needs none

WIDTHS = {"D": 1024, "F": 512}
KERNELS: dict[str, tuple[str, dict[str, Any]]] = {
    "schedule": ("schedule_kernel", {"BLOCK_M": 128, "BLOCK_L": 64, "BLOCK_TILES": 128}),
    "up": ("up_kernel", {**WIDTHS, "ACTIVATION": "swiglu", "BLOCK_M": 128}),
    "up, odd sizes": ("up_kernel", {"D": 72, "F": 40, "ACTIVATION": "gelu", "BLOCK_M": 64}),
    "down": (
        "rows_kernel",
        {"DEPTH": 512, "WIDTH": 1024, "STRIDE_N": 512, "STRIDE_K": 1, "WEIGHTED": True, "BLOCK_M": 128},
    ),
    "down, backward": ("down_backward_kernel", {**WIDTHS, "ACTIVATION": "swiglu", "BLOCK_M": 128, "BLOCK_N": 128}),
    "weights": ("weight_grad_kernel", {"HEIGHT": 1024, "WIDTH": 512, "GATHER_A": True, "GATHER_B": False}),
    "sum": ("sum_places_kernel", {"D": 1024, "TOP_K": 2, "BLOCK_T": 4, "BLOCK_D": 1024}),
}
POINTERS = {
    "counts_ptr": "*i64", "token_ptr": "*i64", "place_ptr": "*i64", "starts_ptr": "*i32", "expert_of_tile_ptr": "*i32",
    "row_of_tile_ptr": "*i32", "weight_ptr": "*fp32", "grad_weight_ptr": "*fp32",
}  # fmt: skip
SHARED_MEMORY_OF_HOPPER = 232_448


@pytest.mark.slow
@pytest.mark.parametrize("case", KERNELS)
def test_hopper_code_can_be_made(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs what the compiler may refuse. Products of bf16 use the matrix unit, and fit the memory."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from moe_scale.moe.kernels import grouped_gemm_triton

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    name, constants = KERNELS[case]
    kernel, options = getattr(grouped_gemm_triton, name), {}
    if hasattr(kernel, "configs"):
        config = kernel.configs[0]
        constants = {**constants, **config.kwargs}
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        kernel = kernel.fn
    signature, attributes = {}, {}
    for place, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument.endswith("_ptr"):
            signature[argument] = POINTERS.get(argument, "*bf16")
            attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[argument] = "i32"
    constexprs = {(kernel.arg_names.index(argument),): value for argument, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=constexprs, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert compiled.metadata.shared <= SHARED_MEMORY_OF_HOPPER
    if name not in ("schedule_kernel", "sum_places_kernel"):
        assert "wgmma.mma_async" in compiled.asm["ptx"]
        assert "cp.async" in compiled.asm["ptx"], "loads run ahead of the products"


# --- the host


class NoLaunch:
    """Stands for a kernel where there are only shapes."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: None


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("dispatch", ["dropless", "capacity"])
def test_the_host_reads_nothing_back(dispatch: str, padding: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on the meta device have no values: reading one on the host is an error."""
    from moe_scale.moe.kernels import grouped_gemm_triton

    for name in {name for name, _ in KERNELS.values()}:
        monkeypatch.setattr(grouped_gemm_triton, name, NoLaunch())
    config = MoEConfig(kernels="triton", num_experts=8, intermediate_size=64, dispatch=dispatch)  # type: ignore[arg-type]
    layer = MoELayer(config, 128, ParallelGroups(), Init(0)).to("meta", torch.bfloat16)
    x_BSD = torch.randn(2, 96, 128, device="meta", dtype=torch.bfloat16, requires_grad=True)
    y_BSD, stats = layer(x_BSD, torch.ones(2, 96, device="meta", dtype=torch.bool) if padding else None)
    (y_BSD.float().mean() + stats.aux_loss + stats.z_loss).backward()
    assert x_BSD.grad is not None
    assert {name for name, p in layer.named_parameters() if p.grad is None} == set()
