"""Low-rank adapters (LoRA, arXiv 2106.09685) beside any linear layers of any model, in the files of ``peft``.

An adapter adds alpha / r * B A x to what a layer makes of x; A begins at random and B at zero. It is attached as the
layer's submodules ``lora_A`` and ``lora_B``: the layer keeps its place, its name and its weight, and a model's base is
stored and sharded as it is without adapters. Works on sharded models too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moe_scale.config import LoRAConfig
from moe_scale.errors import ConfigError, Problem
from moe_scale.initialization import Init
from moe_scale.models.layers import Linear
from moe_scale.moe.router import Router
from moe_scale.parallel.zero import full_shape, full_values, set_values

LINEAR = (nn.Linear, Linear, Router)
"""What can have an adapter: modules with a ``weight`` [out, in] that multiply their first argument by it."""

SETTINGS_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # of every tensor's name in peft's files


class Factor(nn.Module):
    """One of an adapter's two matrices, drawn or zero."""

    def __init__(self, in_features: int, out_features: int, init: Init | None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_features, in_features))
        if init is not None:
            init.normal_(self.weight, in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class _AddAdapter:
    """The forward hook that adds an adapter's output to its layer's."""

    def __init__(self, config: LoRAConfig):
        self.scale, self.dropout = config.alpha / config.rank, config.dropout

    def __call__(self, layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = F.dropout(inputs[0], self.dropout, layer.training)
        return output + (self.scale * layer.lora_B(layer.lora_A(x))).to(output.dtype)


def add_adapters(model: nn.Module, config: LoRAConfig, seed: int = 0) -> None:
    """Freeze a model and give the linear layers that ``config.targets`` names an adapter each.

    Call it where the model is built, before it is given to an engine: what is frozen by then is sharded without an
    optimizer's state.

    Raises:
        ConfigError: if a pattern names nothing; see :func:`adapter_problems`.
    """
    if problems := adapter_problems(model, config):
        raise ConfigError(problems)
    model.requires_grad_(False)
    for name, module in model.named_modules():
        if name and _is_named(name, config.also_trained):
            module.requires_grad_(True)
    for name, layer in list(_targets(model, config.targets)):
        out_features, in_features = full_shape(layer.weight)
        init = Init(seed) / name
        layer.lora_A = Factor(in_features, config.rank, init / "lora_A")
        layer.lora_B = Factor(config.rank, out_features, None)
        for factor in (layer.lora_A, layer.lora_B):
            _as_base(factor.weight, layer.weight)
        layer.adapter_hook = layer.register_forward_hook(_AddAdapter(config))


def adapter_problems(model: nn.Module, config: LoRAConfig) -> list[Problem]:
    """Patterns of ``config`` that name nothing in the model."""
    linear = [name for name, module in model.named_modules() if isinstance(module, LINEAR)]
    modules = [name for name, _ in model.named_modules() if name]
    found = []
    for setting, patterns, names in (
        ("targets", config.targets, linear),
        ("also_trained", config.also_trained, modules),
    ):
        for pattern in patterns:
            if not any(_is_named(name, [pattern]) for name in names):
                ends = sorted({name.rpartition(".")[2] for name in names if not name.rpartition(".")[2].isdigit()})
                kind = "linear layer" if setting == "targets" else "module"
                what = f"{pattern!r} is the name of no {kind} of this model"
                found.append(Problem(f"lora.{setting}", what, f"names end in {', '.join(ends)}"))
    return found


def adapters(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that have an adapter, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "adapter_hook")}


def num_adapter_params(model: nn.Module, config: LoRAConfig) -> int:
    """Parameters that the adapters of a model without any would have: r * (in + out) of each layer."""
    return sum(config.rank * sum(full_shape(layer.weight)) for _, layer in _targets(model, config.targets))


@torch.no_grad()
def merge_adapters(model: nn.Module) -> None:
    """Add the adapters of a model that is not sharded to its weights, W + alpha / r * B A, and take them away."""
    for layer in adapters(model).values():
        of_layer: Any = layer
        a, b = of_layer.lora_A.weight.double(), of_layer.lora_B.weight.double()
        scale = _added(layer).scale
        of_layer.weight.copy_(of_layer.weight.double() + scale * b @ a)
        of_layer.adapter_hook.remove()
        del of_layer.adapter_hook, of_layer.lora_A, of_layer.lora_B


def save_adapters(model: nn.Module, config: LoRAConfig, folder: Path, *, base: str = "", write: bool = True) -> None:
    """Write the adapters, and what is trained beside them, as peft does. Of a sharded model all ranks together.

    Args:
        config: what they were made with.
        folder: gets ``adapter_config.json`` and ``adapter_model.safetensors``.
        base: where the model that is adapted came from, for the record.
        write: False on ranks that only help to gather.
    """
    layers = adapters(model)
    tensors = {}
    for name, layer in layers.items():
        for factor in ("lora_A", "lora_B"):
            tensors[f"{_PREFIX}{name}.{factor}.weight"] = full_values(getattr(layer, factor).weight)
    beside = [name for name, _ in model.named_modules() if name and _is_named(name, config.also_trained)]
    for name in beside:
        for own, parameter in model.get_submodule(name).named_parameters():
            tensors[f"{_PREFIX}{name}.{own}"] = full_values(parameter)
    if not write:
        return
    settings = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base or None,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": list(layers),
        "modules_to_save": beside or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS_FILE)
    (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def load_adapters(model: nn.Module, folder: Path) -> LoRAConfig:
    """Give a model without adapters those of a folder that :func:`save_adapters` or peft wrote. Returns their settings.

    Raises:
        ConfigError: if the folder has none, or they do not fit.
    """
    try:
        said = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(Problem(str(folder), f"no adapters can be read: {error}")) from None
    if said.get("peft_type") != "LORA" or said.get("use_dora") or said.get("use_rslora") or said.get("rank_pattern"):
        raise ConfigError(Problem(str(folder / SETTINGS_FILE), "adapters of another kind", "plain LoRA is understood"))
    if isinstance(said["target_modules"], str):
        what = f"target_modules is {said['target_modules']!r}"
        raise ConfigError(Problem(str(folder / SETTINGS_FILE), what, "a list of names of linear layers is understood"))
    config = LoRAConfig(
        rank=said["r"],
        alpha=said["lora_alpha"],
        dropout=said["lora_dropout"],
        targets=tuple(said["target_modules"]),
        also_trained=tuple(said.get("modules_to_save") or ()),
    )
    add_adapters(model, config)
    parameters = {f"{_PREFIX}{name}": p for name, p in model.named_parameters() if p.requires_grad}
    if wrong := sorted(
        name
        for name in parameters.keys() | tensors.keys()
        if name not in parameters or name not in tensors or full_shape(parameters[name]) != tensors[name].shape
    ):
        what = f"they do not fit the model: {', '.join(wrong[:3])}"
        raise ConfigError(
            Problem(str(folder / WEIGHTS_FILE), what, "load them into the model they were trained beside")
        )
    for name, parameter in parameters.items():
        set_values(parameter, tensors[name])
    return config


def _targets(model: nn.Module, patterns: Sequence[str]) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, LINEAR) and _is_named(name, patterns):
            yield name, module


def _is_named(name: str, patterns: Sequence[str]) -> bool:
    """Whether a dotted name, or its end from a dot on, fits one of the patterns."""
    return any(fnmatch(name, pattern) or fnmatch(name, f"*.{pattern}") for pattern in patterns)


def _as_base(mine: nn.Parameter, base: nn.Parameter) -> None:
    """Bring an adapter's matrix, unless it is sharded already, to where its layer's weight is and to its precision."""
    if not hasattr(mine, "ds_tensor") and (mine.device, mine.dtype) != (base.device, base.dtype):
        mine.data = mine.data.to(base.device, base.dtype)


def _added(layer: nn.Module) -> _AddAdapter:
    return next(hook for hook in layer._forward_hooks.values() if isinstance(hook, _AddAdapter))
