"""The compiled kernel of the experts in bf16: what it computes, where it steps aside, and how it is built."""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import stat
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from moe_scale.initialization import Init
from moe_scale.moe.dispatch import DispatchPlan, plan_dispatch
from moe_scale.moe.kernels import cpu_bf16 as kernel
from moe_scale.moe.kernels.cpu_experts import cpu_experts
from moe_scale.moe.router import Router
from moe_scale.parallel.device import cpu_flags

FITS = cpu_flags().issuperset(kernel.INSTRUCTIONS) and "amx_bf16" not in cpu_flags()


def _compiles() -> bool:
    if shutil.which("g++") is None:
        return False
    flags = [flag for flag in kernel.FLAGS if flag != "-shared"]
    command = ["g++", *flags, "-fsyntax-only", "-x", "c++", "/dev/null"]
    return subprocess.run(command, capture_output=True, timeout=60).returncode == 0


COMPILES = _compiles()
runs_here = pytest.mark.skipif(not FITS or not COMPILES, reason="needs AVX512-BF16 without AMX, and its g++")
ACTIVATIONS = ["swiglu", "gelu", "relu"]


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
    huge = torch.tensor([1e3, 1e4, 1e8, 1e20, 1e38])
    values = torch.cat([-huge, huge, torch.linspace(-60, 60, 2001), torch.linspace(-4, 4, 2001)]).bfloat16()
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


@runs_here
def test_inputs_and_gradients_of_any_strides() -> None:
    case = make(spread(40, 4), 4, 64, 32, "swiglu").to(torch.bfloat16)
    expected = case.run("swiglu")
    x_TD = case.x_TD.detach().t().contiguous().t().requires_grad_()
    weight_N = case.weight_N.detach().repeat_interleave(2)[::2].requires_grad_()
    assert case.plan is not None
    token_N = case.plan.token_N.repeat_interleave(2)[::2]
    plan = case.plan._replace(token_N=token_N, weight_N=weight_N)
    strided = case._replace(x_TD=x_TD, weight_N=weight_N, plan=plan)
    assert not any(tensor.is_contiguous() for tensor in (x_TD, weight_N, token_N))
    for ours, theirs in zip(strided.run("swiglu"), expected, strict=True):
        assert torch.equal(ours, theirs)
    y_TD = cpu_experts(case.x_TD, case.counts_E, case.plan, case.gate_up_EID, case.down_EDF, "swiglu")
    of_sum, of_ones = (
        torch.autograd.grad(y_TD, case.x_TD, direction, retain_graph=True)[0]
        for direction in (torch.ones(1, 1, dtype=torch.bfloat16).expand_as(y_TD), torch.ones_like(y_TD))
    )
    assert torch.equal(of_sum, of_ones)


@runs_here
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about whatever it imports
def test_a_compiled_layer_computes_the_same() -> None:
    """torch.compile cuts a function at calls like this kernel's, and forgets what only an address names."""
    case = make(spread(400, 8), 8, 64, 32, "swiglu").to(torch.bfloat16)
    arguments = (case.x_TD, case.counts_E, case.plan, case.gate_up_EID, case.down_EDF, "swiglu")
    expected = cpu_experts(*arguments)
    direction = torch.ones_like(expected)
    compiled = torch.compile(cpu_experts, backend="eager")
    for _ in range(3):
        y_TD = compiled(*arguments)
        assert torch.equal(y_TD, expected)
        torch.autograd.grad(y_TD, [case.x_TD, case.gate_up_EID, case.down_EDF], direction)


@runs_here
def test_memory_that_it_needs_is_the_cpus_whatever_the_default_device() -> None:
    case = make(spread(40, 4), 4, 64, 32, "swiglu").to(torch.bfloat16)
    expected = case.run("swiglu")[0]
    with torch.device("meta"):
        y_TD = cpu_experts(case.x_TD, case.counts_E, case.plan, case.gate_up_EID, case.down_EDF, "swiglu")
    assert torch.equal(y_TD, expected)


# --- routers' scores


@runs_here
@pytest.mark.parametrize(
    ("tokens", "d_model", "outputs"), [(1, 32, 1), (5, 64, 2), (128, 32, 31), (129, 96, 32), (300, 64, 33), (0, 32, 4)]
)
def test_scores_are_those_of_copies_in_fp32(tokens: int, d_model: int, outputs: int, threads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(d_model, tokens, generator=generator).bfloat16().t()
    weight_OD = torch.randn(outputs, d_model, generator=generator).bfloat16()
    found = kernel.scores(x_TD, weight_OD)
    exact = x_TD.double() @ weight_OD.double().t()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=2e-5)
    whole = kernel.scores((8 * x_TD).round(), (8 * weight_OD).round())
    assert torch.equal(whole.double(), (8 * x_TD).round().double() @ (8 * weight_OD).round().double().t())


