"""Parameter and FLOP counts against the modules that they speak of."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moe_scale.config import DecoderConfig, MoEConfig
from moe_scale.models.counts import forward_flops_per_token, num_active_params, num_params, training_flops_per_token
from moe_scale.models.decoder import DecoderLM

GRID = [
    (gate, {"num_experts": experts, "top_k": top_k, "every": every, "enabled": enabled}, head_dim)
    for gate, (experts, top_k), (every, enabled), head_dim in itertools.product(
        ("none", "headwise", "elementwise"), ((5, 2), (3, 3), (1, 1)), ((1, True), (2, True), (1, False)), (0, 10)
    )
]


def configs(gate: str, moe: dict[str, Any], head_dim: int = 0) -> tuple[DecoderConfig, MoEConfig]:
    model = DecoderConfig(
        vocab_size=53, num_layers=3, d_model=24, num_heads=6, num_kv_heads=2, head_dim=head_dim, attention_gate=gate
    )
    return model, MoEConfig(intermediate_size=7, **moe)


def module_counts(model: DecoderConfig, moe: MoEConfig) -> tuple[dict[str, int], int]:
    """Parameters of the built module by part, and those that one token uses."""
    with torch.device("meta"):
        module = DecoderLM(model, moe)
    parts = dict.fromkeys(("embedding", "attention", "router", "experts", "dense_ffn", "norms"), 0)
    for name, parameter in module.named_parameters():
        if "norm" in name:
            part = "norms"
        elif ".moe." in name:
            part = "router" if "router" in name else "experts"
        else:
            part = "embedding" if "embedding" in name else "dense_ffn" if ".ffn." in name else "attention"
        parts[part] += parameter.numel()
    assert sum(parts.values()) == sum(p.numel() for p in module.parameters()), "the tied head counts once"
    active = sum(parts.values()) - parts["experts"] + parts["experts"] * moe.top_k // moe.num_experts
    return parts, active


@pytest.mark.parametrize(("gate", "moe", "head_dim"), GRID)
def test_parameters_are_those_of_the_module(gate: str, moe: dict[str, Any], head_dim: int) -> None:
    settings = configs(gate, moe, head_dim)
    parts, active = module_counts(*settings)
    counts = num_params(*settings)
    assert {part: getattr(counts, part) for part in parts} == parts
    assert counts.total == sum(parts.values())
    assert num_active_params(*settings).total == active


def test_parameters_of_lm_16l() -> None:
    """The model of the default settings, whole."""
    settings = DecoderConfig(), MoEConfig()
    parts, active = module_counts(*settings)
    assert num_params(*settings).total == sum(parts.values()) == 1_730_317_312
    assert num_active_params(*settings).total == active == 170_036_224


def test_dense_model_has_the_active_parameters_of_the_sparse_one() -> None:
    """But for the router, which it does not have."""
    sparse = configs("elementwise", {"num_experts": 5, "top_k": 2})
    dense = configs("elementwise", {"num_experts": 5, "top_k": 2, "enabled": False})
    active = num_active_params(*sparse)
    assert num_params(*dense).total == active.total - active.router


@pytest.mark.parametrize("gate", ["none", "headwise", "elementwise"])
@pytest.mark.parametrize(
    "moe", [{"num_experts": 5, "top_k": 2}, {"num_experts": 4, "top_k": 1, "every": 2}, {"enabled": False}]
)
def test_flops_are_those_of_the_matrix_products(gate: str, moe: dict[str, Any]) -> None:
    settings = configs(gate, moe, head_dim=10)
    model, batch, seq_len = DecoderLM(*settings), 2, 9
    ids_BS = torch.arange(batch * seq_len).view(batch, seq_len)
    tokens = batch * seq_len
    # The counter knows attention only as plain products, which compute the whole square; the formula counts what a
    # causal query sees. Two products of 2 * A FLOPs for each pair, head and layer.
    per_pair = settings[0].num_layers * 4 * settings[0].num_heads * settings[0].head_width
    hidden_pairs = batch * (seq_len**2 - seq_len * (seq_len + 1) // 2)
    with sdpa_kernel(SDPBackend.MATH):
        with torch.no_grad(), FlopCounterMode(display=False) as forward:
            model(ids_BS)
        with FlopCounterMode(display=False) as training:
            model(ids_BS, ids_BS).lm_loss.backward()
    expected = tokens * forward_flops_per_token(*settings, seq_len)
    assert forward.get_total_flops() - per_pair * hidden_pairs == expected
    assert training_flops_per_token(*settings, seq_len) == 3 * forward_flops_per_token(*settings, seq_len)
    assert training.get_total_flops() - 3 * per_pair * hidden_pairs == 3 * expected
