"""Weights of a Vision Transformer from a folder as Hugging Face writes it, and whether they fit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_scale.config import ImageEncoderConfig
from moe_scale.errors import ConfigError, Problem, raise_if
from moe_scale.initialization import Init
from moe_scale.models.vit import VisionTransformer
from moe_scale.parallel.zero import full_shape, set_values

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

_OLDER_NAMES = (
    (r"^encoder\.layer\.", "layers."),
    (r"\.attention\.attention\.(query|key|value)\.", lambda found: f".attention.{found[1][0]}_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(layers\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
)
"""What tensors were called before, and are in files to this day."""

_NOT_OURS = re.compile(r"^(pooler|classifier|decoder)\.|mask_token$")
"""Tensors that go with some of the models that are built on a ViT."""


def vit_problems(folder: str, config: ImageEncoderConfig) -> list[Problem]:
    """Why an image encoder of these settings cannot begin with the weights in ``folder``; reads no weights."""
    with torch.device("meta"):
        return _misfits(folder, VisionTransformer(config, Init(0)))


def _misfits(folder: str, model: VisionTransformer) -> list[Problem]:
    path = Path(folder).expanduser()
    try:
        theirs = _read_json(path / "config.json")
        shapes = {name: shape for name, (_, _, shape) in _tensors(path).items()}
    except ConfigError as error:
        return error.problems
    mine = {name: tuple(full_shape(parameter)) for name, parameter in model.named_parameters()}
    return _setting_problems(path, theirs, model.config) or _shape_problems(path, shapes, mine)


def load_vit(model: VisionTransformer, folder: str) -> None:
    """Give the model the weights in ``folder``; sharded or not.

    Raises:
        ConfigError: if they do not fit, before anything is changed.
    """
    raise_if(_misfits(folder, model))
    tensors = _tensors(Path(folder).expanduser())
    for name, parameter in model.named_parameters():
        file, key, _ = tensors[name]
        set_values(parameter, _read_tensor(file, key))


def _setting_problems(path: Path, theirs: dict[str, Any], config: ImageEncoderConfig) -> list[Problem]:
    """Settings in which the folder's config.json and ours differ."""
    if theirs.get("model_type") != "vit":
        what = f"{path} holds a model of type {theirs.get('model_type')!r}"
        return [Problem("model.vit_weights", what, "name the folder of a ViT")]
    # Defaults are those of Hugging Face's ViTConfig, which leaves out of the file what is as usual.
    expected = {
        "hidden_size": ("model.image_width", config.d_model, 768),
        "num_hidden_layers": ("model.image_layers", config.num_layers, 12),
        "num_attention_heads": ("model.image_heads", config.num_heads, 12),
        "intermediate_size": ("model.image_hidden", config.hidden, 3072),
        "patch_size": ("model.patch_size", config.patch_size, 16),
        "image_size": ("data.image_size", config.image_size, 224),
        "layer_norm_eps": ("model.image_norm_eps", config.norm_eps, 1e-12),
    }
    found = []
    for name, (where, ours, usual) in expected.items():
        value = theirs.get(name, usual)
        value = value[0] if isinstance(value, list) and len(set(value)) == 1 else value
        if value != ours:
            found.append(Problem(where, f"{ours}, and the ViT in {path} has {name} {value}", f"choose {value}"))
    fixed = {"hidden_act": "gelu", "qkv_bias": True, "num_channels": config.channels}
    for name, only in fixed.items():
        if theirs.get(name, only) != only:
            what = f"the ViT in {path} has {name} {theirs[name]}"
            found.append(Problem("model.vit_weights", what, f"this image encoder has {name} {only}"))
    return found


def _shape_problems(path: Path, shapes: dict[str, tuple[int, ...]], mine: dict[str, tuple[int, ...]]) -> list[Problem]:
    wrong = [name for name in mine if shapes.get(name) != mine[name]]
    wrong += [name for name in shapes if name not in mine and not _NOT_OURS.search(name)]
    return [
        Problem(
            "model.vit_weights",
            f"{name} is {shapes.get(name, 'missing')} in {path}, where its config.json needs {mine.get(name, 'none')}",
            "the folder does not hold one ViT as Hugging Face writes it",
        )
        for name in wrong[:5]
    ]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
        what = f"{path} is not a JSON object"
    except FileNotFoundError:
        what = f"{path.parent} has no {path.name}"
    except OSError as error:
        what = f"{path} cannot be read: {error.strerror}"
    except ValueError as error:
        what = f"{path} is not valid JSON: {error}"
    allowed = "name a folder that ViTModel.save_pretrained wrote"
    raise ConfigError(Problem("model.vit_weights", what, allowed, this_host_only=True))


def _tensors(path: Path) -> dict[str, tuple[Path, str, tuple[int, ...]]]:
    """File, key and shape of each tensor of the folder, by the name that it has here."""
    names = [WEIGHTS]
    if not (path / WEIGHTS).exists() and (path / INDEX).exists():
        where = _read_json(path / INDEX).get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
            what = f"{path / INDEX} has no weight_map of tensors and files"
            raise ConfigError(Problem("model.vit_weights", what, this_host_only=True))
        names = sorted(set(where.values()))
    found = {}
    for file in (path / name for name in names):
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 (it is no mapping)
                    found[_our_name(key)] = (file, key, tuple(opened.get_slice(key).get_shape()))
        except FileNotFoundError:
            what, allowed = f"{path} has no {file.name}", "name a folder that ViTModel.save_pretrained wrote"
            raise ConfigError(Problem("model.vit_weights", what, allowed, this_host_only=True)) from None
        except (OSError, SafetensorError) as error:
            what = f"{file} cannot be read: {error}"
            raise ConfigError(Problem("model.vit_weights", what, this_host_only=True)) from None
    return found


def _read_tensor(file: Path, key: str) -> Tensor:
    with safe_open(file, framework="pt") as opened:
        found: Tensor = opened.get_tensor(key)
        return found


def _our_name(key: str) -> str:
    name = key.removeprefix("vit.")
    for pattern, replacement in _OLDER_NAMES:
        name = re.sub(pattern, replacement, name)
    return name
