"""Adapters of feed-forwards without modules of their own, against weights W + s B A that are written out, in fp64.

Shapes: L experts, r rank, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from moe_scale.config import LoRAConfig, MoEConfig
from moe_scale.initialization import Init
from moe_scale.models.lora import add_adapters, factor_names
from moe_scale.moe.layer import MoELayer
from moe_scale.moe.low_rank import LowRank, padded
from moe_scale.parallel.groups import ParallelGroups

LAYERS: dict[str, dict[str, Any]] = {
    "swiglu": {},
    "gelu with biases": {"activation": "gelu", "expert_bias": True},
    "shared expert": {"shared_intermediate_size": 10},
    "expert choice": {"router": "expert_choice", "dispatch": "capacity"},
    "one expert gets nothing": {"num_experts": 40, "top_k": 1},
}


def layer(settings: dict[str, Any]) -> nn.Module:
    config = MoEConfig(**({"num_experts": 4, "top_k": 2, "intermediate_size": 8} | settings))
    model = nn.ModuleDict({"layer": MoELayer(config, 6, ParallelGroups(), Init(1))})
    return model.double()


def adapted(settings: dict[str, Any]) -> nn.Module:
    model, draw = layer(settings), torch.Generator().manual_seed(2)
    has = ("dense.*",) if settings.get("shared_intermediate_size") else ()
    add_adapters(model, LoRAConfig(rank=3, alpha=12.0, targets=("router", "experts.*", *has)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
    return model


def outcome(y: Tensor, stats: Any) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(y.shape, generator=generator, dtype=y.dtype)
    return (y * weight).sum() + stats.aux_loss + stats.z_loss


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_gradients_are_those_of_weights_written_out(name: str) -> None:
    model, base = adapted(LAYERS[name]), layer(LAYERS[name])
    x_BSD = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mine = {name: p for name, p in model.named_parameters() if p.requires_grad}
    written = {name: p.detach().clone().requires_grad_() for name, p in mine.items()}
    weights = {name: parameter.detach() for name, parameter in base.named_parameters()}
    for weight in list(weights):
        a, b = factor_names(weight)
        if a in written:
            weights[weight] = weights[weight] + 12 / 3 * written[b] @ written[a]
    whole = {name.removeprefix("layer."): weight for name, weight in weights.items()}

    inputs = [x_BSD.clone().requires_grad_() for _ in range(2)]
    found = model["layer"](inputs[0])
    expected = functional_call(base["layer"], whole, (inputs[1],))
    torch.testing.assert_close(found[0], expected[0], rtol=1e-10, atol=1e-10)
    outcome(*found).backward()
    outcome(*expected).backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-9, atol=1e-9)
    for factor, parameter in mine.items():
        torch.testing.assert_close(parameter.grad, written[factor].grad, rtol=1e-9, atol=1e-9, msg=factor)
    assert len(written) == 2 * (5 if "shared" in name else 3)


def test_an_experts_factors_do_not_depend_on_who_holds_it() -> None:
    shape = torch.Size([2, 5, 4])
    all_four = LowRank(torch.Size([4, 5, 4]), 2, 1.0, 0.0, Init(3), ParallelGroups())
    second = LowRank(shape, 2, 1.0, 0.0, Init(3), ParallelGroups(world_size=2, rank=1, ep_size=2, ep_rank=1))
    torch.testing.assert_close(second.A, all_four.A[2:], rtol=0, atol=0)
    assert not all_four.B.any()
    assert not torch.equal(all_four.A[0], all_four.A[1])


@pytest.mark.parametrize("rank", [1, 3, 8, 10])
def test_a_rank_that_a_gpu_does_not_take_is_padded(rank: int) -> None:
    a_LrI, b_LOr = torch.randn(2, rank, 5), torch.randn(2, 6, rank)
    wide_a, wide_b = padded(a_LrI, b_LOr)
    assert wide_a.shape[1] == wide_b.shape[2] == -(-rank // 8) * 8
    torch.testing.assert_close(wide_b @ wide_a, b_LOr @ a_LrI)


def test_dropout_is_of_the_adapters_input_in_training() -> None:
    adapter = LowRank(torch.Size([2, 5, 4]), 2, 1.0, 0.5, Init(3), ParallelGroups())
    nn.init.ones_(adapter.B)
    x_RI, counts_L = torch.randn(6, 4), torch.tensor([2, 4])
    assert not torch.equal(adapter(x_RI, counts_L), adapter(x_RI, counts_L))
    adapter.eval()
    torch.testing.assert_close(adapter(x_RI, counts_L), adapter(x_RI, counts_L), rtol=0, atol=0)
