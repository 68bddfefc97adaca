"""Low-rank adapters (LoRA, arXiv 2106.09685) beside any linear layers and experts of any model, in peft's files.

An adapter adds alpha / r * B A x to what a layer makes of x; A begins at random and B at zero. It is attached as the
layer's submodules ``lora_A`` and ``lora_B``: the layer keeps its place, its name and its weight, and a model's base is
stored and sharded as it is without adapters. Works on sharded models too.

The maps of experts and of a shared expert are parameters ``gate_up`` and ``down`` of one module, and their adapters its
submodules ``lora_gate_up`` and ``lora_down`` (:class:`moe_scale.moe.low_rank.LowRank`). In a file they have the names
and shapes that peft gives them for ``target_parameters``.

Shapes of these: E experts, r rank, I inputs, O outputs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moe_scale.config import LoRAConfig
from moe_scale.errors import ConfigError, Problem
from moe_scale.initialization import Init
from moe_scale.models.layers import Linear
from moe_scale.moe.experts import Experts
from moe_scale.moe.low_rank import Adaptable, LowRank
from moe_scale.moe.router import Router
from moe_scale.parallel.zero import all_values, full_shape, set_values

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
    for name, module, own in list(_targets(model, config.targets)):
        init = Init(seed) / name
        if own:
            weight = getattr(module, own)
            adapter = LowRank(
                full_shape(weight), config.rank, config.alpha / config.rank, config.dropout, init, module.groups
            )
            setattr(module, f"lora_{own}", adapter)
            factors = [adapter.A, adapter.B]
        else:
            weight = module.weight
            out_features, in_features = full_shape(weight)
            module.lora_A = Factor(in_features, config.rank, init / "lora_A")
            module.lora_B = Factor(config.rank, out_features, None)
            module.adapter_hook = module.register_forward_hook(_AddAdapter(config))
            factors = [module.lora_A.weight, module.lora_B.weight]
        for factor in factors:
            _as_base(factor, weight)


def adapter_problems(model: nn.Module, config: LoRAConfig) -> list[Problem]:
    """Patterns of ``config`` that name nothing in the model, or what can have no adapter in it."""
    linear = [name for name, _, _ in _maps(model)]
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
    for name, module, _ in _targets(model, config.targets):
        if isinstance(module, Experts) and module.kernels == "triton":
            what = f"triton, whose kernels take no adapters, and lora.targets names {name}"
            return [*found, Problem("moe.kernels", what, "use moe.kernels torch")]
    return found


def adapters(model: nn.Module) -> dict[str, nn.Module]:
    """What has an adapter, by name: linear layers, and of maps of experts the module that they are in."""
    return {name: module for name, module, own in _maps(model) if _has_adapter(module, own)}


def num_adapter_params(model: nn.Module, config: LoRAConfig) -> int:
    """Parameters that the adapters of a model without any would have: r * (in + out) of each layer and each expert.

    Of a model with expert parallelism those of this rank's experts.
    """
    shapes = [full_shape(getattr(module, own or "weight")) for _, module, own in _targets(model, config.targets)]
    return sum(config.rank * prod(stack) * (outputs + inputs) for *stack, outputs, inputs in shapes)


@torch.no_grad()
def merge_adapters(model: nn.Module) -> None:
    """Add the adapters of a model that is not sharded to its weights, W + alpha / r * B A, and take them away."""
    for _, module, own in list(_maps(model)):
        of: Any = module
        if not _has_adapter(module, own):
            continue
        if own:
            adapter = of.adapter(own)
            getattr(of, own).copy_(merged(getattr(of, own), adapter.A, adapter.B, adapter.scale))
            delattr(of, f"lora_{own}")
        else:
            of.weight.copy_(merged(of.weight, of.lora_A.weight, of.lora_B.weight, _added(module).scale))
            of.adapter_hook.remove()
            del of.adapter_hook, of.lora_A, of.lora_B


def merged(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + scale * B A, of one matrix or of each of a stack, computed in fp64. Returns fp32 or wider."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    if weight.dim() == 2:
        return (weight.double() + scale * b.double() @ a.double()).to(wide)
    return torch.stack([merged(*each, scale) for each in zip(weight, a, b, strict=True)])


def factor_names(weight: str) -> tuple[str, str]:
    """Names of the factors A and B that an adapter beside the named weight has in a checkpoint."""
    module, _, own = weight.rpartition(".")
    if own == "weight":
        return f"{module}.lora_A.weight", f"{module}.lora_B.weight"
    return f"{module}.lora_{own}.A", f"{module}.lora_{own}.B"


def save_adapters(model: nn.Module, config: LoRAConfig, folder: Path, *, base: str = "", write: bool = True) -> None:
    """Write the adapters, and what is trained beside them, as peft does. Of a sharded model all ranks together.

    Args:
        config: what they were made with.
        folder: gets ``adapter_config.json`` and ``adapter_model.safetensors``.
        base: where the model that is adapted came from, for the record.
        write: False on ranks that only help to gather.
    """
    tensors = {name: form.to_file(all_values(p)) for name, (p, form) in _in_file(model, config.also_trained).items()}
    if not write:
        return
    found = [(name, own) for name, module, own in _maps(model) if _has_adapter(module, own)]
    stacked = [name for name, own in found if own]
    settings = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base or None,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0 if stacked else config.dropout,  # peft refuses it beside parameters
        "target_modules": [name for name, own in found if not own],
        "target_parameters": stacked or None,
        "modules_to_save": _beside(model, config.also_trained) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS_FILE)
    (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def load_adapters(model: nn.Module, folder: Path) -> LoRAConfig:
    """Give a model without adapters those of a folder that :func:`save_adapters` or peft wrote. Returns their settings.

    The model has all of its experts on this rank.

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
    modules, parameters = said.get("target_modules") or [], said.get("target_parameters") or []
    if isinstance(modules, str):
        what = f"target_modules is {modules!r}"
        raise ConfigError(Problem(str(folder / SETTINGS_FILE), what, "a list of names of linear layers is understood"))
    config = LoRAConfig(
        rank=said["r"],
        alpha=said["lora_alpha"],
        dropout=said["lora_dropout"],
        targets=(*modules, *parameters),
        also_trained=tuple(said.get("modules_to_save") or ()),
    )
    add_adapters(model, config)
    mine = _in_file(model, config.also_trained)
    if wrong := sorted(
        name
        for name in mine.keys() | tensors.keys()
        if name not in mine or name not in tensors or mine[name][1].shape != tensors[name].shape
    ):
        what = f"they do not fit the model: {', '.join(wrong[:3])}"
        raise ConfigError(
            Problem(str(folder / WEIGHTS_FILE), what, "load them into the model they were trained beside")
        )
    for name, (parameter, form) in mine.items():
        set_values(parameter, form.from_file(tensors[name]))
    return config


