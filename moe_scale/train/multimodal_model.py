"""What a run of ``multimodal`` trains: the model with what it begins with, and what is kept of its adapters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from moe_scale.config import MultimodalConfig
from moe_scale.data.examples.vocabulary import Subwords
from moe_scale.errors import Problem
from moe_scale.models.lora import adapter_problems, adapters, add_adapters, save_adapters
from moe_scale.models.text_image import TextImageModel
from moe_scale.models.vit_weights import load_vit, vit_problems
from moe_scale.parallel.groups import ParallelGroups
from moe_scale.settings import to_dict
from moe_scale.train.adapters import keep_adapters
from moe_scale.train.pretrained import (
    begin_with,
    data_settings,
    pretrained_problems,
    pretrained_remarks,
    pretrained_tensors,
)

KIND = "text-image"
HEAD = "head."
"""How the names of the tensors begin that make classes or scores: their number is the data's."""
VIT_ADAPTERS = "adapters_vit"
"""Folder of a run with the adapters of its image encoder alone, as peft has them: they fit a ViT of Hugging Face."""


def build_text_image(config: MultimodalConfig, groups: ParallelGroups) -> TextImageModel:
    """The model with what it begins with: weights that are drawn, of a ViT, of an earlier run; and adapters."""
    model = TextImageModel(config.model, config.moe, groups, config.seed)
    if config.model.vit_weights:
        assert model.image is not None
        load_vit(model.image, config.model.vit_weights)
    if config.model.pretrained:
        begin_with("model.pretrained", config.model.pretrained, KIND, model, head=HEAD)
    if config.lora.enabled:
        add_adapters(model, config.lora, config.seed)
    return model


def vocabulary_of(pretrained: str) -> Path | None:
    """The vocabulary that lies beside the checkpoints of a run, or of the run that a checkpoint is of."""
    path = Path(pretrained).expanduser().resolve()
    for folder in (path, *path.parents[:2]):
        if (folder / Subwords.file_name).is_file():
            return folder / Subwords.file_name
    return None


def model_problems(config: MultimodalConfig) -> list[Problem]:
    """What is wrong with what the model begins with, and with the names of what is adapted."""
    found, path = [], config.model.pretrained
    model = _without_values(config)
    if config.model.vit_weights:
        found += vit_problems(config.model.vit_weights, config.model.image)
    if path:
        misfits = pretrained_problems("model.pretrained", path, KIND, model, to_dict(config), head=HEAD)
        # The model's size of images is the data's, and that is the setting to change.
        found += [replace(p, allowed=p.allowed.replace("model.image_size", "data.image_size")) for p in misfits]
        if not misfits and vocabulary_of(path) is None:
            what = f"{path} has no {Subwords.file_name} beside its checkpoints"
            allowed = "name a run's folder as it was left: its tokens mean nothing in other words"
            found.append(Problem("model.pretrained", what, allowed, this_host_only=True))
        if not misfits and config.model.vit_weights and any(n.startswith("image.") for n in pretrained_tensors(path)):
            what = f"{config.model.vit_weights}, and model.pretrained has an image encoder, which would replace it"
            found.append(Problem("model.vit_weights", what, "leave one of the two out", this_host_only=True))
    return found + (adapter_problems(model, config.lora) if config.lora.enabled else [])


def model_remarks(config: MultimodalConfig) -> list[str]:
    """What the model has not from the run that it begins with, one sentence each."""
    path, data = config.model.pretrained, config.data
    if not path:
        return []
    found, theirs = pretrained_remarks(path, _without_values(config), to_dict(config), head=HEAD), data_settings(path)
    if theirs.get("tokenizer", data.tokenizer) != data.tokenizer:
        found.append(f"data.tokenizer: {data.tokenizer} has no effect, as the words are those of model.pretrained")
    for name in ("mean", "std") if config.model.has_images else ():
        was, now = tuple(theirs.get(name, ())), getattr(data, name)
        if was and was != now:
            found.append(f"model.pretrained: data.{name} was {_spoken(was)} and is {_spoken(now)}")
    return found


def _spoken(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:g}" for value in values)


def _without_values(config: MultimodalConfig) -> TextImageModel:
    """The model on no device: names and shapes of its parameters, without adapters."""
    with torch.device("meta"):
        return TextImageModel(config.model, config.moe)


def keep_all_adapters(model: nn.Module, config: MultimodalConfig, run_dir: Path, *, write: bool) -> None:
    """Write the run's adapters, and those of its image encoder alone; all ranks together.

    Args:
        write: False on ranks that only help to gather.
    """
    base = config.model.pretrained or config.model.vit_weights
    keep_adapters(model, config.lora, run_dir, base=base, write=write)
    assert isinstance(model, TextImageModel)
    if model.image is not None and adapters(model.image):
        save_adapters(model.image, config.lora, run_dir / VIT_ADAPTERS, base=config.model.vit_weights, write=write)
