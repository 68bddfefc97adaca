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
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
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
ALIGNMENT = {"scratch": 64, "grad_up": 64, "grad_down": 64}
"""Bytes that an argument has to be aligned to, as what torch allocates is."""
BUILD_TIMEOUT_S = 120


class _Call(ctypes.Structure):
    """``Call`` of the source, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("num_experts", "d_model", "hidden_size", "activation", "threads")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "counts", "token", "weight", "x", "up", "down", "hidden", "scratch", "y",
                "grad", "grad_x", "grad_weight", "grad_up", "grad_down",
            )
        ),
    )  # fmt: skip

    def point(self, **tensors: Tensor | None) -> None:
        """Set fields to where tensors lie, if they lie as the source reads them.

        Raises:
            TypeError: a tensor of another type or layout.
        """
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            dtype = DTYPES.get(name, torch.bfloat16)
            if tensor.dtype != dtype or not tensor.is_contiguous() or tensor.data_ptr() % ALIGNMENT.get(name, 1):
                raise TypeError(f"{name} has to be contiguous {dtype}, not {tensor.dtype} of strides {tensor.stride()}")
            setattr(self, name, tensor.data_ptr())


def has_kernel(dtype: torch.dtype, *widths: int) -> bool:
    """Whether this machine has a kernel for matrices of these widths and type. Builds it when first asked."""
    return dtype == torch.bfloat16 and not any(width % 32 for width in widths) and library() is not None


def takes(x_TD: Tensor, weight_N: Tensor | None, gate_up_EID: Tensor, down_EDF: Tensor) -> bool:
    """Whether the kernel can do it with these, and as they are: it converts nothing."""
    return (
        x_TD.dtype == gate_up_EID.dtype == down_EDF.dtype
        and (weight_N is None or weight_N.dtype == torch.float32)
        and gate_up_EID.is_contiguous()
        and down_EDF.is_contiguous()
        and has_kernel(x_TD.dtype, *down_EDF.shape[1:])
    )


def forward(
    x_TD: Tensor, token_N: Tensor | None, weight_N: Tensor | None, gate_up_EID: Tensor, down_EDF: Tensor,
    counts: list[int], activation: str, hidden_NI: Tensor, y_ND: Tensor,
) -> None:  # fmt: skip
    """What ``cpu_experts`` does before its sum: write ``hidden_NI`` and the rows' weighted outputs ``y_ND``.

    Args:
        token_N: token that each row copies, which is not checked; None where ``x_TD`` are the rows.
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


def scores(x_TD: Tensor, weight_OD: Tensor) -> Tensor:
    """``x_TD @ weight_OD.T`` of bf16 in fp32, as from copies in fp32: the product of two bf16 numbers is exact there.

    D has to be a multiple of 32, as :func:`has_kernel` says. Returns [T, O].
    """
    built = library()
    assert built is not None, "has_kernel() says whether there is a library"
    outputs, threads = len(weight_OD), torch.get_num_threads()
    whole_OD = F.pad(weight_OD, (0, 0, 0, -outputs % 32)).contiguous()
    scores_TO = torch.empty(len(x_TD), outputs, device="cpu")
    scratch = torch.empty(built.moe_scores_scratch(x_TD.shape[1], threads), dtype=torch.uint8, device="cpu")
    held = x_TD.contiguous(), whole_OD, scores_TO, scratch
    x, w, to, room = (tensor.data_ptr() for tensor in held)
    built.moe_scores(*x_TD.shape, outputs, x, w, to, threads, room)
    del held  # and not before: torch.compile, which cuts this at the call, lets go of what is not named after it
    return scores_TO


def _call(
    x_TD: Tensor, token_N: Tensor | None, weight_N: Tensor | None, gate_up_EID: Tensor, down_EDF: Tensor, kind: str
) -> _Call:
    num_experts, d_model, hidden_size = down_EDF.shape
    call = _Call(num_experts, d_model, hidden_size, ACTIVATIONS[kind], torch.get_num_threads())
    call.point(token=token_N, weight=weight_N, x=x_TD, up=gate_up_EID, down=down_EDF)
    return call


