"""Models by name, for whoever has settings and no recipe: checkpoints, tools."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pydantic
import torch
from torch import nn

from moe_scale.config import DecoderConfig, MoEConfig, Seq2SeqConfig
from moe_scale.errors import ConfigError, Problem
from moe_scale.models.decoder import DecoderLM
from moe_scale.models.seq2seq import Seq2Seq

MODELS: dict[str, tuple[type, type[nn.Module]]] = {
    "decoder": (DecoderConfig, DecoderLM),
    "seq2seq": (Seq2SeqConfig, Seq2Seq),
}
"""Settings and class of each kind of model."""


def build_model(kind: str, settings: Mapping[str, Any]) -> nn.Module:
    """The model that ``kind`` and a run's settings name, on the meta device: shapes without values.

    Always with the ``custom`` backend and all experts on this rank, whose parameters are the logical tensors.

    Raises:
        ConfigError: if the settings are those of no model of this release.
    """
    try:
        moe = pydantic.TypeAdapter(MoEConfig).validate_python(settings["moe"])
        moe = replace(moe, backend="custom", kernels="auto", ep_size=1)
        config_class, model_class = MODELS[kind]
        config: Any = pydantic.TypeAdapter(config_class).validate_python(settings["model"])
    except (KeyError, pydantic.ValidationError) as error:
        if kind not in MODELS:
            known = "this release knows " + ", ".join(MODELS)
            raise ConfigError(Problem("kind of the model", repr(kind), known)) from None
        why = str(error).replace("\n", " ")
        raise ConfigError(Problem("settings of the model", why, "this release knows other ones")) from None
    with torch.device("meta"):
        return model_class(config, moe)
