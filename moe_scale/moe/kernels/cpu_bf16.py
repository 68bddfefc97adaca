"""The kernel of ``cpu_bf16.cpp``: built once a machine, loaded once a process, called without Python's lock.

Shapes: T tokens, E experts, N rows sorted by expert, D model width, F expert hidden width; I = 2F for a gated
activation, else F.

It runs on the threads of torch's own pool (OpenMP), since those of a pool beside it lose some four milliseconds to
each of torch's that still spin for work.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from moe_scale.parallel.device import cpu_flags

log = logging.getLogger("moe_scale.kernels")

SOURCE = Path(__file__).with_suffix(".cpp")
INSTRUCTIONS = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16")
FLAGS = (
    "-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-mprefer-vector-width=512", "-mfma",
    *(f"-m{name.replace('_', '')}" for name in INSTRUCTIONS),
)  # fmt: skip
ACTIVATIONS = {"swiglu": 0, "gelu": 1, "relu": 2}
DTYPES = {
    "token": torch.int64, "weight": torch.float32, "grad_weight": torch.float32, "scratch": torch.uint8,
}  # fmt: skip
"""Of the arguments that are not bf16."""
BUILD_TIMEOUT_S = 120


class _Call(ctypes.Structure):
    """``Call`` of the source, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("num_experts", "d_model", "hidden_size", "activation", "threads")),
        *(
            (name, ctypes.c_void_p)
            for name in ("counts", "token", "weight", "x", "up", "down", "hidden", "scratch", "y", "grad", "grad_x")
        ),
        *((name, ctypes.c_void_p) for name in ("grad_weight", "grad_up", "grad_down")),
    )


def takes(dtype: torch.dtype, d_model: int, hidden_size: int) -> bool:
    """Whether the kernel runs here, and has experts of these widths and type. Builds it when first asked."""
    return dtype == torch.bfloat16 and d_model % 32 == 0 and hidden_size % 32 == 0 and library() is not None


def forward(
    x_TD: Tensor, token_N: Tensor | None, weight_N: Tensor | None, gate_up_EID: Tensor, down_EDF: Tensor,
    counts: list[int], activation: str, hidden_NI: Tensor, y_ND: Tensor,
) -> None:  # fmt: skip
    """What ``cpu_experts`` does before its sum: write ``hidden_NI`` and the rows' weighted outputs ``y_ND``.

    Args:
        token_N: token that each row copies; None where ``x_TD`` are the rows.
        weight_N: fp32 factor of each row's output, or None.
        counts: rows of each expert.
    """
    call = _call(x_TD, token_N, weight_N, gate_up_EID, down_EDF, activation)
    _run("forward", call, counts, hidden=hidden_NI, y=y_ND)


def backward(
    grad_TD: Tensor, x_TD: Tensor, token_N: Tensor | None, weight_N: Tensor | None, gate_up_EID: Tensor,
    down_EDF: Tensor, counts: list[int], activation: str, hidden_NI: Tensor, grad_x_ND: Tensor | None,
    grad_weight_N: Tensor | None, grad_gate_up_EID: Tensor | None, grad_down_EDF: Tensor | None,
) -> None:  # fmt: skip
    """Its gradients, from that of the tokens' sums: write those that are not None."""
    call = _call(x_TD, token_N, weight_N, gate_up_EID, down_EDF, activation)
    _run(
        "backward", call, counts, hidden=hidden_NI, grad=grad_TD, grad_x=grad_x_ND, grad_weight=grad_weight_N,
        grad_up=grad_gate_up_EID, grad_down=grad_down_EDF,
    )  # fmt: skip


def _call(
    x_TD: Tensor, token_N: Tensor | None, weight_N: Tensor | None, gate_up_EID: Tensor, down_EDF: Tensor, kind: str
) -> _Call:
    num_experts, d_model, hidden_size = down_EDF.shape
    call = _Call(num_experts, d_model, hidden_size, ACTIVATIONS[kind], torch.get_num_threads())
    _point(call, token=token_N, weight=weight_N, x=x_TD, up=gate_up_EID, down=down_EDF)
    return call


def _run(direction: str, call: _Call, counts: list[int], **tensors: Tensor | None) -> None:
    built = library()
    assert built is not None, "takes() says whether there is a library"
    _point(call, **tensors)
    kept = (ctypes.c_int64 * len(counts))(*counts)
    call.counts = ctypes.addressof(kept)
    size = built.moe_experts_scratch(ctypes.byref(call), direction == "backward")
    scratch = torch.empty(size, dtype=torch.uint8)
    _point(call, scratch=scratch)
    getattr(built, f"moe_experts_{direction}")(ctypes.byref(call))


def _point(call: _Call, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None:
            expected = DTYPES.get(name, torch.bfloat16)
            if tensor.dtype != expected or not tensor.is_contiguous():
                raise TypeError(f"{name} has to be contiguous and {expected}, not {tensor.dtype}, {tensor.stride()}")
            setattr(call, name, tensor.data_ptr())


# --- building


@functools.cache
def library() -> ctypes.CDLL | None:
    """The built kernel. None where the CPU lacks its instructions, or has AMX, with which torch's own products are
    faster than these; and where there is no compiler, which is told once."""
    flags = cpu_flags()
    if not flags.issuperset(INSTRUCTIONS) or "amx_bf16" in flags:
        return None
    try:
        built = ctypes.CDLL(str(build(_cache())))
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("the experts take torch's products, which are slower: no kernel could be built (%s)", error)
        return None
    built.moe_experts_scratch.restype = ctypes.c_int64
    return built


def build(folder: Path) -> Path:
    """The library in ``folder``, compiled if it is not there yet.

    Its name says what it was made of. Any number of processes may build at once: each compiles beside it and then
    takes the name, so that nobody sees half a file and nobody waits for a process that has died.

    Raises:
        OSError: no compiler (``$CXX``, or ``g++``), or the folder can't be written.
        subprocess.SubprocessError: the compiler failed, or took more than two minutes.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise FileNotFoundError(f"there is no compiler {compiler}; CXX names another")
    version = _compile(compiler, "--version")
    digest = hashlib.sha256(b"\0".join([SOURCE.read_bytes(), version.encode(), " ".join(FLAGS).encode()])).hexdigest()
    library_path = folder / f"cpu_bf16-{digest[:16]}.so"
    if not library_path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as beside:
            made = Path(beside) / library_path.name
            _compile(compiler, *FLAGS, str(SOURCE), "-o", str(made))
            made.replace(library_path)
    return library_path


def _compile(compiler: str, *arguments: str) -> str:
    result = subprocess.run([compiler, *arguments], capture_output=True, text=True, timeout=BUILD_TIMEOUT_S)
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise subprocess.SubprocessError(f"{compiler} ended with {result.returncode}: {last}")
    return result.stdout


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "moe_scale"
