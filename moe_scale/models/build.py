"""Models by name, for whoever has settings and no recipe: checkpoints, tools."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pydantic
import torch
from torch import nn

from moe_scale.config import (
    ClassifierModelConfig,
    ClassifierMoEConfig,
    DecoderConfig,
    LoRAConfig,
    MoEConfig,
    MultimodalModelConfig,
    Seq2SeqConfig,
    SwitchModelConfig,
    SwitchMoEConfig,
    complete_moe,
)
from moe_scale.errors import ConfigError, Problem
from moe_scale.models.classifier import Classifier
from moe_scale.models.decoder import DecoderLM
from moe_scale.models.lora import add_adapters
from moe_scale.models.seq2seq import Seq2Seq
from moe_scale.models.switch import SwitchLM
from moe_scale.models.text_image import TextImageModel

MODELS: dict[str, tuple[type, type, Callable[..., nn.Module]]] = {
    "decoder": (DecoderConfig, MoEConfig, DecoderLM),
    "seq2seq": (Seq2SeqConfig, MoEConfig, Seq2Seq),
    "switch": (SwitchModelConfig, SwitchMoEConfig, SwitchLM),
    "classifier": (ClassifierModelConfig, ClassifierMoEConfig, Classifier),
    "feature-classifier": (ClassifierModelConfig, ClassifierMoEConfig, partial(Classifier, of_features=True)),
    "text-image": (MultimodalModelConfig, MoEConfig, TextImageModel),
}
"""Of each kind of model: its settings, those of its sparse layers, and what builds it from both."""


def build_model(kind: str, settings: Mapping[str, Any]) -> nn.Module:
    """The model that ``kind`` and a run's settings name, on the meta device: shapes without values.

    With adapters where the run trained some. Always with the ``custom`` backend and all experts on this rank, whose
    parameters are the logical tensors.

    Raises:
        ConfigError: if the settings are those of no model of this release.
    """
    try:
        config_class, moe_class, build = MODELS[kind]
        config: Any = pydantic.TypeAdapter(config_class).validate_python(settings["model"])
        moe: MoEConfig = pydantic.TypeAdapter(moe_class).validate_python(settings["moe"])
        lora = pydantic.TypeAdapter(LoRAConfig).validate_python(settings.get("lora", {}))
    except (KeyError, pydantic.ValidationError) as error:
        if kind not in MODELS:
            known = "this release knows " + ", ".join(MODELS)
            raise ConfigError(Problem("kind of the model", repr(kind), known)) from None
        why = str(error).replace("\n", " ")
        raise ConfigError(Problem("settings of the model", why, "this release knows other ones")) from None
    if isinstance(config, ClassifierModelConfig):
        moe = complete_moe(moe, config)
    with torch.device("meta"):
        model = build(config, replace(moe, backend="custom", kernels="auto", ep_size=1))
        if lora.enabled:
            add_adapters(model, lora)
        return model
