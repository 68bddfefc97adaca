"""Begin with the weights of an earlier run, as far as its model and the new one have the same tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_scale.checkpoint.folder import find_checkpoint
from moe_scale.checkpoint.index import WEIGHT, Index, read_index, verify
from moe_scale.checkpoint.reader import Reader, persistent_buffers
from moe_scale.data.tokenizer import TOKENIZER_FOLDER
from moe_scale.errors import ConfigError, Problem, raise_if
from moe_scale.moe.placement import placements
from moe_scale.parallel.zero import set_values
from moe_scale.train.checkpoint import SETTINGS_THAT_MAY_CHANGE

_OF_NO_WEIGHT = {
    "model": (*SETTINGS_THAT_MAY_CHANGE["model"], "pretrained"),
    "moe": tuple(name for name in SETTINGS_THAT_MAY_CHANGE["moe"] if name != "router_temperature"),
}
"""Settings that may differ from those that weights were trained with, and need no mention."""


def pretrained_problems(where: str, path: str, kind: str, model: nn.Module) -> list[Problem]:
    """Why a model cannot begin with the weights in ``path``; reads the checkpoint's index alone.

    Args:
        where: the setting that named the path.
        path: a run's or a checkpoint's folder.
        kind: of the model, which the checkpoint's has to be as well.
        model: on any device; its values do not matter.
    """
    try:
        index = read_index(find_checkpoint(Path(path).expanduser()))
    except ConfigError as error:
        return [Problem(where, str(problem), this_host_only=True) for problem in error.problems]
    return _misfits(where, path, kind, model, index)


def pretrained_remarks(path: str, model: nn.Module, settings: Mapping[str, Any]) -> list[str]:
    """What a model that begins with the weights in ``path`` does not share with theirs, one sentence each.

    Args:
        model: on any device; its values do not matter.
        settings: of the new run, nested as in a YAML file.
    """
    index = read_index(find_checkpoint(Path(path).expanduser()))
    mine = {place.tensor for place in placements(model).values()} | persistent_buffers(model).keys()
    found = []
    for names, what in ((mine - index.tensors.keys(), "drawn"), (index.tensors.keys() - mine, "left out")):
        if names:
            some = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            found.append(f"model.pretrained: of its tensors and the model's {len(names)} are {what}: {some}")
    for section, of_no_weight in _OF_NO_WEIGHT.items():
        theirs = index.settings.get(section, {})
        found += [
            f"model.pretrained: {section}.{name} was {theirs[name]} and is {value}"
            for name, value in settings.get(section, {}).items()
            if name not in of_no_weight and name in theirs and theirs[name] != value
        ]
    return found


def tokenizer_of(path: str) -> str:
    """The tokenizer of the run, checkpoint or model folder ``path``: its name, or a folder of the model's own."""
    checkpoint = find_checkpoint(Path(path).expanduser()).resolve()
    own = checkpoint.parents[1] / TOKENIZER_FOLDER
    return (
        str(own)
        if checkpoint.parent.name == "checkpoints" and own.is_dir()
        else str(read_index(checkpoint).settings["data"]["tokenizer"])
    )


def begin_with(where: str, path: str, kind: str, model: nn.Module) -> None:
    """Give a model, sharded or not, the tensors that a checkpoint has of it; the others stay as they are.

    Raises:
        ConfigError: if the checkpoint is damaged or does not fit, before anything is changed.
    """
    folder = find_checkpoint(Path(path).expanduser())
    index = read_index(folder)
    raise_if(_misfits(where, path, kind, model, index))
    if all(parameter.is_meta for parameter in model.parameters()):
        return
    verify(folder, index)
    reader, places = Reader(folder, index), placements(model)
    for name, parameter in model.named_parameters():
        place = places[name]
        if place.tensor in index.tensors:
            parts = [reader.read(place.tensor, WEIGHT, s.in_tensor, s.length) for s in place.stretches]
            set_values(parameter, torch.cat(parts))
    for name, buffer in persistent_buffers(model).items():
        if name in index.tensors and not buffer.is_meta:
            buffer.copy_(reader.weight(name))


def _misfits(where: str, path: str, kind: str, model: nn.Module, index: Index) -> list[Problem]:
    if index.kind != kind:
        return [Problem(where, f"{path} holds a model of kind {index.kind}", f"name a run of kind {kind}")]
    if any(".lora_" in name for name in index.tensors):
        what = f"{path} was trained with adapters, which are not part of its weights"
        return [Problem(where, what, "name the run that they were trained beside")]
    shapes = {place.tensor: place.shape for place in placements(model).values()}
    found = [
        Problem(
            where, f"{name} is {theirs.shape} in {path} and {shapes[name]} here", "choose that run's model settings"
        )
        for name, theirs in index.tensors.items()
        if name in shapes and tuple(theirs.shape) != tuple(shapes[name])
    ]
    if not shapes.keys() & index.tensors.keys():
        found.append(Problem(where, f"{path} has no tensor of this model", "name a run of such a model"))
    return found[:5]