class _Form(NamedTuple):
    """How a parameter stands in a file: in which shape, and the ways there and back."""

    shape: torch.Size
    to_file: Callable[[Tensor], Tensor]
    from_file: Callable[[Tensor], Tensor]


def _as_it_is(shape: torch.Size) -> _Form:
    return _Form(shape, lambda values: values, lambda values: values)


def _form_of_a(shape: torch.Size) -> _Form:
    """[E, r, I] as peft has it, [E * r, I]."""
    if len(shape) == 2:
        return _as_it_is(shape)
    return _Form(torch.Size([shape[0] * shape[1], shape[2]]), lambda a: a.flatten(0, 1), lambda a: a.view(shape))


def _form_of_b(shape: torch.Size) -> _Form:
    """[E, O, r] as peft has it, [O, r * E] with the experts next to each other."""
    if len(shape) == 2:
        return _as_it_is(shape)
    experts, outputs, rank = shape
    return _Form(
        torch.Size([outputs, rank * experts]),
        lambda b: b.permute(1, 2, 0).flatten(1),
        lambda b: b.view(outputs, rank, experts).permute(2, 0, 1).contiguous(),
    )


def _in_file(model: nn.Module, also_trained: Sequence[str]) -> dict[str, tuple[nn.Parameter, _Form]]:
    """What a file holds of the model, by its name there."""
    found = {}
    for name, module, own in _maps(model):
        of: Any = module
        if not _has_adapter(module, own):
            continue
        path, factors = f"{_PREFIX}{name}", (of.lora_A.weight, of.lora_B.weight) if not own else ()
        if own:
            # peft wraps a module once for each of its parameters, and the last one stands outermost.
            wrapped = len(of.adapted) - 1 - of.adapted.index(own)
            path = _PREFIX + name.rpartition(".")[0] + ".base_layer" * wrapped
            factors = (of.adapter(own).A, of.adapter(own).B)
        for factor, parameter, form in zip("AB", factors, (_form_of_a, _form_of_b), strict=True):
            found[f"{path}.lora_{factor}.weight"] = parameter, form(full_shape(parameter))
    for name in _beside(model, also_trained):
        for own, parameter in model.get_submodule(name).named_parameters():
            if "lora_" not in own:
                found[f"{_PREFIX}{name}.{own}"] = parameter, _as_it_is(full_shape(parameter))
    return found


def _beside(model: nn.Module, also_trained: Sequence[str]) -> list[str]:
    return [name for name, _ in model.named_modules() if name and _is_named(name, also_trained)]


def _maps(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """What can have an adapter: its name, the module that it is or is in, and there its own name (else empty)."""
    for name, module in model.named_modules():
        if isinstance(module, LINEAR):
            yield name, module, ""
        elif isinstance(module, Adaptable):
            for own in module.MAPS:
                yield f"{name}.{own}", module, own


def _has_adapter(module: Any, own: str) -> bool:
    return hasattr(module, f"lora_{own}" if own else "adapter_hook")


def _targets(model: nn.Module, patterns: Sequence[str]) -> Iterator[tuple[str, Any, str]]:
    return ((name, module, own) for name, module, own in _maps(model) if _is_named(name, patterns))


def _is_named(name: str, patterns: Sequence[str]) -> bool:
    """Whether a dotted name, or its end from a dot on, fits one of the patterns."""
    return any(fnmatch(name, pattern) or fnmatch(name, f"*.{pattern}") for pattern in patterns)


def _as_base(mine: nn.Parameter, base: nn.Parameter) -> None:
    """Bring an adapter's matrix, unless it is sharded already, to where its layer's weight is and to its precision."""
    if not hasattr(mine, "ds_tensor") and (mine.device, mine.dtype) != (base.device, base.dtype):
        mine.data = mine.data.to(base.device, base.dtype)


def _added(layer: nn.Module) -> _AddAdapter:
    return next(hook for hook in layer._forward_hooks.values() if isinstance(hook, _AddAdapter))
