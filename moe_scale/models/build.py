"""Models by name, for whoever has settings and no recipe: checkpoints, tools."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pydantic
import torch
from torch import nn

from moe_scale.config import DecoderConfig, MoEConfig
from moe_scale.errors import ConfigError, Problem
from moe_scale.models.decoder import DecoderLM


def build_model(kind: str, settings: Mapping[str, Any]) -> nn.Module:
    """The model that ``kind`` and a run's settings name, on the meta device: shapes without values.

    Always with the ``custom`` backend and all experts on this rank, whose parameters are the logical tensors.

    Raises:
        ConfigError: if the settings are those of no model of this release.
    """
    try:
        moe = pydantic.TypeAdapter(MoEConfig).validate_python(settings["moe"])
        moe = replace(moe, backend="custom", kernels="auto", ep_size=1)
        if kind == "decoder":
            config = pydantic.TypeAdapter(DecoderConfig).validate_python(settings["model"])
            with torch.device("meta"):
                return DecoderLM(config, moe)
    except (KeyError, pydantic.ValidationError) as error:
        why = str(error).replace("\n", " ")
        raise ConfigError(Problem("settings of the model", why, "this release knows other ones")) from None
    raise ConfigError(Problem("kind of the model", repr(kind), "this release knows decoder"))
