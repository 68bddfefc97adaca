"""``moe.conventions deepspeed`` against an untouched ``deepspeed.moe``, output by output.

The reference is ``MOELayer(TopKGate(...), Experts(...))`` as DeepSpeed's own ``MoE`` builds it, with the two draws of
random numbers turned off. It routes in fp32 whatever the input; for a comparison in fp64 its ``.float()`` is made to
mean fp64, and nothing else.

Shapes: B batch, S sequence, T = B*S tokens, D model width, F expert hidden width, E experts, K experts per token.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from deepspeed.moe.experts import Experts
from deepspeed.moe.sharded_moe import MOELayer, TopKGate, _capacity
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from moe_scale.config import MoEConfig
from moe_scale.initialization import Init
from moe_scale.moe.backends import build_moe
from moe_scale.moe.backends.support import unsupported
from moe_scale.moe.conventions import deepspeed_capacity
from moe_scale.moe.layer import MoELayer
from moe_scale.parallel.groups import ParallelGroups

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}


class SwiGLU(nn.Module):
    """An expert as a user of ``deepspeed.moe`` writes one."""

    def __init__(self, d_model: int, hidden: int):
        super().__init__()
        self.gate, self.up = nn.Linear(d_model, hidden, bias=False), nn.Linear(d_model, hidden, bias=False)
        self.down = nn.Linear(hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Case(NamedTuple):
    config: MoEConfig
    batch: int
    seq_len: int
    d_model: int
    seed: int
    dtype: torch.dtype
    training: bool
    alike: bool
    """All tokens are one of two and the router knows no difference between experts: ties everywhere."""


class Results(NamedTuple):
    """Everything that the two layers give, by name."""

    values: dict[str, Tensor]
    counts: dict[str, Any]


def expert_weights(experts: nn.ModuleList, attribute: str) -> dict[str, Tensor]:
    parts = {part: [getattr(expert, part).weight for expert in experts] for part in ("gate", "up", "down")}
    found = {part: torch.stack([getattr(w, attribute) for w in weights]) for part, weights in parts.items()}
    return {"gate_up": torch.cat([found["gate"], found["up"]], dim=1), "down": found["down"]}


@contextlib.contextmanager
def routing_in(dtype: torch.dtype) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if dtype == torch.float64:
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


def deepspeeds(case: Case, ours: MoELayer, x_BSD: Tensor) -> Results:
    config = case.config
    gate = TopKGate(
        case.d_model, config.num_experts, config.top_k, config.capacity_factor, config.eval_capacity_factor,
        config.min_capacity, drop_tokens=config.dispatch == "capacity", use_rts=False, top2_2nd_expert_sampling=False,
    )  # fmt: skip
    experts = Experts(SwiGLU(case.d_model, config.intermediate_size), config.num_experts)
    layer = MOELayer(gate, experts, "ep_size_1", 1, config.num_experts).to(case.dtype).train(case.training)
    with torch.no_grad():
        gate.wg.weight.copy_(ours.router.weight)
        for index, expert in enumerate(experts.deepspeed_experts):
            gate_FD, up_FD = ours.experts.gate_up[index].chunk(2)
            for part, weight in (("gate", gate_FD), ("up", up_FD), ("down", ours.experts.down[index])):
                getattr(expert, part).weight.copy_(weight)
    with routing_in(case.dtype):
        y_BSD = layer(x_BSD, None)
        routes_KT = gate(x_BSD.flatten(0, 1), None, True)[3]
        total(y_BSD, layer.l_aux).backward()
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    gradients = {"x": x_BSD.grad, "router": gate.wg.weight.grad, **expert_weights(experts.deepspeed_experts, "grad")}
    return Results(
        {"output": y_BSD, "l_aux": layer.l_aux, **{f"gradient of {name}": g for name, g in gradients.items()}},
        {"exp_counts": layer.exp_counts.tolist(), "dropped": int((routes_KT < 0).sum())},
    )


def backends(case: Case, layer: nn.Module, x_BSD: Tensor) -> Results:
    with routing_in(case.dtype if case.config.backend == "deepspeed" else torch.float32):
        y_BSD, stats = layer(x_BSD)
        total(y_BSD, stats.aux_loss).backward()
    if isinstance(layer, MoELayer):
        weights = {"router": layer.router.weight, "gate_up": layer.experts.gate_up, "down": layer.experts.down}
        gradients = {name: weight.grad for name, weight in weights.items()}
    else:
        experts = layer.layer.experts.deepspeed_experts
        gradients = {
            "router": layer.layer.gate.wg.weight.grad,
            **{
                name: torch.stack(
                    [torch.zeros_like(w) if w.grad is None else w.grad for w in (getattr(e, name) for e in experts)]
                )
                for name in ("gate_up", "down")
            },
        }
    return Results(
        {"output": y_BSD, "l_aux": stats.aux_loss}
        | {f"gradient of {name}": g for name, g in {"x": x_BSD.grad, **gradients}.items()},
        {"exp_counts": [int(count) for count in stats.assignments_E], "dropped": int(stats.dropped)},
    )


def total(y_BSD: Tensor, aux_loss: Tensor) -> Tensor:
    """A random projection of the output plus the loss, so that both are in every gradient."""
    direction = torch.randn(y_BSD.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return (y_BSD * direction.to(y_BSD.dtype)).sum() + aux_loss


def build(case: Case) -> nn.Module:
    layer = build_moe(case.config, case.d_model, ParallelGroups(), Init(case.seed)).to(case.dtype).train(case.training)
    if case.alike:
        router = layer.router if isinstance(layer, MoELayer) else layer.layer.gate.wg
        nn.init.zeros_(router.weight)
    return layer


def make_input(case: Case) -> Tensor:
    generator = torch.Generator().manual_seed(case.seed)
    x_BSD = torch.randn(case.batch, case.seq_len, case.d_model, generator=generator, dtype=torch.float64)
    if case.alike:
        x_BSD = x_BSD[:1, :1] * torch.randint(1, 3, (case.batch, case.seq_len, 1), generator=generator)
    return x_BSD.to(case.dtype).requires_grad_()


def assert_same(case: Case) -> Results:
    custom = build(case._replace(config=dataclasses.replace(case.config, backend="custom")))
    assert isinstance(custom, MoELayer)
    expected = deepspeeds(case, custom, make_input(case))
    found = backends(case, build(case), make_input(case))
    assert found.counts == expected.counts
    close = {"rtol": TOLERANCE[case.dtype], "atol": TOLERANCE[case.dtype]}
    assert found.values.keys() == expected.values.keys()
    for name, value in expected.values.items():
        torch.testing.assert_close(found.values[name], value, **close, msg=lambda text, name=name: f"{name}: {text}")
    return expected


def config(backend: str, top_k: int, **changes: Any) -> MoEConfig:
    made = MoEConfig(
        **{
            "backend": backend, "conventions": "deepspeed", "num_experts": 6, "top_k": top_k, "intermediate_size": 3,
            "dispatch": "capacity", "min_capacity": 1, "drop_policy": "probability" if top_k > 2 else "position",
        } | changes
    )  # fmt: skip
    assert made.problems("moe") == unsupported(made, zero_stage=3) == []
    return made


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_experts = draw(st.integers(1, 8), label="E")
    batch, seq_len = draw(st.integers(1, 3), label="B"), draw(st.integers(1, 12), label="S")
    factors = st.one_of(st.sampled_from([0.05, 0.3, 0.5, 0.7, 1.0, 1.1, 1.25, 4.0]), st.floats(0.01, 3.0))
    return Case(
        config(
            draw(st.sampled_from(["custom", "custom", "deepspeed"]), label="backend"),
            draw(st.integers(1, min(4, num_experts)), label="K"),
            num_experts=num_experts,
            intermediate_size=draw(st.integers(1, 4), label="F"),
            dispatch=draw(st.sampled_from(["capacity", "capacity", "capacity", "dropless"]), label="dispatch"),
            capacity_factor=draw(factors, label="capacity_factor"),
            eval_capacity_factor=draw(factors, label="eval_capacity_factor"),
            # top1gating refuses a minimum above the number of tokens.
            min_capacity=draw(st.integers(1, min(6, batch * seq_len)), label="min_capacity"),
        ),
        batch,
        seq_len,
        d_model=draw(st.integers(1, 5), label="D"),
        seed=draw(st.integers(0, 2**16), label="seed"),
        dtype=draw(st.sampled_from([torch.float64, torch.float32]), label="dtype"),
        training=draw(st.booleans(), label="training"),
        alike=draw(st.sampled_from([False, False, False, True]), label="alike"),
    )


@settings(max_examples=200, deadline=None, derandomize=True)
@given(cases())
@example(Case(config("custom", 1, capacity_factor=0.4), 2, 12, 4, 0, torch.float64, True, False))
def test_layer_is_that_of_deepspeed(case: Case) -> None:
    assert_same(case)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
@pytest.mark.parametrize("backend", ["custom", "deepspeed"])
def test_heavy_drops_are_those_of_deepspeed(backend: str, top_k: int, training: bool, dtype: torch.dtype) -> None:
    """Experts take a third of their share in training and half of it at evaluation, never fewer than 2 rows."""
    changes = {"capacity_factor": 1 / 3, "eval_capacity_factor": 0.5, "min_capacity": 2}
    for seed in range(5):
        case = Case(config(backend, top_k, **changes), 2, 13, 5, seed, dtype, training, alike=False)
        assert assert_same(case).counts["dropped"] > 2


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_the_rules_differ_from_this_projects(top_k: int) -> None:
    """Or else the tests above would hold without any of it: outputs under a capacity, and the loss of top-2."""
    here = config("custom", top_k, capacity_factor=0.5)
    layers = [build_moe(dataclasses.replace(here, conventions=c), 5, ParallelGroups(), Init(0)).double()
              for c in ("moe_scale", "deepspeed")]  # fmt: skip
    case = Case(here, 4, 16, 5, 0, torch.float64, True, alike=False)
    (y_ours, ours), (y_theirs, theirs) = (layer(make_input(case)) for layer in layers)
    assert ours.dropped == theirs.dropped > 0
    assert (y_ours - y_theirs).abs().max() > 1e-3
    assert bool((ours.aux_loss - theirs.aux_loss).abs() > 1e-3) == (top_k == 2)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.integers(1, 100_000), st.integers(1, 300), st.integers(1, 8), st.integers(1, 64),
    st.one_of(st.floats(1e-3, 50.0), st.integers(1, 400).map(lambda n: n / 100)),
)  # fmt: skip
@example(1000, 10, 1, 1, 1.1)
def test_capacity_is_that_of_deepspeed(tokens: int, experts: int, top_k: int, minimum: int, factor: float) -> None:
    gates_TE = torch.empty(tokens, experts, device="meta")
    theirs = _capacity(gates_TE, torch.tensor(factor * top_k), torch.tensor(minimum))
    assert deepspeed_capacity(tokens, top_k, experts, factor, minimum) == int(theirs)


def test_padding_is_left_out_by_the_custom_backend() -> None:
    """deepspeed.moe routes padding like other tokens. Here its rules hold for the real ones alone."""
    for top_k in (1, 2, 3):
        here = config("custom", top_k, min_capacity=2, capacity_factor=0.01)
        case = Case(here, 2, 12, 5, 1, torch.float64, True, alike=False)
        layer, x_BSD = build(case), make_input(case)
        valid_BS = torch.rand(2, 12, generator=torch.Generator().manual_seed(0)) < 0.6
        y_BSD, stats = layer(x_BSD, valid_BS)
        assert not y_BSD[~valid_BS].any()
        assert not torch.autograd.grad(y_BSD.sum() + stats.aux_loss, x_BSD)[0][~valid_BS].any()
        _, alone = layer(x_BSD[valid_BS].unsqueeze(0))
        torch.testing.assert_close(stats.aux_loss, alone.aux_loss, rtol=1e-12, atol=1e-12)
        assert stats.dropped == alone.dropped > 0
        assert torch.equal(stats.assignments_E, alone.assignments_E)


def test_deepspeed_backend_takes_a_single_token() -> None:
    """As generation does; DeepSpeed's own gate refuses fewer tokens than min_capacity for top-1."""
    for top_k in (1, 2, 3):
        x_BSD = torch.randn(1, 1, 5, generator=torch.Generator().manual_seed(0))
        outputs = [build_moe(config(backend, top_k, min_capacity=4), 5, ParallelGroups(), Init(0)).eval()(x_BSD)[0]
                   for backend in ("custom", "deepspeed")]  # fmt: skip
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
