"""A *model folder*: weights that no run of this project has trained as they are, in the form that a run leaves.

::

    run.json                      the settings, and where the weights come from
    settings.yaml                 for ``--config``: a run of this model that begins with these weights
    tokenizer/                    where the model has one of its own
    checkpoints/step_00000000/    the weights, without moments: nothing was trained yet

Whatever opens a run opens it too: ``moe-scale generate``, :func:`moe_scale.load_model`, ``model.pretrained``.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from math import prod
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn

from moe_scale.checkpoint import folder as folders
from moe_scale.checkpoint.files import sync_folder
from moe_scale.checkpoint.index import WEIGHT, Index, read_index, verify
from moe_scale.checkpoint.reader import persistent_buffers
from moe_scale.checkpoint.writer import Piece, join, write_part
from moe_scale.config import RunConfig
from moe_scale.data.tokenizer import TOKENIZER_FOLDER, copy_tokenizer, load_tokenizer
from moe_scale.errors import ConfigError, Problem
from moe_scale.models.build import build_model
from moe_scale.settings import to_dict
from moe_scale.telemetry.provenance import hide, package_versions, write_atomically

FILE_ELEMENTS = 1 << 30
"""Elements that a file of weights has, about; so many are in memory at once."""

_OF_THE_MACHINE = {
    "model": ("pretrained", "activation_checkpointing", "loss_chunk_tokens"),
    "moe": ("backend", "kernels", "ep_size"),
}
"""Settings that a run takes from its own scale, whatever it begins with."""


def new_folder(path: str, option: str = "--output_dir") -> Path:
    """The folder that ``option`` names, which is still to be made.

    Raises:
        ConfigError: when it exists already, or cannot be made for want of a folder to be in.
    """
    folder = Path(path).expanduser().absolute()
    if folder.exists() or folder.is_symlink():
        raise ConfigError(Problem(option, f"{folder} exists", "name a new folder"))
    nearest = next(parent for parent in folder.parents if parent.exists())
    if not nearest.is_dir():
        raise ConfigError(Problem(option, f"{folder} cannot be made: {nearest} is a file", "name another folder"))
    return folder


def write_model_folder(
    folder: Path,
    kind: str,
    config: RunConfig,
    weight: Callable[[str], Tensor],
    *,
    origin: Mapping[str, Any],
    tokenizer: Callable[[Path], None] | None = None,
) -> Path:
    """Write a model folder, which has its name once everything in it is on the disk and was read back.

    Args:
        folder: a new one, as :func:`new_folder` gives it.
        kind: of the model, a key of :data:`moe_scale.models.build.MODELS`.
        config: the settings of a run of such a model.
        weight: gives a logical tensor (:mod:`moe_scale.moe.placement`) by its name, in its shape; called once for each,
            in the model's order. They are stored in the precision that they have.
        origin: where the weights come from, for ``run.json``.
        tokenizer: writes the model's tokenizer into a folder that it makes; None where ``data.tokenizer`` names it.

    Returns:
        ``folder``.

    Raises:
        ConfigError: if the folder is there already or cannot be written, or the weights are not those of such a
            model; nothing is left behind then.
    """
    new_folder(str(folder))
    partial = folders.partial_of(folder)
    try:
        folders.begin(folder)
        if tokenizer is not None:
            tokenizer(partial / TOKENIZER_FOLDER)
            config = _with(config, "data", tokenizer=str(folder / TOKENIZER_FOLDER))
        config = _with(_with(config, "model", pretrained=""), "lora", rank=0)  # adapters are part of the weights
        settings = to_dict(config)
        _write_checkpoint(partial, kind, settings, weight)
        record = {
            "made": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "origin": dict(origin),
            "settings": hide(settings),
            "packages": package_versions(),
        }
        write_atomically(partial / "run.json", json.dumps(record, indent=2, default=str).encode() + b"\n")
        write_atomically(partial / "settings.yaml", _starting_settings(folder, settings).encode())
        sync_folder(partial)
        partial.rename(folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise ConfigError(Problem(str(folder), f"cannot be written: {error.strerror}", "", True)) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def copy_of_tokenizer(name: str) -> Callable[[Path], None] | None:
    """What writes the tokenizer ``name`` into a model folder; None for one that is found by its name.

    Args:
        name: as ``data.tokenizer`` takes it.
    """
    source = Path(name).expanduser()
    return functools.partial(_copy, source) if source.is_dir() else None


def _copy(source: Path, target: Path) -> None:
    """Copy a tokenizer, and see that it is all there."""
    copy_tokenizer(source, target)
    load_tokenizer(str(target))


def _with(config: Any, section: str, **values: Any) -> Any:
    """The settings with others in a section, where there is one that has them."""
    if not hasattr(config, section):
        return config
    there = {name: value for name, value in values.items() if hasattr(getattr(config, section), name)}
    return replace(config, **{section: replace(getattr(config, section), **there)})


def _write_checkpoint(folder: Path, kind: str, settings: dict[str, Any], weight: Callable[[str], Tensor]) -> None:
    target = folders.checkpoints_of(folder) / folders.name_of(0)
    partial = folders.begin(target)
    shapes = _shapes(build_model(kind, settings))
    shares = list(_shares(shapes))
    parts = [
        write_part(partial, _pieces(shapes, names, weight), None, rank=number, world_size=len(shares))
        for number, names in enumerate(shares)
    ]
    tensors, sizes, _ = join(parts, partial)
    optimizer = {"name": "", "steps": 0, "schedule_steps": 0, "skipped": 0, "loss_scaler": None, "tables": {}}
    Index(
        step=0,
        tokens=0,
        kind=kind,
        settings=settings,
        layout={},
        optimizer=optimizer,
        scores={},
        tensors=tensors,
        sizes=sizes,
        ranks={},
    ).write(partial)
    verify(partial, read_index(partial))
    folders.finish(target)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of the logical tensors of a model that is whole on this process."""
    tensors = dict(model.named_parameters()) | persistent_buffers(model)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _shares(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """Names of the tensors of each file."""
    names: list[str] = []
    elements = 0
    for name, shape in shapes.items():
        if names and elements + prod(shape) > FILE_ELEMENTS:
            yield names
            names, elements = [], 0
        names.append(name)
        elements += prod(shape)
    yield names


def _pieces(
    shapes: Mapping[str, tuple[int, ...]], names: Sequence[str], weight: Callable[[str], Tensor]
) -> Iterator[Piece]:
    for name in names:
        values = weight(name).detach()
        if tuple(values.shape) != shapes[name]:
            what = f"{name} is {tuple(values.shape)}, and the settings make it {shapes[name]}"
            raise ConfigError(Problem("the weights", what, "they are not those of such a model"))
        yield Piece(name, shapes[name], WEIGHT, 0, values.to("cpu").reshape(-1))


def _starting_settings(folder: Path, settings: Mapping[str, Any]) -> str:
    """What ``--config`` reads: the model, its tokenizer, and where its weights are."""
    chosen: dict[str, Any] = {
        section: {name: value for name, value in settings[section].items() if name not in own}
        for section, own in _OF_THE_MACHINE.items()
    }
    if "pretrained" in settings["model"]:
        chosen["model"]["pretrained"] = str(folder)
    if "tokenizer" in settings.get("data", {}):
        chosen["data"] = {"tokenizer": settings["data"]["tokenizer"]}
    return yaml.safe_dump(chosen, sort_keys=False, width=120)