def _run(direction: str, call: _Call, counts: list[int], **tensors: Tensor | None) -> None:
    built = library()
    assert built is not None, "has_kernel() says whether there is a library"
    call.point(**tensors)
    kept = (ctypes.c_int64 * len(counts))(*counts)
    call.counts = ctypes.addressof(kept)
    size = built.moe_experts_scratch(ctypes.byref(call), direction == "backward")
    scratch = torch.empty(size, dtype=torch.uint8, device="cpu")
    call.point(scratch=scratch)
    # What only addresses name has to outlive the call, also where torch.compile cuts this function at it.
    call.held = kept, scratch
    getattr(built, f"moe_experts_{direction}")(ctypes.byref(call))


# --- building


@functools.cache
def library() -> ctypes.CDLL | None:
    """The built kernel. None where the CPU lacks its instructions, or has AMX, whose larger products torch makes and
    this does not; and where it can't be built or loaded, which is told once."""
    flags = cpu_flags()
    if not flags.issuperset(INSTRUCTIONS) or "amx_bf16" in flags:
        return None
    try:
        return _load(build(_cache()))
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        log.warning(
            "experts and routers take torch's products, which are slower: there is no kernel for them (%s)", error
        )
        return None


def _load(path: Path) -> ctypes.CDLL:
    try:
        built = ctypes.CDLL(str(path))
    except OSError:  # a file that was damaged since: once more
        path.unlink()
        built = ctypes.CDLL(str(build(path.parent)))
    built.moe_experts_scratch.restype = built.moe_scores_scratch.restype = ctypes.c_int64
    built.moe_scores_scratch.argtypes = (ctypes.c_int64,) * 2
    built.moe_scores.argtypes = (*(ctypes.c_int64,) * 3, *(ctypes.c_void_p,) * 3, ctypes.c_int64, ctypes.c_void_p)
    return built


def build(folder: Path) -> Path:
    """The library in ``folder``, compiled if it is not there yet: with ``g++``, or ``$CXX``, which should be a version
    of it, as other compilers bring an OpenMP of their own, whose threads are not torch's.

    Its name says what it was made of. Any number of processes may build at once: each compiles beside it and then
    takes the name, so that nobody sees half a file and nobody waits for a process that has died.

    Raises:
        OSError: no compiler, or the folder can't be written.
        subprocess.SubprocessError: the compiler failed, or took more than two minutes.
    """
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if shutil.which(compiler[0]) is None:
        raise FileNotFoundError(f"there is no {compiler[0]}; set CXX to a g++")
    version = _compile(compiler, "--version")
    digest = hashlib.sha256(b"\0".join([SOURCE.read_bytes(), version.encode(), " ".join(FLAGS).encode()])).hexdigest()
    path = folder / f"cpu_bf16-{digest[:16]}.so"
    if not path.exists():
        log.info("compiling %s to %s", SOURCE, path)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as beside:
            made = Path(beside) / path.name
            _compile(compiler, *FLAGS, str(SOURCE), "-o", str(made))
            with made.open("rb") as file:
                os.fsync(file.fileno())  # the name is not to outlive the content where the power goes
            made.replace(path)
    return path


def _compile(compiler: list[str], *arguments: str) -> str:
    result = subprocess.run(
        [*compiler, *arguments], capture_output=True, text=True, errors="replace", timeout=BUILD_TIMEOUT_S
    )
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise subprocess.SubprocessError(f"{shlex.join(compiler)} ended with {result.returncode}: {last}")
    return result.stdout


def _cache() -> Path:
    """The folder of what is built.

    Raises:
        OSError: this user has no home.
    """
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "moe_scale"
    try:
        return Path.home() / ".cache" / "moe_scale"
    except RuntimeError as error:
        raise FileNotFoundError(f"{error}; set XDG_CACHE_HOME") from error
