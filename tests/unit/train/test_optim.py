"""Parts of a model by name, what decays, the schedules' shape, and the 8-bit optimizer."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any, Literal

import pytest
import torch
from torch import nn

from moe_scale.config import DecoderConfig, LMConfig, MoEConfig, OptimConfig
from moe_scale.models.decoder import DecoderLM
from moe_scale.train.optim import (
    PARTS,
    build_optimizer,
    build_schedule,
    optimizer_problems,
    parameter_groups,
    parameters_by_part,
    part_of,
)

DECODER = DecoderConfig(vocab_size=40, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2)
MOE = MoEConfig(num_experts=4, intermediate_size=8, every=2)


def model(backend: Literal["custom", "deepspeed", "autoep"] = "custom", gate: Any = "elementwise") -> DecoderLM:
    return DecoderLM(
        DecoderConfig(**{**vars(DECODER), "attention_gate": gate}), MoEConfig(**{**vars(MOE), "backend": backend})
    )


@pytest.mark.parametrize("gate", ["none", "elementwise", "headwise"])
@pytest.mark.parametrize("backend", ["custom", "deepspeed", "autoep"])
def test_parts(backend: Literal["custom", "deepspeed", "autoep"], gate: str) -> None:
    made = model(backend, gate)
    sizes = {part: sum(p.numel() for p in parameters) for part, parameters in parameters_by_part(made).items()}
    assert list(sizes) == [part for part in PARTS if part not in ("projections", "adapters")]
    d_model, width = DECODER.d_model, DECODER.d_model // DECODER.num_heads
    gates = {"none": 0, "elementwise": d_model, "headwise": DECODER.num_heads}[gate] * d_model
    assert sizes == {
        "embedding": 40 * d_model,
        "attention": 2 * (d_model * (4 + 2 * 2) * width + d_model * d_model + gates),
        "router": d_model * 4,
        "experts": 4 * 3 * d_model * 8,
        "ffn": 3 * d_model * 16,
        "norms": 2 * (2 * d_model + 2 * width) + d_model,
    }
    assert sum(sizes.values()) == sum(p.numel() for p in made.parameters())


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("embedding.weight", "embedding"),
        ("layers.0.attention.q_norm.weight", "norms"),
        ("layers.0.attention_norm.weight", "norms"),
        ("final_norm.weight", "norms"),
        ("project.weight", "projections"),
        ("layers.0.attention.qkv.lora_A.weight", "adapters"),
        ("text.segments.weight", "embedding"),
        ("text.encoder.layers.0.self_attention.query.weight", "attention"),
        ("image.embeddings.position_embeddings", "embedding"),
        ("image.embeddings.patch_embeddings.projection.weight", "projections"),
        ("image.layers.0.attention.q_proj.bias", "attention"),
        ("image.layers.0.layernorm_before.bias", "norms"),
        ("image.layers.0.mlp.fc1.weight", "ffn"),
        ("fusion.project_image.weight", "projections"),
        ("fusion.blocks.0.text_attention.out.weight", "attention"),
        ("fusion.blocks.0.feed_forward.moe.experts.down", "experts"),
        ("temperature.log_scale", "projections"),
        ("match.bias", "projections"),
        ("pooling.query.weight", "projections"),
        ("head.bias", "projections"),
        ("layers.11.ffn.gate_up", "ffn"),
        ("layers.1.moe.router.weight", "router"),
        ("layers.1.moe.experts.gate_up", "experts"),
        ("layers.1.moe.layer.gate.wg.weight", "router"),
        ("layers.1.moe.layer.experts.deepspeed_experts.3.down", "experts"),
        ("layers.1.moe.block.router.gate.weight", "router"),
        ("layers.1.moe.block.experts.w1", "experts"),
        ("module.layers.1.moe.block.experts.w1", "experts"),
    ],
)
def test_part_of(name: str, part: str) -> None:
    assert part_of(name) == part


def test_frozen_parameters_are_left_out() -> None:
    made = model()
    made.embedding.requires_grad_(False)
    assert "embedding" not in parameters_by_part(made)
    listed = [p for group in parameter_groups(made, 0.1) for p in group["params"]]
    assert len(listed) == len([p for p in made.parameters() if p.requires_grad])


@pytest.mark.parametrize("backend", ["custom", "deepspeed", "autoep"])
def test_only_matrices_decay(backend: Literal["custom", "deepspeed", "autoep"]) -> None:
    made = model(backend)
    names = {id(p): name for name, p in made.named_parameters()}
    groups = {group["name"]: group for group in parameter_groups(made, 0.1)}
    assert set(groups) == {"decayed", "undecayed"}
    assert groups["decayed"]["weight_decay"] == 0.1
    assert groups["undecayed"]["weight_decay"] == 0.0
    for p in groups["decayed"]["params"]:
        assert p.dim() >= 2
        assert part_of(names[id(p)]) not in ("norms", "embedding")
    for p in groups["undecayed"]["params"]:
        assert part_of(names[id(p)]) in ("norms", "embedding")
    listed = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(listed) == sorted(names)


def test_expert_parallel_parameters_have_groups_of_their_own() -> None:
    made = model()
    for name, parameter in made.named_parameters():
        if ".experts." in name:
            parameter.allreduce = False
            parameter.group_name = "ep_size_2"
    groups = {group["name"]: group for group in parameter_groups(made, 0.1)}
    assert set(groups) == {"decayed", "undecayed", "ep_size_2"}
    assert groups["ep_size_2"]["moe"] is True
    assert groups["ep_size_2"]["weight_decay"] == 0.1
    assert all("moe" not in group for name, group in groups.items() if name != "ep_size_2")


# --- schedules -------------------------------------------------------------------------------------------------------


def rates(**optim: Any) -> list[float]:
    """Learning rate of each of 100 steps, and after them, as a share of the peak."""
    config = LMConfig(max_steps=100, optim=OptimConfig(lr=0.5, **optim))
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.optim.lr)
    schedule = build_schedule(optimizer, config)
    found = []
    for _ in range(101):
        found.append(schedule.get_last_lr()[0] / 0.5)
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_warm_up(schedule: str) -> None:
    found = rates(schedule=schedule, warmup_steps=10)
    assert found[:11] == pytest.approx([step / 10 for step in range(11)])
    assert max(found) == pytest.approx(1.0)
    assert rates(schedule=schedule, warmup_steps=0)[0] == pytest.approx(1.0)


@pytest.mark.parametrize("ratio", [0.0, 0.1])
def test_cosine(ratio: float) -> None:
    found = rates(schedule="cosine", warmup_steps=20, min_lr_ratio=ratio)
    for step in (20, 40, 60, 80, 99, 100):
        cosine = 0.5 * (1 + math.cos(math.pi * (step - 20) / 80))
        assert found[step] == pytest.approx(ratio + (1 - ratio) * cosine)
    assert found[100] == pytest.approx(ratio)
    assert found[20:] == sorted(found[20:], reverse=True)


@pytest.mark.parametrize(("decay_steps", "start"), [(0, 80), (30, 70)])
def test_wsd(decay_steps: int, start: int) -> None:
    found = rates(schedule="wsd", warmup_steps=10, decay_steps=decay_steps, min_lr_ratio=0.1)
    assert found[10 : start + 1] == pytest.approx([1.0] * (start - 9))
    assert found[start + 1] < 1.0
    assert found[start:] == sorted(found[start:], reverse=True)
    assert found[(start + 100) // 2] == pytest.approx(0.55), "half-way of the decay"
    assert found[100] == pytest.approx(0.1)


def test_constant() -> None:
    assert rates(schedule="constant", warmup_steps=10)[10:] == pytest.approx([1.0] * 91)


@pytest.mark.slow
def test_a_schedule_imports_no_trainer() -> None:
    """Seconds of every start, on every rank, where peft is installed beside transformers."""
    code = """
