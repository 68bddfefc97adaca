"""Parameters and FLOPs of a classifier from its settings alone; no module is built."""

from __future__ import annotations

from typing import Any, TypeVar

from moe_scale.config import ClassifierModelConfig, MoEConfig
from moe_scale.models.transformer_counts import stack_params


def num_params(model: ClassifierModelConfig, moe: MoEConfig, *, of_features: bool = False) -> int:
    """Parameters of the whole model."""
    return _ends(model, of_features) + stack_params(model, moe, layers=model.num_layers, attentions=1).total


def num_active_params(model: ClassifierModelConfig, moe: MoEConfig, *, of_features: bool = False) -> int:
    """Parameters that a sequence of one position uses: of the experts of a layer only K."""
    stack = stack_params(model, moe, layers=model.num_layers, attentions=1, active=True)
    return _ends(model, of_features) + stack.total


Lengths = TypeVar("Lengths", float, Any)
"""A number, or an array of numbers."""


def training_flops(model: ClassifierModelConfig, moe: MoEConfig, length: Lengths) -> Lengths:
    """FLOPs of the forward and backward pass of a sequence, three times the forward pass; a multiply-add is two.

    Matrix products only: 2 FLOPs a weight and position (the look-up of an embedding is none, the head works once a
    sequence), and 4*H*A for each query and key.

    Args:
        length: positions of the sequence, or an array of those of many.
    """
    layers = stack_params(model, moe, layers=model.num_layers, attentions=1, active=True).matrices
    pooling = model.hidden_size * (2 if model.pooling == "attention" else 1)
    by_position = layers + model.input_size * model.hidden_size + pooling
    scores = model.num_layers * 4 * model.num_heads * model.head_width * length**2
    return 3 * (2 * (length * by_position + model.hidden_size * model.output_size) + scores)


def _ends(model: ClassifierModelConfig, of_features: bool) -> int:
    """What is before and after the layers."""
    embedding = 0 if of_features else model.vocab_size * model.input_size
    positions = model.max_positions * model.hidden_size if model.positions == "learned" else 0
    pooling = model.hidden_size if model.pooling == "attention" else 0
    head = model.output_size * (model.hidden_size + 1)
    return embedding + model.input_size * model.hidden_size + positions + pooling + head
