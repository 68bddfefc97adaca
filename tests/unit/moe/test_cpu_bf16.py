"""The compiled kernel of the experts in bf16: what it computes, where it steps aside, and how it is built."""

from __future__ import annotations

import functools
import logging
import shutil
import stat
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from moe_scale.moe.dispatch import DispatchPlan, plan_dispatch
from moe_scale.moe.kernels import cpu_bf16 as kernel
from moe_scale.moe.kernels.cpu_experts import cpu_experts
from moe_scale.parallel.device import cpu_flags

FITS = cpu_flags().issuperset(kernel.INSTRUCTIONS) and "amx_bf16" not in cpu_flags()
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
runs_here = pytest.mark.skipif(not FITS or shutil.which("g++") is None, reason="needs AVX512-BF16 without AMX, and g++")
ACTIVATIONS = ["swiglu", "gelu", "relu"]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


class Case(NamedTuple):
    """Leaves of one layer's experts in bf16, or wider, and how the tokens go to them."""

    x_TD: Tensor
    weight_N: Tensor
    gate_up_EID: Tensor
    down_EDF: Tensor
    plan: DispatchPlan | None
    counts_E: Tensor

    def to(self, dtype: torch.dtype) -> Case:
        wide = torch.promote_types(dtype, torch.float32)
        x, weight, gate_up, down = (
            leaf.detach().to(wide if leaf is self.weight_N else dtype, copy=True).requires_grad_() for leaf in self[:4]
        )
        plan = None if self.plan is None else self.plan._replace(weight_N=weight)
        return Case(x, weight, gate_up, down, plan, self.counts_E)

    def run(self, activation: str, *, compiled: bool = True) -> list[Tensor]:
        """The output, and the gradients of a projection of it by the leaves."""
        y = cpu_experts(
            self.x_TD, self.counts_E, self.plan, self.gate_up_EID, self.down_EDF, activation, compiled=compiled
        )
        direction = torch.randint(-2, 3, y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype)
        leaves = [self.x_TD, self.gate_up_EID, self.down_EDF, *([] if self.plan is None else [self.weight_N])]
        return [y.detach(), *torch.autograd.grad(y, leaves, direction)]