import sys, torch
from moe_scale.config import LMConfig
from moe_scale.train.optim import build_schedule
build_schedule(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), LMConfig())
print([name for name in ("transformers.optimization", "peft", "bitsandbytes") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr


# --- optimizers ------------------------------------------------------------------------------------------------------


def one_step(config: OptimConfig) -> tuple[torch.optim.Optimizer, torch.Tensor, torch.Tensor]:
    """An optimizer after a step on one large matrix, and the matrix before and after it."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 128, bias=False)
    before = layer.weight.detach().clone()
    optimizer = build_optimizer(layer, config)
    layer(torch.randn(4, 64)).square().mean().backward()
    optimizer.step()
    return optimizer, before, layer.weight.detach().clone()


def test_adamw() -> None:
    config = OptimConfig(lr=0.01, weight_decay=0.0, beta1=0.8, beta2=0.9, eps=1e-9)
    optimizer, before, after = one_step(config)
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["betas"] == (0.8, 0.9)
    assert optimizer.defaults["eps"] == 1e-9
    assert (after - before).abs().max() == pytest.approx(0.01, rel=1e-3), "the first step of Adam is lr long"


def test_8_bit_adamw_steps_like_adamw_on_a_cpu() -> None:
    pytest.importorskip("bitsandbytes")
    assert optimizer_problems(OptimConfig(name="adamw8bit")) == []
    _, _, expected = one_step(OptimConfig(lr=0.01))
    optimizer, before, after = one_step(OptimConfig(lr=0.01, name="adamw8bit"))
    (state,) = optimizer.state.values()
    assert state["state1"].dtype == torch.uint8
    assert (after - expected).abs().mean() < 0.1 * (before - expected).abs().mean()


def test_a_missing_bitsandbytes_is_a_problem_of_this_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    (found,) = optimizer_problems(OptimConfig(name="adamw8bit"))
    assert found.where == "optim.name"
    assert found.this_host_only
    assert "pip install bitsandbytes" in found.allowed
    assert optimizer_problems(OptimConfig()) == []


def test_biases_of_experts_do_not_decay() -> None:
    """They are vectors, although stacking them over the experts makes a tensor of two dimensions."""
    made = DecoderLM(DECODER, MoEConfig(num_experts=4, intermediate_size=8, expert_bias=True))
    names = {id(parameter): name for name, parameter in made.named_parameters()}
    decayed, undecayed = (
        {names[id(p)] for group in parameter_groups(made, 0.1) if bool(group["weight_decay"]) == decays
         for p in group["params"]}
        for decays in (True, False)
    )  # fmt: skip
    assert {name for name in names.values() if name.endswith("_bias")} <= undecayed
    assert {name for name in names.values() if name.endswith(("gate_up", "down", "router.weight"))} <= decayed
