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

SHOWN = 8
"""Settings that a message names, at most."""

_OF_NO_WEIGHT = {
    "model": (*SETTINGS_THAT_MAY_CHANGE["model"], "pretrained", "goal", "inputs", "num_outputs"),
    "moe": tuple(name for name in SETTINGS_THAT_MAY_CHANGE["moe"] if name != "router_temperature"),
}
"""Settings that may differ from those that weights were trained with, or follow from the data, and need no mention."""


def pretrained_problems(
    where: str, path: str, kind: str, model: nn.Module, settings: Mapping[str, Any] | None = None, *, head: str = ""
) -> list[Problem]:
    """Why a model cannot begin with the weights in ``path``; reads the checkpoint's index alone.

    Args:
        where: the setting that named the path.
        path: a run's or a checkpoint's folder.
        kind: of the model, which the checkpoint's has to be as well.
        model: on any device; its values do not matter.
        settings: of the new run, nested as in a YAML file: the message names what differs from the earlier one's.
        head: how the names of tensors begin that follow from the data, and are drawn where their shapes differ.
    """
    try:
        index = _index_of(where, path)
    except ConfigError as error:
        return error.problems
    return _misfits(where, path, kind, model, index, settings, head)


def pretrained_remarks(path: str, model: nn.Module, settings: Mapping[str, Any], *, head: str = "") -> list[str]:
    """What a model that begins with the weights in ``path`` does not share with theirs, one sentence each.

    Args:
        model: on any device; its values do not matter.
        settings: of the new run, nested as in a YAML file.
        head: as of :func:`pretrained_problems`.
    """
    index = read_index(find_checkpoint(Path(path).expanduser()))
    mine = {place.tensor for place in placements(model).values()} | persistent_buffers(model).keys()
    redrawn = _redrawn(model, index, head)
    found = []
    for names, what in ((mine - index.tensors.keys() | redrawn, "drawn"), (index.tensors.keys() - mine, "left out")):
        if names:
            some = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            are = "is" if len(names) == 1 else "are"
            found.append(f"model.pretrained: of its tensors and the model's {len(names)} {are} {what}: {some}")
    taken = {name for name in mine & index.tensors.keys() if head and name.startswith(head)} - redrawn
    theirs, ours = (of.get("data", {}).get("source") for of in (index.settings, settings))
    if taken and theirs != ours:
        found.append(f"model.pretrained: its head is taken over, whose outputs are the classes of data.source {theirs}")
    return found + [
        f"model.pretrained: {name} was {was} and is {value}" for name, was, value in _differing(index, settings)
    ]


def pretrained_tensors(path: str) -> set[str]:
    """Names of the tensors in the checkpoint that ``path`` means."""
    return set(read_index(find_checkpoint(Path(path).expanduser())).tensors)


def data_settings(path: str) -> dict[str, Any]:
    """The settings of the data that the weights in ``path`` were trained on."""
    return dict(read_index(find_checkpoint(Path(path).expanduser())).settings.get("data", {}))


def _differing(index: Index, settings: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Settings that say what weights mean, as (dotted name, value of the checkpoint's run, value of the new one)."""
    found = []
    for section, of_no_weight in _OF_NO_WEIGHT.items():
        theirs = index.settings.get(section, {})
        found += [
            (f"{section}.{name}", theirs[name], value)
            for name, value in settings.get(section, {}).items()
            if name not in of_no_weight and name in theirs and theirs[name] != value
        ]
    return found


def _index_of(where: str, path: str) -> Index:
    """The index of the checkpoint that ``path`` means; a problem with it is one of the setting ``where``."""
    try:
        return read_index(find_checkpoint(Path(path).expanduser()))
    except ConfigError as error:
        raise ConfigError(Problem(where, str(problem), this_host_only=True) for problem in error.problems) from None


def tokenizer_of(path: str) -> str:
    """The tokenizer of the run, checkpoint or model folder ``path``: its name, or a folder of the model's own."""
    checkpoint = find_checkpoint(Path(path).expanduser()).resolve()
    own = checkpoint.parents[1] / TOKENIZER_FOLDER
    return (
        str(own)
        if checkpoint.parent.name == "checkpoints" and own.is_dir()
        else str(read_index(checkpoint).settings["data"]["tokenizer"])
    )


def begin_with(where: str, path: str, kind: str, model: nn.Module, *, head: str = "") -> None:
    """Give a model, sharded or not, the tensors that a checkpoint has of it; the others stay as they are.

    Args:
        head: as of :func:`pretrained_problems`.

    Raises:
        ConfigError: if the checkpoint is damaged or does not fit, before anything is changed.
    """
    index = _index_of(where, path)
    raise_if(_misfits(where, path, kind, model, index, None, head))
    if all(parameter.is_meta for parameter in model.parameters()):
        return
    folder = find_checkpoint(Path(path).expanduser())
    verify(folder, index)
    reader, places, redrawn = Reader(folder, index), placements(model), _redrawn(model, index, head)
    for name, parameter in model.named_parameters():
        place = places[name]
        if place.tensor in index.tensors.keys() - redrawn:
            parts = [reader.read(place.tensor, WEIGHT, s.in_tensor, s.length) for s in place.stretches]
            set_values(parameter, torch.cat(parts))
    for name, buffer in persistent_buffers(model).items():
        if name in index.tensors and not buffer.is_meta:
            buffer.copy_(reader.weight(name))


def _of_other_shape(model: nn.Module, index: Index) -> dict[str, tuple[int, ...]]:
    """The shapes here of the tensors that the checkpoint has in another one."""
    shapes = {place.tensor: tuple(place.shape) for place in placements(model).values()}
    return {
        name: shapes[name]
        for name, theirs in index.tensors.items()
        if name in shapes and tuple(theirs.shape) != shapes[name]
    }


def _redrawn(model: nn.Module, index: Index, head: str) -> set[str]:
    """Those of them that follow from the data."""
    return {name for name in _of_other_shape(model, index) if head and name.startswith(head)}


def _misfits(
    where: str, path: str, kind: str, model: nn.Module, index: Index, settings: Mapping[str, Any] | None, head: str
) -> list[Problem]:
    if index.kind != kind:
        return [Problem(where, f"{path} holds a model of kind {index.kind}", f"name a run of kind {kind}")]
    if any(".lora_" in name for name in index.tensors):
        what = f"{path} was trained with adapters, which are not part of its weights"
        return [Problem(where, what, "name the run that they were trained beside")]
    if not index.tensors.keys() & {place.tensor for place in placements(model).values()}:
        return [Problem(where, f"{path} has no tensor of this model", "name a run of such a model")]
    others, redrawn = _of_other_shape(model, index), _redrawn(model, index, head)
    wrong = [name for name in others if name not in redrawn]
    if not wrong:
        return []
    more = f", and {len(wrong) - 1} more {'does' if len(wrong) == 2 else 'do'} not fit" if len(wrong) > 1 else ""
    what = f"{wrong[0]} is {index.tensors[wrong[0]].shape} in {path} and {others[wrong[0]]} here{more}"
    return [Problem(where, what, f"choose that run's model settings{_as_there(index, settings or {})}")]


def _as_there(index: Index, settings: Mapping[str, Any]) -> str:
    """The earlier run's values of settings that may have a say in shapes and differ; empty if none is known."""
    theirs = [f"{name} {was}" for name, was, _ in _differing(index, settings) if not isinstance(was, float)]
    return (": " + ", ".join(theirs[:SHOWN]) + (", ..." if len(theirs) > SHOWN else "")) if theirs else ""