@runs_here
def test_a_router_in_bf16_takes_them_and_has_the_gradients_of_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    real = kernel.scores
    monkeypatch.setattr(kernel, "scores", lambda *arguments: (taken.append(1), real(*arguments))[1])
    router = Router(64, 5, Init(0)).bfloat16()
    x_BSD = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    results = []
    for has_kernel in (kernel.has_kernel, lambda *_: False):
        monkeypatch.setattr(kernel, "has_kernel", has_kernel)
        logits = router(x_BSD)
        assert logits.dtype == torch.float32
        assert logits.shape == (2, 7, 5)
        results.append([logits, *torch.autograd.grad(logits.square().sum(), (x_BSD, router.weight))])
    assert len(taken) == 1
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5 if ours is results[0][0] else 1e-2, atol=1e-5)


@runs_here
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about whatever it imports
def test_a_compiled_router_computes_the_same() -> None:
    """As the experts above; here what is padded and the scratch have no other owner."""
    x_TD = torch.randn(700, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight_OD = torch.randn(37, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = kernel.scores(x_TD, weight_OD)
    compiled = torch.compile(kernel.scores, backend="eager")
    for _ in range(20):
        assert torch.equal(compiled(x_TD, weight_OD), expected)


# --- where it steps aside


@runs_here
def test_it_has_bf16_and_widths_of_whole_lines() -> None:
    assert kernel.library() is not None
    assert kernel.has_kernel(torch.bfloat16, 64, 32)
    assert not kernel.has_kernel(torch.float32, 64, 32)
    assert not kernel.has_kernel(torch.float16, 64, 32)
    assert not kernel.has_kernel(torch.bfloat16, 48, 32)
    assert not kernel.has_kernel(torch.bfloat16, 64, 16)


@runs_here
@pytest.mark.parametrize("what", ["weights", "parameters", "all parameters", "strides"])
def test_what_it_would_have_to_convert_is_torchs(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Routing weights and parameters of other types, which it would read as if they were its own."""
    seen = calls(monkeypatch)
    case = make(spread(40, 4), 4, 64, 32, "swiglu").to(torch.bfloat16)
    expected = case.run("swiglu", compiled=False)
    assert case.plan is not None
    if what == "weights":
        weight_N = case.weight_N.detach().double().requires_grad_()
        case = case._replace(weight_N=weight_N, plan=case.plan._replace(weight_N=weight_N))
    elif what == "strides":
        case = case._replace(down_EDF=case.down_EDF.detach().mT.contiguous().mT.requires_grad_())
    else:
        case = case._replace(down_EDF=case.down_EDF.detach().float().requires_grad_())
        if what == "all parameters":
            case = case._replace(gate_up_EID=case.gate_up_EID.detach().float().requires_grad_())
    if what in ("weights", "strides"):
        for ours, theirs in zip(case.run("swiglu"), expected, strict=True):
            torch.testing.assert_close(ours.double(), theirs.double(), rtol=2e-2, atol=2e-2)
    else:
        assert not kernel.takes(case.x_TD, case.weight_N, case.gate_up_EID, case.down_EDF)
    assert not seen


@runs_here
def test_what_lies_elsewhere_than_the_source_reads_it_is_an_error() -> None:
    call = kernel._Call()
    with pytest.raises(TypeError, match=r"weight has to be contiguous torch.float32, not torch.float64"):
        call.point(weight=torch.ones(3).double())
    with pytest.raises(TypeError, match="x has to be contiguous"):
        call.point(x=torch.ones(3, 4).bfloat16().t())
    with pytest.raises(TypeError, match="grad_up has to be"):
        call.point(grad_up=torch.ones(65).bfloat16()[1:])


def test_a_plan_with_rows_of_no_expert_is_refused() -> None:
    case = make(spread(40, 4), 4, 64, 32, "swiglu")
    counts_E = case.counts_E - torch.tensor([1, 0, 0, 0])
    with pytest.raises(ValueError, match="has 80 rows, and its experts 79"):
        cpu_experts(case.x_TD, counts_E, case.plan, case.gate_up_EID, case.down_EDF, "swiglu")


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
    ("flags", "why"), [({"avx512f"}, "no bf16"), ({*kernel.INSTRUCTIONS, "amx_bf16"}, "AMX is torch's")]
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
    ("body", "says"),
    [
        (None, "there is no no-such-compiler; set CXX to a g++"),
        (
            "echo first >&2; echo 'unrecognized option -mavx512bf16' >&2; [ $2 = --version ] || exit 4",
            "with 4: unrecog",
        ),
    ],
)
def test_without_a_compiler_that_can_it_is_said_once_and_goes_on(
    body: str | None, says: str, fits: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    fake_compiler(tmp_path, body or "", monkeypatch)
    if body is None:
        monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(kernel, "library", functools.cache(kernel.library.__wrapped__))
    case = make(spread(40, 4), 4, 64, 32, "swiglu").to(torch.bfloat16)
    first, second = case.run("swiglu"), case.run("swiglu")
    assert [says in record.getMessage() for record in caplog.records] == [True]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not list((tmp_path / "cache").rglob("*.so"))


def fake_compiler(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ``$CXX`` a script that gets g++'s arguments; it is called with --version, and then to compile."""
    script = folder / "fake-g++"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", f"{script} -m64")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))


def test_no_home_no_text_and_no_library_are_told_like_no_compiler(
    fits: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make_it = 'while [ "$1" != -o ]; do shift || exit 0; done; echo "no library" > "$2"'
    for body, says in (
        ("printf '\\377\\376\\n' >&2; exit 3", "ended with 3"),
        (f'[ "$2" = --version ] && exit 0; {make_it}', "cpu_bf16-"),
    ):
        fake_compiler(tmp_path, body, monkeypatch)
        assert kernel.library.__wrapped__() is None
        assert says in caplog.records[-1].getMessage()
    monkeypatch.delenv("XDG_CACHE_HOME")

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(kernel.Path, "home", no_home)
    assert kernel.library.__wrapped__() is None
    assert "home directory.; set XDG_CACHE_HOME" in caplog.records[-1].getMessage()


def test_the_name_says_what_it_was_made_of_and_is_taken_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another source is another file, and what is seen under the name is whole: here the compiler looks for it."""
    folder = tmp_path / "cache"
    body = (
        f'[ "$2" = --version ] && {{ echo "$RELEASE"; exit 0; }}; ls {folder}/*.so 2>/dev/null >> {tmp_path}/seen; '
        'while [ "$1" != -o ]; do shift; done; echo whole > "$2"'
    )
    fake_compiler(tmp_path, body, monkeypatch)
    first = kernel.build(folder / "not" / "there" / "yet")
    assert first.read_text() == "whole\n"
    paths = [kernel.build(folder)]
    source = tmp_path / "other.cpp"
    source.write_text("// another")
    monkeypatch.setattr(kernel, "SOURCE", source)
    paths.append(kernel.build(folder))
    monkeypatch.setenv("RELEASE", "14")
    paths.append(kernel.build(folder))
    monkeypatch.setattr(kernel, "FLAGS", (*kernel.FLAGS, "-g"))
    paths.append(kernel.build(folder))
    assert len(set(paths)) == 4
    assert paths[0].name == first.name
    seen = (tmp_path / "seen").read_text().split()
    assert [seen.count(str(path)) for path in paths] == [3, 2, 1, 0], "of each only those that were whole before"
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == sorted(path.name for path in paths)


@runs_here
def test_a_damaged_file_is_built_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    intact = kernel.library()
    assert intact is not None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tmp_path / "moe_scale" / Path(intact._name).name
    path.parent.mkdir()
    path.write_bytes(b"")
    built = kernel.library.__wrapped__()
    assert built is not None
    assert path.stat().st_size > 10_000


@runs_here
def test_the_structure_is_that_of_the_source() -> None:
    """Its size is asserted there."""
    assert ctypes.sizeof(kernel._Call) == 19 * 8
    text = kernel.SOURCE.read_text()
    declared = text[text.index("struct Call {") : text.index("int64_t inner_size() const")]
    names = [
        name.strip(" *")
        for line in re.sub(r"//.*", "", declared).split("{", 1)[1].split(";")
        if line.strip()
        for name in re.sub(r"^(const )?(int64_t|float|bf16|char)\b", "", line.strip()).split(",")
    ]
    assert names == [name for name, _ in kernel._Call._fields_]


@runs_here
def test_it_runs_on_the_threads_that_torch_has() -> None:
    """One OpenMP in the process: threads of a second one would wait for cores that torch's hold."""
    code = (
        "import re, torch; from moe_scale.moe.kernels import cpu_bf16; assert cpu_bf16.library()\n"
        "print(len({line.split()[-1] for line in open('/proc/self/maps') if re.search('lib(g|i)?omp', line)}))"
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
