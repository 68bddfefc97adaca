"""One MoE layer as every variant of ``moe-scale compare`` computes it: time, memory, and how far the outputs differ.

On one rank with all experts, at the shape and precision of the recipe's micro-batch.

Shapes: B batch, S sequence, D model width.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moe_scale.config import MoEConfig, show
from moe_scale.errors import Problem
from moe_scale.initialization import Init
from moe_scale.tools.bench import DTYPES, Row, sample_layers, step_once, time_parts
from moe_scale.tools.peers import backend_layer, build_peer, hugging_face_block, peak_extra_bytes

HUGGING_FACE = "hf"
"""The variant that is a layer alone: Hugging Face's Qwen3-MoE block, grouped_mm."""

_ITS_SETTINGS: dict[str, Any] = {
    "router": "softmax",
    "router_temperature": 1.0,
    "router_jitter": 0.0,
    "activation": "swiglu",
    "expert_bias": False,
    "expert_dropout": 0.0,
    "shared_intermediate_size": 0,
    "residual": False,
    "dispatch": "dropless",
}


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """What the layers are measured on."""

    batch: int
    seq_len: int
    d_model: int
    precision: str

    def __str__(self) -> str:
        return f"{self.batch} x {self.seq_len} tokens, d_model {self.d_model}, {self.precision}"


def hugging_face_problems(config: MoEConfig) -> list[Problem]:
    """What of the settings Hugging Face's block does not have."""
    return [
        Problem(
            f"moe.{name}",
            f"{show(getattr(config, name))} with the variant {HUGGING_FACE}, whose block has {show(value)} alone",
            f"use moe.{name} {show(value)}, or leave {HUGGING_FACE} out of --variants",
        )
        for name, value in _ITS_SETTINGS.items()
        if getattr(config, name) != value
    ]


def compare_layers(
    names: Iterable[str], config: MoEConfig, shape: LayerShape, device: torch.device, *, rounds: int
) -> dict[str, Row]:
    """Measure the layers in turn. All have the same weights but for the dense one.

    Args:
        names: variants.
        config: the recipe's layer; the backend is the variant's, and all experts are on this rank.
        rounds: of which the median is taken, after two that are not counted.

    Returns:
        for each variant ``layer_forward_ms``, ``layer_backward_ms``; ``layer_peak_bytes``, what a step allocates at
        most beyond the weights; ``layer_difference``, the largest difference of an output from the custom layer's
        in fp32, as a share of the largest output; for custom also ``layer_parts``, by step of the layer.
    """
    config = dataclasses.replace(config, enabled=True, ep_size=1)
    if config.aux_loss_scope == "global":  # needs the other ranks, which wait
        config = dataclasses.replace(config, aux_loss_scope="micro_batch")
    builders = {name: functools.partial(_build, name, config, shape.d_model) for name in names}
    differences = _differences(builders, config, shape, device)
    dtype = DTYPES[shape.precision]
    x_BSD, grad_BSD = (_draw(seed, shape, device).to(dtype) for seed in (1, 2))
    x_BSD.requires_grad_()
    layers = {name: build().to(device, dtype) for name, build in builders.items()}
    samples = sample_layers(layers, x_BSD, grad_BSD, rounds=rounds, warmup=2)
    for layer in layers.values():  # or what they free of it would count as room that they had
        layer.zero_grad(set_to_none=True)
    x_BSD.grad = None
    rows: dict[str, Row] = {
        name: {
            "layer_forward_ms": 1e3 * statistics.median(samples["forward"][name]),
            "layer_backward_ms": 1e3 * statistics.median(samples["backward"][name]),
            "layer_peak_bytes": peak_extra_bytes(functools.partial(step_once, layer, x_BSD, grad_BSD), device),
            "layer_difference": differences[name],
        }
        for name, layer in layers.items()
    }
    if "custom" in rows and config.router not in ("hash", "expert_choice"):  # whose steps take other arguments
        parts = time_parts(config, x_BSD.detach(), grad_BSD, rounds=rounds, warmup=2)
        named: dict[str, dict[str, float]] = {}
        for (part, direction), seconds in parts.items():
            named.setdefault(part, {})[f"{direction}_ms"] = 1e3 * seconds
        rows["custom"]["layer_parts"] = named
    return rows


def _build(name: str, config: MoEConfig, d_model: int) -> nn.Module:
    if name == "dense":
        return build_peer("dense", config, d_model)
    if name == HUGGING_FACE:
        return hugging_face_block(config, d_model, "grouped_mm")
    return backend_layer(dataclasses.replace(config, backend=name), d_model)  # type: ignore[arg-type]


def _differences(
    builders: Mapping[str, Callable[[], nn.Module]], config: MoEConfig, shape: LayerShape, device: torch.device
) -> dict[str, float | None]:
    """In fp32 whatever the precision of training: rounded scores would send some tokens to other experts."""
    x_BSD = _draw(1, shape, device)
    with torch.no_grad():
        expected_BSD = _build("custom", config, shape.d_model).to(device)(x_BSD)
        found: dict[str, float | None] = {"dense": None, "custom": None}
        for name, build in builders.items():
            if name not in found:
                y_BSD = build().to(device)(x_BSD)
                found[name] = float((y_BSD - expected_BSD).abs().max() / expected_BSD.abs().max())
    return found


def _draw(seed: int, shape: LayerShape, device: torch.device) -> Tensor:
    return Init(seed).normal_(torch.empty(shape.batch, shape.seq_len, shape.d_model, device=device), 1.0)
