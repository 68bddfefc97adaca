"""Settings of texts and images: what the data fills in, and what does not go together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from moe_scale.config import (
    ImageTextDataConfig,
    LoRAConfig,
    MoEConfig,
    MultimodalConfig,
    MultimodalModelConfig,
)
from moe_scale.settings import read_settings, to_dict


def config(model: dict[str, Any] | None = None, data: dict[str, Any] | None = None, **other: Any) -> MultimodalConfig:
    return MultimodalConfig(model=MultimodalModelConfig(**model or {}), data=ImageTextDataConfig(**data or {}), **other)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({}, ("retrieval", "image_text", 0, 64)),
        ({"source": "glue/cola"}, ("classification", "text", 2, 64)),
        ({"source": "glue/mnli"}, ("classification", "text", 3, 64)),
        ({"source": "glue/stsb"}, ("regression", "text", 1, 64)),
        ({"source": "q.json", "format": "vqa", "answers": "a.json", "num_answers": 10, "image_size": 32},
         ("classification", "image_text", 10, 32)),
    ],
)  # fmt: skip
def test_the_model_is_what_the_data_needs(data: dict[str, Any], expected: tuple) -> None:
    made = config(data=data)
    assert (made.model.goal, made.model.inputs, made.model.num_outputs, made.model.image_size) == expected
    assert made.problems() == []


def test_what_was_filled_in_is_read_back() -> None:
    """As a run that continues reads the settings that it was saved with."""
    made = config(data={"source": "glue/rte"})
    argv = [f"--model.{name}={value}" for name, value in to_dict(made)["model"].items() if value not in ("", [])]
    again = read_settings(MultimodalConfig, {"cpu": {}}, [*argv, "--data.source", "glue/rte"], machine_scale="cpu",
                          recipe="multimodal")  # fmt: skip
    assert again.problems == []
    assert again.config.model == made.model


@pytest.mark.parametrize(
    ("changes", "where", "says"),
    [
        ({"model": {"goal": "regression"}}, "model.goal", "takes retrieval"),
        ({"model": {"inputs": "text"}}, "model.inputs", "takes image_text"),
        ({"model": {"num_outputs": 5}, "data": {"source": "glue/rte"}}, "model.num_outputs", "takes 2"),
        ({"model": {"image_size": 32}}, "model.image_size", "takes 64"),
        ({"data": {"source": "glue/stsa"}}, "data.source", "GLUE has no task 'stsa'"),
        ({"model": {"text_heads": 3}}, "model.text_heads", "does not divide model.text_width = 256"),
        ({"model": {"image_heads": 3}}, "model.image_heads", "does not divide model.image_width"),
        ({"model": {"fusion_heads": 3}}, "model.fusion_heads", "does not divide model.fusion_width"),
        ({"model": {"text_width": 12, "positions": "rotary"}}, "model.text_heads", "which is odd"),
        ({"model": {"patch_size": 7}}, "model.patch_size", "choose one of [1, 2, 4, 8, 16, 32, 64]"),
        ({"model": {"matching_weight": 0.0}}, "model.matching_weight", "learn nothing"),
        ({"model": {"positions": "learned", "max_positions": 8}}, "model.max_positions", "at least 64"),
        ({"model": {"vit_weights": "somewhere"}, "data": {"source": "glue/rte"}}, "model.vit_weights", "no image"),
        ({"model": {"fusion_layers": 0}, "data": {"source": "q.json", "format": "vqa", "answers": "a.json"}},
         "model.fusion_layers", "text and image together"),
        ({"moe": MoEConfig(router="hash")}, "moe.router", "no token ids"),
        ({"moe": MoEConfig(every=9)}, "moe.every", "no layer is sparse"),
        ({"moe": MoEConfig(router="sigmoid"), "lora": LoRAConfig(rank=2)}, "moe.bias_update_rate", "choose 0"),
        ({"moe": MoEConfig(backend="deepspeed"), "lora": LoRAConfig(rank=2)}, "moe.backend", "moe.backend custom"),
        ({"lora": LoRAConfig(rank=2, targets=())}, "lora.targets", "name linear layers"),
        ({"moe": MoEConfig(enabled=False, dense_size="total", every=3)}, "moe.dense_size", "does not divide"),
    ],
)  # fmt: skip
def test_what_does_not_go_together(changes: dict[str, Any], where: str, says: str) -> None:
    problems = config(**changes).problems()
    assert where in [problem.where for problem in problems]
    assert any(says in str(problem) for problem in problems if problem.where == where)


def test_hash_routing_is_for_text() -> None:
    moe = MoEConfig(router="hash")
    assert config({"experts_in": "text"}, moe=moe).problems() == []
    assert config(data={"source": "glue/rte"}, moe=moe).problems() == []


def test_sparse_layers_are_numbered_through() -> None:
    for where, expected in {"both": [1, 3, 5], "text": [1, 3], "fusion": [5]}.items():
        made = config({"experts_in": where, "text_layers": 4, "fusion_layers": 2}, moe=MoEConfig(every=2))
        assert made.sparse_layers == expected
    assert config(data={"source": "glue/rte"}).sparse_layers == [0, 1, 2, 3]
    assert config(moe=MoEConfig(enabled=False)).sparse_layers == []


def test_adapters_beside_random_weights_are_remarked_upon() -> None:
    lora = LoRAConfig(rank=2)
    assert config(lora=lora).remarks()
    assert not config({"pretrained": "runs/earlier"}, lora=lora).remarks()
    assert not config().remarks()
    assert replace(lora, rank=0).problems("lora") == []
