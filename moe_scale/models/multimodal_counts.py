"""Parameters and FLOPs of a model of texts and images from its settings alone; no module is built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from moe_scale.config import ImageEncoderConfig, MoEConfig, MultimodalModelConfig
from moe_scale.models.transformer_counts import PartCounts, stack_params

Lengths = TypeVar("Lengths", float, Any)
"""A number, or an array of numbers."""

MATCHED = 3
"""Pairs that retrieval fuses for each pair of a batch: itself, and one with a wrong text and a wrong image each."""


@dataclass(frozen=True)
class Counts:
    """Parameters by part of the model."""

    text: int
    image: int
    fusion: int
    heads: int
    """What maps to features, classes or scores, with the temperature."""

    @property
    def total(self) -> int:
        return self.text + self.image + self.fusion + self.heads


def num_params(model: MultimodalModelConfig, moe: MoEConfig) -> Counts:
    """Parameters of the whole model, without adapters."""
    return _counts(model, moe, active=False)


def num_active_params(model: MultimodalModelConfig, moe: MoEConfig) -> Counts:
    """Parameters that one token and one patch use: of the experts of a layer only K."""
    return _counts(model, moe, active=True)


def training_flops(model: MultimodalModelConfig, moe: MoEConfig, length: Lengths) -> Lengths:
    """FLOPs of the forward and backward pass of a text and its image, three times the forward pass; a multiply-add is
    two.

    Matrix products only: 2 FLOPs a weight and position that it works on (the look-up of an embedding is none, heads
    work on a pair once), and 4*H*A for each query and key. Left out are the products of features with features in
    retrieval; and what a backward pass saves on frozen weights is not taken off.

    Args:
        length: tokens of the text, or an array of those of many.
    """
    weights = _stack(model, moe, "text", active=True).matrices
    flops = 2 * weights * length + 4 * model.text_layers * model.text_width * length**2
    if model.has_images:
        flops = flops + _image_flops(model.image)
    if model.has_fusion:
        flops = flops + _fusion_flops(model, moe, length) * (MATCHED if model.goal == "retrieval" else 1)
    features, head = _heads(model)
    return 3 * (flops + 2 * (features + head * (MATCHED if features else 1)))


def _counts(model: MultimodalModelConfig, moe: MoEConfig, *, active: bool) -> Counts:
    positions = model.max_positions if model.positions == "learned" else 0
    text = _stack(model, moe, "text", active=active).total + (model.vocab_size + 2 + positions) * model.text_width
    fusion = 0
    if model.has_fusion:
        into = (model.text_width + model.image_width) * model.fusion_width
        fusion = into + _stack(model, moe, "fusion", active=active).total
    features, head = _heads(model)
    biases = 2 if model.goal == "retrieval" and model.has_fusion else model.num_outputs
    temperature = int(model.goal == "retrieval")
    image = _image_params(model.image) if model.has_images else 0
    return Counts(text, image, fusion, features + head + biases + temperature)


def _stack(
    model: MultimodalModelConfig, moe: MoEConfig, part: Literal["text", "fusion"], *, active: bool
) -> PartCounts:
    config, attentions = (model.text, 1) if part == "text" else (model.fusion, 2)
    return stack_params(
        config, model.experts_of(part, moe), layers=config.num_layers, attentions=attentions, active=active
    )


def _heads(model: MultimodalModelConfig) -> tuple[int, int]:
    """Weights without biases that map to the shared space, and to classes, scores or matching."""
    pooled = 2 * model.fusion_width if model.has_fusion else model.text_width
    if model.goal == "retrieval":
        return (model.text_width + model.image_width) * model.embed_size, 2 * pooled if model.has_fusion else 0
    return 0, pooled * model.num_outputs


def _image_params(image: ImageEncoderConfig) -> int:
    d_model = image.d_model
    patches = (image.channels * image.patch_size**2 + 1) * d_model
    layer = 4 * d_model * (d_model + 1) + (2 * d_model + 1) * image.hidden + d_model + 4 * d_model
    return patches + (2 + image.num_patches) * d_model + image.num_layers * layer + 2 * d_model


def _image_flops(image: ImageEncoderConfig) -> int:
    """Of the forward pass of an image."""
    d_model, positions = image.d_model, 1 + image.num_patches
    patches = 2 * image.num_patches * image.channels * image.patch_size**2 * d_model
    weights = 4 * d_model**2 + 2 * d_model * image.hidden
    return patches + image.num_layers * (2 * weights * positions + 4 * d_model * positions**2)


def _fusion_flops(model: MultimodalModelConfig, moe: MoEConfig, length: Lengths) -> Lengths:
    """Of the forward pass of one pair. Of both attentions, half the weights work on tokens and half on patches."""
    width, positions, stack = model.fusion_width, 1 + model.image.num_patches, _stack(model, moe, "fusion", active=True)
    into = 2 * width * (model.text_width * length + model.image_width * positions)
    weights = stack.attention // 2 + stack.matrices - stack.attention
    scores = model.fusion_layers * 2 * 4 * width * positions * length
    return into + 2 * weights * (length + positions) + scores
