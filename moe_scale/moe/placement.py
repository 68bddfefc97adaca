"""Where a rank's parameters lie in the model's *logical* tensors.

Logical tensors are those of the ``custom`` backend on one rank: ``layers.3.moe.experts.gate_up`` holds all E experts.
With expert parallelism a rank has a part of them, and the other backends name and cut them in their own way. Knowing
the place of each stretch is all that is needed to carry weights and moments from any backend and any number of ranks
to any other.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import nn

from moe_scale.parallel.zero import full_shape


class Stretch(NamedTuple):
    """``length`` elements that lie next to each other both in a flattened parameter and in its logical tensor."""

    in_parameter: int
    in_tensor: int
    length: int


class Placement(NamedTuple):
    """The place of a parameter.

    Attributes:
        tensor: name of the logical tensor.
        shape: of the whole logical tensor.
        stretches: together all of the parameter, in its order.
    """

    tensor: str
    shape: tuple[int, ...]
    stretches: list[Stretch]


def whole(name: str, shape: tuple[int, ...]) -> Placement:
    """The placement of a parameter that is a logical tensor by itself."""
    return Placement(name, shape, [Stretch(0, 0, math.prod(shape))])


def experts_of(name: str, num_experts: int, first: int, count: int, shape: tuple[int, ...]) -> Placement:
    """The placement of a stack [count, *shape] of the experts from number ``first`` on."""
    size = math.prod(shape)
    return Placement(name, (num_experts, *shape), [Stretch(0, first * size, count * size)])


def placements(model: nn.Module) -> dict[str, Placement]:
    """The place of every parameter of a model, by the parameter's name.

    Modules say where their parameters deviate from themselves by a method ``placements``.
    """
    found = {name: whole(name, tuple(full_shape(parameter))) for name, parameter in model.named_parameters()}
    for prefix, module in model.named_modules():
        if callable(own := getattr(module, "placements", None)):
            dot = f"{prefix}." if prefix else ""
            for name, place in own().items():
                found[dot + name] = place._replace(tensor=dot + place.tensor)
    return found
