"""The rules between our tensors and theirs: they cover a model, and going there and back changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_scale.checkpoint.reader import persistent_buffers
from moe_scale.config import DecoderConfig, MoEConfig
from moe_scale.models.decoder import DecoderLM
from moe_scale.models.hf.families import BY_TYPE
from moe_scale.models.hf.settings import home_of
from moe_scale.models.hf.tensors import rules

MODEL = {"vocab_size": 11, "num_layers": 2, "d_model": 12, "num_heads": 4, "num_kv_heads": 2}
MOE = {"num_experts": 3, "top_k": 2, "intermediate_size": 6}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": ({"attention_gate": "none", "qk_norm": "none"}, {"enabled": False}),
    "qwen3": ({"attention_gate": "none", "tie_embeddings": False}, {"enabled": False}),
    "mixtral": ({"attention_gate": "none", "qk_norm": "none"}, {}),
    "olmoe": ({"attention_gate": "none", "qk_norm": "whole"}, {}),
    "qwen3_moe": ({"attention_gate": "none", "head_dim": 10}, {"every": 2, "router_temperature": 4.0}),
    "glm4_moe": ({"attention_gate": "none"}, {"router": "sigmoid"}),
    "qwen3_next": ({}, {"shared_intermediate_size": 5}),
}


@pytest.mark.parametrize("model_type", BY_TYPE)
def test_there_and_back(model_type: str) -> None:
    model, moe = CASES[model_type]
    config, moe_config = DecoderConfig(**(MODEL | model)), MoEConfig(**(MOE | moe))
    family = home_of(config, moe_config)
    assert family.model_type == model_type
    made = DecoderLM(config, moe_config)
    weights = dict(made.named_parameters()) | persistent_buffers(made)
    found = list(rules(family, config, moe_config))
    ours, theirs = ([name for rule in found for name in getattr(rule, side)] for side in ("ours", "theirs"))
    assert sorted(ours) == sorted(weights), "each tensor in one rule"
    assert len(set(theirs)) == len(theirs)
    for rule in found:
        there = rule.to_theirs([weights[name] for name in rule.ours])
        assert len(there) == len(rule.theirs)
        for name, value in zip(rule.ours, rule.to_ours(there), strict=True):
            torch.testing.assert_close(value, weights[name])
