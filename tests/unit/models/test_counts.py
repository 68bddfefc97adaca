"""Parameter and FLOP counts against the modules that they speak of."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moe_scale.config import DecoderConfig, MoEConfig
from moe_scale.models.counts import (
    adapter_training_flops_per_token,
    forward_flops_per_token,
    num_active_params,
    num_params,
    training_flops_per_token,
)
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
    return model, MoEConfig(**{"intermediate_size": 7, **moe})


def module_counts(model: DecoderConfig, moe: MoEConfig) -> tuple[dict[str, int], int]:
    """Parameters of the built module by part, and those that one token uses."""
    with torch.device("meta"):
        module = DecoderLM(model, moe)
    parts = dict.fromkeys(("embedding", "attention", "router", "experts", "dense_ffn", "norms"), 0)
    for name, parameter in module.named_parameters():
        if "norm" in name:
            part = "norms"
        elif ".moe." in name:
            inner = name.split(".moe.")[1].split(".")[0]
            part = {"noise": "router", "mix": "router", "dense": "dense_ffn"}.get(
                inner, "router" if "router" in name else "experts"
            )
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


@pytest.mark.parametrize("qk_norm", ["none", "head", "whole"])
@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_norms_and_heads_are_those_of_the_module(qk_norm: Any, tie_embeddings: bool, one_thread: None) -> None:
    model, moe = configs("none", {"num_experts": 4, "top_k": 2})
    model = replace(model, qk_norm=qk_norm, tie_embeddings=tie_embeddings)
    with torch.device("meta"):
        module = DecoderLM(model, moe)
    assert num_params(model, moe).total == sum(p.numel() for p in module.parameters())
    seen = replace(model, qk_norm="head", tie_embeddings=True)
    flops = [forward_flops_per_token(settings, moe, 9) for settings in (model, seen)]
    assert flops[0] == flops[1], "norms multiply no matrices, and an embedding is a look-up"


HALVES: tuple[dict[str, Any], ...] = ({}, {"shared_intermediate_size": 5}, {"residual": True})
VARIANTS = [
    {"num_experts": 4, "top_k": 2, "router": router, "activation": activation, "expert_bias": bias, **half}
    | ({"dispatch": "capacity", "min_capacity": 1} if router == "expert_choice" else {})
    for router, activation, bias, half in itertools.product(
        ("softmax", "noisy", "sigmoid", "hash", "expert_choice"), ("swiglu", "gelu", "relu"), (False, True), HALVES
    )
]


def variant_name(moe: dict[str, Any]) -> str:
    half = "shared" if "shared_intermediate_size" in moe else "residual" if "residual" in moe else "no half"
    return f"{moe['router']}, {moe['activation']}, {'bias' if moe['expert_bias'] else 'no bias'}, {half}"


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("moe", VARIANTS, ids=variant_name)
def test_parameters_of_every_variant_are_those_of_the_module(moe: dict[str, Any], every: int) -> None:
    """Every router, activation and dense half, with and without biases, in all layers and in every second one."""
    settings = configs("elementwise", moe | {"every": every})
    parts, active = module_counts(*settings)
    counts = num_params(*settings)
    assert {part: getattr(counts, part) for part in parts} == parts
    assert num_active_params(*settings).total == active


@pytest.mark.parametrize("half", HALVES, ids=["no half", "shared", "residual"])
@pytest.mark.parametrize("backend", ["deepspeed", "autoep"])
def test_parameters_of_the_other_backends_with_a_dense_half_are_those_of_the_module(
    backend: str, half: dict[str, Any]
) -> None:
    model, moe = configs("elementwise", {"num_experts": 4, "top_k": 2, "backend": backend, **half})
    with torch.device("meta"):
        module = DecoderLM(model, moe)
    assert num_params(model, moe).total == sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu"])
@pytest.mark.parametrize("half", HALVES, ids=["no half", "shared", "residual"])
def test_dense_layers_cost_about_what_sparse_ones_use(half: dict[str, Any], activation: str) -> None:
    """Exactly with SwiGLU; else to the rounding of a width, of which a unit is three rows."""
    moe = {"num_experts": 4, "top_k": 2, "intermediate_size": 8, "activation": activation, **half}
    sparse, dense = configs("elementwise", moe), configs("elementwise", moe | {"enabled": False})
    active = num_active_params(*sparse)
    gap = num_params(*dense).total - (active.total - active.router)
    model = sparse[0]
    assert abs(gap) <= (0 if activation == "swiglu" else model.num_layers * 3 * model.d_model / 2)


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


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The counter sees the thread that it was entered in, and the experts run in several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("gate", ["none", "headwise", "elementwise"])
@pytest.mark.parametrize(
    "moe",
    [
        {"num_experts": 5, "top_k": 2},
        {"num_experts": 4, "top_k": 1, "every": 2},
        {"enabled": False},
        {"num_experts": 4, "top_k": 2, "router": "noisy", "activation": "gelu", "residual": True},
        {"num_experts": 4, "top_k": 2, "router": "sigmoid", "shared_intermediate_size": 5},
        {"num_experts": 4, "top_k": 2, "router": "hash", "activation": "relu", "every": 2},
        # 18 tokens in two sequences: 9 places an expert, none to spare.
        {"num_experts": 4, "top_k": 2, "router": "expert_choice", "dispatch": "capacity", "min_capacity": 1},
        {"num_experts": 4, "top_k": 2, "expert_bias": True},  # adding a bias is no matrix product
        {"num_experts": 4, "top_k": 2, "expert_bias": True, "activation": "gelu", "every": 2},
    ],
)
def test_flops_are_those_of_the_matrix_products(gate: str, moe: dict[str, Any], one_thread: None) -> None:
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

    model.requires_grad_(False)
    model.embedding.register_forward_hook(lambda _, __, x_BSD: x_BSD.requires_grad_())  # as if of an adapter before it
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as frozen:
        model(ids_BS, ids_BS).lm_loss.backward()
    expected = tokens * adapter_training_flops_per_token(*settings, seq_len)
    assert frozen.get_total_flops() - 3 * per_pair * hidden_pairs == expected
