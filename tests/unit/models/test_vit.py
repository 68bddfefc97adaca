"""The Vision Transformer against Hugging Face's, and what is said of weights that do not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTModel

from moe_scale.config import ImageEncoderConfig
from moe_scale.errors import ConfigError
from moe_scale.initialization import Init
from moe_scale.models.vit import VisionTransformer
from moe_scale.models.vit_weights import load_vit, vit_problems

CONFIG = ImageEncoderConfig(
    image_size=24, patch_size=8, d_model=32, num_layers=2, num_heads=4, hidden=48, dropout=0.0, norm_eps=1e-12,
    activation_checkpointing=False,
)  # fmt: skip


def theirs(**changes: Any) -> ViTModel:
    settings = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "patch_size": 8,
        "image_size": 24,
    } | changes  # fmt: skip
    torch.manual_seed(0)
    model = ViTModel(ViTConfig(**settings)).eval()
    with torch.no_grad():  # zeros and ones would hide a mistake
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vit")
    theirs().save_pretrained(path)
    return path


def images() -> torch.Tensor:
    return torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(1))


def build(config: ImageEncoderConfig = CONFIG) -> VisionTransformer:
    return VisionTransformer(config, Init(5))


@pytest.mark.parametrize("recompute", [False, True])
def test_it_is_hugging_faces_vit(folder: Path, recompute: bool) -> None:
    """Outputs and the gradients of every parameter and of the pixels."""
    ours, other = build(replace(CONFIG, activation_checkpointing=recompute)), theirs()
    load_vit(ours, str(folder))
    pixels, their_pixels = images().requires_grad_(), images().requires_grad_()
    found, expected = ours(pixels), other(their_pixels).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(pixels.grad, their_pixels.grad, rtol=1e-4, atol=1e-4)
    of_theirs = dict(other.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, of_theirs[name].grad, rtol=1e-4, atol=1e-4, msg=name)


OLDER_NAMES = {
    ".attention.q_proj.": ".attention.attention.query.",
    ".attention.k_proj.": ".attention.attention.key.",
    ".attention.v_proj.": ".attention.attention.value.",
    ".attention.o_proj.": ".attention.output.dense.",
    ".mlp.fc1.": ".intermediate.dense.",
    ".mlp.fc2.": ".output.dense.",
}


def test_names_of_other_releases_are_understood(folder: Path, tmp_path: Path) -> None:
    """Files on the hub have the names of earlier releases, and of the model that a ViT was part of."""
    older = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        for new, old in OLDER_NAMES.items():
            name = name.replace(new, old)
        if name.startswith("layers."):
            name = f"encoder.layer.{name.removeprefix('layers.')}"
        older[f"vit.{name}"] = tensor
    assert "vit.encoder.layer.1.attention.attention.key.weight" in older
    assert "vit.encoder.layer.0.output.dense.bias" in older
    save_file(older | {"classifier.weight": torch.zeros(2, 32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    one, two = build(), build()
    load_vit(one, str(folder))
    load_vit(two, str(tmp_path))
    torch.testing.assert_close(one.state_dict(), two.state_dict(), rtol=0, atol=0)


def test_weights_in_several_files(folder: Path, tmp_path: Path) -> None:
    theirs().save_pretrained(tmp_path, max_shard_size="20KB")
    assert not (tmp_path / "model.safetensors").exists()
    one, two = build(), build()
    load_vit(one, str(folder))
    load_vit(two, str(tmp_path))
    torch.testing.assert_close(one.state_dict(), two.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "where", "says"),
    [
        ({"d_model": 64}, "model.image_width", "choose 32"),
        ({"num_layers": 3}, "model.image_layers", "choose 2"),
        ({"num_heads": 2}, "model.image_heads", "choose 4"),
        ({"hidden": 64}, "model.image_hidden", "choose 48"),
        ({"patch_size": 4}, "model.patch_size", "choose 8"),
        ({"image_size": 32}, "data.image_size", "choose 24"),
        ({"norm_eps": 1e-5}, "model.image_norm_eps", "choose 1e-12"),
    ],
)
def test_a_misfit_names_the_setting(folder: Path, change: dict[str, Any], where: str, says: str) -> None:
    [problem] = vit_problems(str(folder), replace(CONFIG, **change))
    assert (problem.where, problem.allowed) == (where, says)
    model = build(replace(CONFIG, **change))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ConfigError):
        load_vit(model, str(folder))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_all_misfits_are_told_at_once(folder: Path) -> None:
    assert len(vit_problems(str(folder), replace(CONFIG, d_model=64, num_layers=3, patch_size=4))) == 3


def test_what_is_no_vit(folder: Path, tmp_path: Path) -> None:
    def says(words: str) -> None:
        [problem] = vit_problems(str(tmp_path), CONFIG)
        assert problem.where == "model.vit_weights"
        assert words in str(problem)

    says("has no config.json")
    given = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text("{")
    says("not valid JSON")
    (tmp_path / "config.json").write_text("[]")
    says("not a JSON object")
    (tmp_path / "config.json").write_text(json.dumps(given))
    says("has no model.safetensors")
    (tmp_path / "model.safetensors").write_bytes(b"nothing of the kind")
    says("cannot be read")
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if k != "layernorm.bias"}, tmp_path / "model.safetensors")
    says("layernorm.bias is missing")
    save_file(weights | {"layernorm.bias": torch.zeros(5)}, tmp_path / "model.safetensors")
    says("layernorm.bias is (5,)")
    save_file(weights | {"layers.2.mlp.fc1.bias": torch.zeros(48)}, tmp_path / "model.safetensors")
    says("layers.2.mlp.fc1.bias is (48,)")
    save_file(weights, tmp_path / "model.safetensors")
    assert vit_problems(str(tmp_path), CONFIG) == []
    for name, value in {"hidden_act": "relu", "qkv_bias": False, "num_channels": 1}.items():
        (tmp_path / "config.json").write_text(json.dumps(given | {name: value}))
        says(f"{name} {value}")
    (tmp_path / "config.json").write_text(json.dumps(given | {"model_type": "bert"}))
    says("type 'bert'")