def make(
    ids_TK: Tensor, num_experts: int, d_model: int, hidden: int, activation: str, *, capacity: int | None = None,
    whole_numbers: bool = False,
) -> Case:  # fmt: skip
    """Experts of random weights, or of weights of -1, 0 and 1, with which fp32 and bf16 make no rounding."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, std: float = 1.0) -> Tensor:
        if whole_numbers:
            return torch.randint(-1, 2, shape, generator=generator).bfloat16()
        return (torch.randn(shape, generator=generator) * std).bfloat16()

    inner = 2 * hidden if activation == "swiglu" else hidden
    weights_TK = torch.ones(ids_TK.shape) if whole_numbers else torch.rand(ids_TK.shape, generator=generator)
    plan = plan_dispatch(ids_TK, weights_TK, num_experts, rows_per_expert=capacity)
    return Case(
        draw(len(ids_TK), d_model),
        plan.weight_N,
        draw(num_experts, inner, d_model, std=d_model**-0.5),
        draw(num_experts, d_model, hidden, std=hidden**-0.5),
        plan,
        plan.counts_E,
    )


def spread(tokens: int, num_experts: int, top_k: int = 2) -> Tensor:
    return torch.rand(tokens, num_experts, generator=torch.Generator().manual_seed(1)).topk(top_k).indices


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm().clamp(min=1e-30))


# --- what it computes


@runs_here
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("tokens", "num_experts", "d_model", "hidden", "capacity"),
    [
        (40, 4, 64, 32, None),
        (7, 16, 32, 96, None),  # experts of one row, and of none
        (300, 6, 96, 64, 41),  # choices that go nowhere
        (900, 4, 32, 32, None),  # experts of more rows than it takes at a time
    ],
)
def test_it_rounds_less_than_torchs_products(
    tokens: int, num_experts: int, d_model: int, hidden: int, capacity: int | None, activation: str, threads: int
) -> None:
    case = make(spread(tokens, num_experts), num_experts, d_model, hidden, activation, capacity=capacity)
    exact = case.to(torch.float64).run(activation)
    found = case.to(torch.bfloat16).run(activation)
    of_torch = case.to(torch.bfloat16).run(activation, compiled=False)
    for ours, theirs, right in zip(found, of_torch, exact, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        assert error(ours, right) < 1.05 * error(theirs, right) + 1e-6
        assert error(ours, right) < 6e-3
    again = case.to(torch.bfloat16).run(activation)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True)), "the same bits at every run"


@runs_here
@pytest.mark.parametrize("rows", [*range(1, 27), 191, 192, 193, 385])
def test_whole_numbers_come_out_exact(rows: int) -> None:
    """Groups of every size, odd numbers of rows, more than a block: where nothing is rounded, nothing differs."""
    ids_TK = torch.arange(2).repeat(rows).view(-1, 1)  # as many rows for each of two experts, in turn
    case = make(ids_TK, 2, 64, 32, "relu", whole_numbers=True)
    exact = case.to(torch.float64).run("relu")
    small = [value.abs() <= 256 for value in exact]  # what bf16 has no rounding for
    found = case.to(torch.bfloat16).run("relu")
    for ours, right, kept in zip(found, exact, small, strict=True):
        assert kept.float().mean() > 0.5
        assert torch.equal(ours.double()[kept], right[kept])


@runs_here
def test_rows_without_a_plan_as_an_exchange_leaves_them() -> None:
    whole = make(spread(60, 5, 1), 5, 64, 32, "swiglu")
    case = Case(whole.x_TD, whole.weight_N, whole.gate_up_EID, whole.down_EDF, None, whole.counts_E)
    for ours, right in zip(case.to(torch.bfloat16).run("swiglu"), case.to(torch.float64).run("swiglu"), strict=True):
        assert error(ours, right) < 6e-3


@runs_here
def test_gradients_that_are_not_wanted_are_not_made() -> None:
    case = make(spread(40, 4), 4, 64, 32, "swiglu").to(torch.bfloat16)
    _, grad_x, grad_up, *_ = case.run("swiglu")
    case.down_EDF.requires_grad_(False)
    case.x_TD.requires_grad_(False)
    case.weight_N.requires_grad_(False)
    y = cpu_experts(case.x_TD, case.counts_E, case.plan, case.gate_up_EID, case.down_EDF, "swiglu")
    direction = torch.randint(-2, 3, y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype)
    y.backward(direction)
    assert case.x_TD.grad is case.weight_N.grad is case.down_EDF.grad is None
    assert torch.equal(case.gate_up_EID.grad, grad_up)  # type: ignore[arg-type]
    case.gate_up_EID.requires_grad_(False)
    case.x_TD.requires_grad_()
    cpu_experts(case.x_TD, case.counts_E, case.plan, case.gate_up_EID, case.down_EDF, "swiglu").backward(direction)
    assert torch.equal(case.x_TD.grad, grad_x)  # type: ignore[arg-type]


@runs_here
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_no_number_stays_one_and_with_its_token(activation: str) -> None:
    case = make(spread(40, 4), 4, 64, 32, activation).to(torch.bfloat16)
    with torch.no_grad():
        case.x_TD[3] = float("nan")
        case.x_TD[5] = float("inf")
    y, grad_x, *_ = case.run(activation)
    assert y[3].isnan().all()
    assert not y[5].isfinite().all()
    others = torch.tensor([t for t in range(40) if t not in (3, 5)])
    assert y[others].isfinite().all()
    assert grad_x[others].isfinite().all()


@runs_here
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_over_their_whole_range(activation: str) -> None:
    """One weight of 1: the output is the activation of the input, from values where it is 0 to those where it is x."""
    values = torch.cat([torch.linspace(-60, 60, 2001), torch.linspace(-4, 4, 2001)]).bfloat16()
    x_TD = torch.zeros(len(values), 32, dtype=torch.bfloat16)
    x_TD[:, 0], x_TD[:, 1] = values, 1.0
    inner = 64 if activation == "swiglu" else 32
    gate_up, down = torch.zeros(2, inner, 32).bfloat16(), torch.zeros(2, 32, 32).bfloat16()
    gate_up[:, 0, 0] = down[:, 0, 0] = 1.0
    if activation == "swiglu":
        gate_up[:, 32, 1] = 1.0
    case = make(torch.arange(len(values)).view(-1, 1) % 2, 2, 32, 32, activation)
    assert case.plan is not None
    case = case._replace(x_TD=x_TD, gate_up_EID=gate_up, down_EDF=down, weight_N=torch.ones_like(case.weight_N))
    exact, found = case.to(torch.float64).run(activation), case.to(torch.bfloat16).run(activation)
    for ours, right in zip(found[:2], exact[:2], strict=True):
        torch.testing.assert_close(ours[:, 0].double(), right[:, 0], rtol=2**-8, atol=1e-6)


# --- where it steps aside


@runs_here
def test_it_has_bf16_and_widths_of_whole_lines() -> None:
    assert kernel.library() is not None
    assert kernel.takes(torch.bfloat16, 64, 32)
    assert not kernel.takes(torch.float32, 64, 32)
    assert not kernel.takes(torch.float16, 64, 32)
    assert not kernel.takes(torch.bfloat16, 48, 32)
    assert not kernel.takes(torch.bfloat16, 64, 16)


def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    for name in ("forward", "backward"):
        real = getattr(kernel, name)
        monkeypatch.setattr(kernel, name, lambda *args, name=name, real=real: (seen.append(name), real(*args))[1])
    return seen


@runs_here
def test_an_expert_of_more_than_a_threads_share_is_left_to_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, before = calls(monkeypatch), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for ids_TK, expected in ((spread(64, 4), ["forward", "backward"]), (torch.zeros(64, 1, dtype=torch.int64), [])):
            make(ids_TK, 4, 64, 32, "swiglu").to(torch.bfloat16).run("swiglu")
            assert seen == expected
            seen.clear()
    finally:
        torch.set_num_threads(before)


@runs_here
def test_the_setting_kernels_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_scale.config import MoEConfig
    from moe_scale.initialization import Init
    from moe_scale.moe.layer import MoELayer
    from moe_scale.parallel.groups import ParallelGroups

    seen = calls(monkeypatch)
    for kernels, expected in (("auto", ["forward", "backward"]), ("torch", [])):
        config = MoEConfig(num_experts=8, intermediate_size=32, kernels=kernels)  # type: ignore[arg-type]
        layer = MoELayer(config, 64, ParallelGroups(), Init(0)).bfloat16()
        layer(torch.randn(1, 64, 64).bfloat16())[0].sum().backward()
        assert seen == expected
        seen.clear()


@pytest.mark.parametrize(
    ("flags", "why"), [({"avx512f"}, "no bf16"), ({*kernel.INSTRUCTIONS, "amx_bf16"}, "AMX is faster by torch")]
)
def test_other_cpus_take_torchs_products(flags: set[str], why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "cpu_flags", lambda: frozenset(flags))
    monkeypatch.setattr(kernel, "build", lambda folder: pytest.fail(why))
    assert kernel.library.__wrapped__() is None


# --- how it is built


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "cpu_flags", lambda: frozenset(kernel.INSTRUCTIONS))


@pytest.mark.parametrize(
    ("compiler", "says"),
    [
        (None, "there is no compiler no-such-compiler; CXX names another"),
        (
            "echo 'gcc 9'; echo 'first' >&2; echo 'unrecognized option -mavx512bf16' >&2; exit ${1:+4}",
            "ended with 4: unr",
        ),
    ],
)
def test_without_a_compiler_that_can_it_is_said_once_and_goes_on(
    compiler: str | None, says: str, fits: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    if compiler is not None:
        script = tmp_path / "c++"
        script.write_text(f"#!/bin/sh\n{compiler}\n")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("CXX", str(script))
    monkeypatch.setattr(kernel, "library", functools.cache(kernel.library.__wrapped__))
    with caplog.at_level(logging.WARNING):
        case = make(spread(40, 4), 4, 64, 32, "swiglu").to(torch.bfloat16)
        first = case.run("swiglu")
        second = case.run("swiglu")
    assert [says in record.getMessage() for record in caplog.records] == [True]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not list((tmp_path / "cache").rglob("*.so"))


@needs_compiler
def test_a_folder_that_cannot_be_written_is_no_failure(
    fits: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert kernel.library.__wrapped__() is None
    assert "no kernel could be built" in caplog.text


@needs_compiler
def test_many_build_at_once_and_none_waits_for_one_that_died(tmp_path: Path) -> None:
    (tmp_path / "tmpdead").mkdir()  # what a killed build leaves
    (tmp_path / "tmpdead" / "cpu_bf16-0.so").write_bytes(b"half")
    with ThreadPoolExecutor(3) as pool:
        built = list(pool.map(lambda _: kernel.build(tmp_path), range(3)))
    assert len(set(built)) == 1
    assert [path.name for path in tmp_path.glob("*.so")] == [built[0].name]
    before = built[0].stat().st_mtime_ns
    assert kernel.build(tmp_path) == built[0]
    assert built[0].stat().st_mtime_ns == before, "built once"


@runs_here
def test_it_runs_on_the_threads_that_torch_has() -> None:
    """One OpenMP in the process: threads of a second one would wait for cores that torch's hold."""
    code = (
        "import torch; from moe_scale.moe.kernels import cpu_bf16; assert cpu_bf16.library()\n"
        "print(len({line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line or 'libomp' in line}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True).stdout
    assert out.split()[-1] == "1"


@runs_here
@pytest.mark.slow
def test_it_is_faster_than_torchs_products() -> None:
    case = make(spread(1024, 32), 32, 512, 512, "swiglu").to(torch.bfloat16)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(12):
        for compiled, samples in seconds.items():
            start = time.perf_counter()
            case.run("swiglu", compiled=compiled)
            samples.append(time.perf_counter() - start)
    assert statistics.median(seconds[True]) < statistics.median(seconds[False])
