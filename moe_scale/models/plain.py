"""A *plain directory*: any model of this project as one safetensors file and its settings, for other programs to read.

``config.json`` has the ``kind`` and the ``settings`` of the model, ``model.safetensors`` its logical tensors
(:mod:`moe_scale.moe.placement`), under the names that they have in the model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from moe_scale.errors import ConfigError, Problem
from moe_scale.models.build import build_model
from moe_scale.models.hf.directory import CONFIG, Directory

FORMAT = "moe_scale"


def plain_settings(kind: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The content of ``config.json`` of a run's model: of the run's settings those that the model is built from.

    Without those of adapters: they are part of the weights.
    """
    kept = {section: settings[section] for section in ("model", "moe")}
    return {"format": FORMAT, "kind": kind, "settings": kept}


def load_plain(path: str | Path) -> nn.Module:
    """The model of a plain directory on the CPU, in evaluation mode.

    Raises:
        ConfigError: if the directory is not one, or not whole.
    """
    folder = Path(path).expanduser()
    directory = Directory(folder, "the directory")
    try:
        said = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if said["format"] != FORMAT:
            raise ValueError(f"its format is {said['format']!r}")
        kind, settings = said["kind"], said["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"{folder / CONFIG} is not one of this project ({error!r})"
        raise ConfigError(Problem("the directory", what, "name what moe-scale export --to moe_scale wrote")) from None
    model = build_model(kind, settings)
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    buffers = {name: tensor for name, tensor in model.state_dict().items() if name in dict(model.named_buffers())}
    if wrong := sorted(directory.names ^ (parameters.keys() | buffers.keys())):
        what = f"{folder} does not hold the tensors of the model that it names: {', '.join(wrong[:5])}"
        raise ConfigError(Problem("the directory", what))
    filled = {id(meta): nn.Parameter(directory.tensor(name)) for name, meta in parameters.items()}
    # Under every name that a parameter has, so that tied weights stay one.
    state: dict[str, Tensor] = {name: filled[id(meta)] for name, meta in model.named_parameters(remove_duplicate=False)}
    model.load_state_dict(state | {name: directory.tensor(name) for name in buffers}, assign=True)
    return model.eval()
